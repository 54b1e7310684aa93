"""Random checkpoints in the hub's folder layout, shared by all tests and benchmarks.

    make_checkpoint(tmp_path / "m", layers=2, sharing=True)
    make_checkpoint(tmp_path / "m", **PUBLISHED["125M"], dtype="f16")
    make_r1(tmp_path / "r1", rope=[1, 0, 1])
    make_pro(tmp_path / "pro", sliding=[1, 0, 1], window=16)

The same arguments give the same bytes. Torch is imported for `.bin` containers only.
"""

from __future__ import annotations

import functools
import io
import json
import random
import struct
import tempfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

# The published shapes of the base family; the layer-shared 125M and 350M have the same ones.
PUBLISHED: dict[str, dict[str, Any]] = {
    "125M": dict(layers=30, hidden=576, heads=9, kv_heads=3, ffn=1536, vocab=32000),
    "350M": dict(layers=32, hidden=960, heads=15, kv_heads=5, ffn=2560, vocab=32000),
    "600M": dict(layers=40, hidden=1152, heads=18, kv_heads=6, ffn=3072, vocab=32000),
    "1B": dict(layers=54, hidden=1280, heads=20, kv_heads=5, ffn=3584, vocab=32000),
    "1.5B": dict(layers=54, hidden=1600, heads=25, kv_heads=5, ffn=4352, vocab=32000),
}

TORCH_NAMES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}
SAFETENSORS_NAMES = {
    "float32": "F32",
    "float16": "F16",
    "uint16": "BF16",
    "float64": "F64",
    "int8": "I8",
}
SHARDS = 3


def make_checkpoint(
    folder: Path | str,
    *,
    layers: int = 2,
    hidden: int = 64,
    heads: int = 4,
    kv_heads: int = 2,
    ffn: int = 128,
    vocab: int = 512,
    sharing: bool = False,
    tied: bool = True,
    dtype: str = "bf16",
    container: str = "safetensors",
    architecture: str = "MobileLLMForCausalLM",
    seed: int = 0,
    tensors: Mapping[str, np.ndarray | None] | None = None,
    mlp: str = "mlp",
    **config: Any,
) -> Path:
    """Write a random checkpoint into `folder` and return its path.

    `layers` counts stored blocks. `container` is safetensors, sharded, bin or sharded-bin.
    `tensors` replaces tensors or adds some (None leaves one out): float32 arrays are cast to
    `dtype`, arrays of other types are stored as they are, uint16 as BF16. Further keywords
    override fields of config.json; `...` leaves a field out.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    head_dim = hidden // heads
    fields: dict[str, Any] = {
        "architectures": [architecture],
        "attention_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "initializer_range": 0.02,
        "intermediate_size": ffn,
        "max_position_embeddings": 2048,
        "model_type": "llama",
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": kv_heads,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "tie_word_embeddings": tied,
        "torch_dtype": TORCH_NAMES[dtype],
        "use_cache": True,
        "vocab_size": vocab,
    }
    if architecture == "MobileLLMForCausalLM":  # as on the hub: tying goes by a name of its own
        fields |= {
            "model_type": "mobilellm",
            "share_embedding": tied,
            "tie_word_embeddings": False,
            "layer_sharing": sharing,
            "use_cache": not sharing,
        }
    fields |= config
    fields = {name: value for name, value in fields.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(fields, indent=2) + "\n")

    (folder / "tokenizer.model").write_bytes(tokenizer_model(vocab))
    tokenizer_config = {
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": "",
        "eos_token": "",
        "unk_token": "",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 2048,
        "tokenizer_class": "LlamaTokenizer",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config, indent=2) + "\n")

    head_dim = fields.get("head_dim", head_dim)
    q_rows, kv_rows = heads * head_dim, kv_heads * head_dim
    shapes = tensor_shapes(layers, hidden, q_rows, kv_rows, ffn, vocab, tied, mlp)
    changes = dict(tensors or {})
    names = [name for name in shapes if changes.get(name, ...) is not None]
    names += [name for name, array in changes.items() if name not in shapes and array is not None]

    def make(name: str) -> np.ndarray:
        array = changes.get(name)
        if array is None:
            array = random_tensor(name, shapes[name], seed)
        return array if array.dtype != np.float32 else cast(array, dtype)

    def describe(name: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
        array = changes.get(name)
        if array is None or array.dtype == np.float32:
            stored = {"f32": np.float32, "f16": np.float16, "bf16": np.uint16}[dtype]
            return (shapes[name] if array is None else array.shape), np.dtype(stored)
        return array.shape, array.dtype

    save = save_bin if container.endswith("bin") else save_safetensors
    stem, ending = ("pytorch_model", "bin") if save is save_bin else ("model", "safetensors")
    if container.startswith("sharded"):
        weight_map: dict[str, str] = {}
        for shard in range(SHARDS):
            file = f"{stem}-{shard + 1:05}-of-{SHARDS:05}.{ending}"
            own = names[shard::SHARDS]
            save(folder / file, {name: describe(name) for name in own}, map(make, own))
            weight_map |= dict.fromkeys(own, file)
        index = {"metadata": {}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / f"{stem}.{ending}.index.json").write_text(json.dumps(index, indent=2))
    else:
        save(folder / f"{stem}.{ending}", {n: describe(n) for n in names}, map(make, names))
    return folder


def make_r1(
    folder: Path | str,
    *,
    layers: int = 3,
    hidden: int = 128,
    heads: int = 4,
    ffn: int = 192,
    rope: list[int] | None = None,
    qk_norm: bool = True,
    vocab: int = 512,
    **options: Any,
) -> Path:
    """A random checkpoint of the R1 family: `rope` has 1 for each layer that applies RoPE."""
    options = {
        "model_type": "llama4_text",
        "attention_chunk_size": 64,
        "attn_temperature_tuning": False,
        "bos_token_id": vocab - len(SPECIAL_TOKENS),
        "eos_token_id": [vocab - 7, vocab - 4, vocab - 3],
        "head_dim": hidden // heads,
        "intermediate_size": 2 * ffn,  # of experts, of which there are none
        "intermediate_size_mlp": ffn,
        "layer_types": ["full_attention"] * layers,
        "moe_layers": [],
        "no_rope_layers": rope or [1] * layers,
        "num_local_experts": 0,
        "rope_theta": 8e6,
        "use_qk_norm": qk_norm,
        "mlp": "feed_forward",
        "architecture": "Llama4ForCausalLM",
        **options,
    }
    sizes = {"layers": layers, "hidden": hidden, "heads": heads, "ffn": ffn, "vocab": vocab}
    path = make_checkpoint(folder, **sizes, **options)
    write_bpe(path, vocab, "llama3")
    return path


def make_pro(
    folder: Path | str,
    *,
    layers: int = 3,
    sliding: list[int] | None = None,
    window: int = 16,
    vocab: int = 512,
    nested: bool = False,
    **options: Any,
) -> Path:
    """A random checkpoint of the Pro family: `sliding` has 1 for each layer with a window."""
    kinds = ["full_attention", "sliding_attention"]
    options = {
        "architecture": "MobileLLMP1ForCausalLM",
        "model_type": "mobilellm_p1_text",
        "layer_types": [kinds[slides] for slides in sliding or [0, 1, 0]],
        "sliding_window": window,
        **options,
    }
    path = make_r1(folder, layers=layers, vocab=vocab, **options)
    write_bpe(path, vocab, "llama4")
    if nested:
        fields = json.loads((path / "config.json").read_text())
        top = {name: fields.pop(name) for name in ("architectures", "eos_token_id")}
        fields = top | {"model_type": "mobilellm_p1", "text_config": fields}
        (path / "config.json").write_text(json.dumps(fields, indent=2))
    return path


def executed(stored: Mapping[str, Any], schedule: list[int]) -> dict[str, Any]:
    """The tensors of a model without sharing that holds every executed layer of a schedule."""
    weights = {name: array for name, array in stored.items() if ".layers." not in name}
    for layer, block in enumerate(schedule):
        prefix = f"model.layers.{block}."
        for name, array in stored.items():
            if name.startswith(prefix):
                weights[f"model.layers.{layer}.{name.removeprefix(prefix)}"] = array
    return weights


def tensor_shapes(
    layers: int,
    hidden: int,
    q_rows: int,
    kv_rows: int,
    ffn: int,
    vocab: int,
    tied: bool,
    mlp: str = "mlp",
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the family's tensors, in the order of the model."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for i in range(layers):
        block = f"model.layers.{i}."
        shapes |= {
            block + "self_attn.q_proj.weight": (q_rows, hidden),
            block + "self_attn.k_proj.weight": (kv_rows, hidden),
            block + "self_attn.v_proj.weight": (kv_rows, hidden),
            block + "self_attn.o_proj.weight": (hidden, q_rows),
            block + f"{mlp}.gate_proj.weight": (ffn, hidden),
            block + f"{mlp}.up_proj.weight": (ffn, hidden),
            block + f"{mlp}.down_proj.weight": (hidden, ffn),
            block + "input_layernorm.weight": (hidden,),
            block + "post_attention_layernorm.weight": (hidden,),
        }
    shapes["model.norm.weight"] = (hidden,)
    if not tied:
        shapes["lm_head.weight"] = (vocab, hidden)
    return shapes


def random_tensor(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Float32, scaled so that logits have a deviation of about 3 at any width."""
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    array = rng.standard_normal(shape, dtype=np.float32)
    if len(shape) == 1:
        return np.float32(1.0) + np.float32(0.1) * array
    gain = 3.0 if name.startswith(("model.embed_tokens", "lm_head")) else 1.2
    return array * np.float32(gain / shape[1] ** 0.5)


def cast(array: np.ndarray, dtype: str) -> np.ndarray:
    """Float32 to the stored type, to the nearest, ties to even; BF16 as uint16."""
    if dtype != "bf16":
        return array.astype({"f32": np.float32, "f16": np.float16}[dtype])
    bits = np.ascontiguousarray(array).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    rounded[np.isnan(array)] = 0x7FC0
    return rounded


Descriptions = Mapping[str, tuple[tuple[int, ...], "np.dtype[Any]"]]


def save_safetensors(path: Path, tensors: Descriptions, arrays: Iterator[np.ndarray]) -> None:
    """Write one array after the other; the header comes from the descriptions."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (shape, dtype) in tensors.items():
        start, end = end, end + int(np.prod(shape)) * dtype.itemsize
        stored = SAFETENSORS_NAMES[dtype.name]
        header[name] = {"dtype": stored, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for array in arrays:
            file.write(np.ascontiguousarray(array).data)


def save_bin(path: Path, tensors: Descriptions, arrays: Iterator[np.ndarray]) -> None:
    """Write a state dict with torch.save."""
    import torch

    state = {}
    for name, array in zip(tensors, arrays, strict=True):
        tensor = torch.from_numpy(np.ascontiguousarray(array))
        state[name] = tensor.view(torch.bfloat16) if array.dtype == np.uint16 else tensor
    torch.save(state, path)


@functools.cache
def tokenizer_model(vocab: int, **options: Any) -> bytes:
    """A SentencePiece BPE model with `vocab` pieces, Llama's special ids and byte fallback;
    `options` are further ones of the trainer, lists as tuples.

    Up to 512 pieces are trained; more are made-up words, appended to the serialized model
    (a protobuf message may be continued by appending further entries of a repeated field).
    """
    import sentencepiece

    trained = min(vocab, 512)
    writer = io.BytesIO()
    options = {
        "model_type": "bpe",
        "byte_fallback": True,
        "split_digits": True,
        "allow_whitespace_only_pieces": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "unk_id": 0,
        "bos_id": 1,
        "eos_id": 2,
        "pad_id": -1,
        **{name: list(v) if isinstance(v, tuple) else v for name, v in options.items()},
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences()),
        model_writer=writer,
        vocab_size=trained,
        num_threads=1,
        minloglevel=2,
        **options,
    )
    model = writer.getvalue()
    for i in range(trained, vocab):
        piece = f"\u2581made{i}".encode()
        entry = b"\x0a" + bytes([len(piece)]) + piece + b"\x15" + struct.pack("<f", -float(i))
        model += b"\x0a" + bytes([len(entry)]) + entry
    return model


# The last tokens of a byte-level vocabulary, named as Llama 3 names them.
SPECIAL_TOKENS = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|pad_id|>",
    "<|reserved_special_token_0|>",
)
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
WORDS = {
    "llama3": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "llama4": r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+"
    r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}


def write_bpe(folder: Path, vocab: int, words: str) -> None:
    """Replace the tokenizer of a checkpoint by a byte-level one whose last ids are special."""
    (folder / "tokenizer.model").unlink(missing_ok=True)
    (folder / "tokenizer.json").write_text(tokenizer_json(vocab, words), encoding="utf-8")
    settings = {
        "bos_token": SPECIAL_TOKENS[0],
        "eos_token": "<|eot_id|>",
        "chat_template": CHAT_TEMPLATE,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))


@functools.cache
def tokenizer_json(vocab: int, words: str) -> str:
    """A byte-level BPE tokenizer of the tokenizers library that splits as `words` says."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from tokenizers.processors import TemplateProcessing

    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = level  # trained on whole lines: tokens would cross words
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab - len(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*sentences()[:200], *mixed_lines()], trainer)
    split = pre_tokenizers.Split(Regex(WORDS[words]), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, level])
    first = vocab - len(SPECIAL_TOKENS)
    assert tokenizer.get_vocab_size() == first
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer.post_processor = TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", first)]
    )
    return str(tokenizer.to_str())


def characters_json(
    vocab: int = 512, spaces: str = "first", added: Sequence[Any] = (), bos: bool = True
) -> dict[str, Any]:
    """The tokenizer.json that transformers makes of tokenizer_model(vocab), with further tokens.

    `spaces` is where the space before a text comes from: a normalizer ("prepend", or "replace",
    which puts none), or Metaspace with the scheme always, first or never.
    """
    from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers
    from tokenizers.processors import TemplateProcessing
    from transformers.tokenization_utils_sentencepiece import SentencePieceExtractor

    with tempfile.NamedTemporaryFile(suffix=".model") as file:
        file.write(tokenizer_model(vocab))
        file.flush()
        ids, _, merges = SentencePieceExtractor(file.name).extract()
    tokenizer = Tokenizer(
        models.BPE(ids, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    replace, prepend = normalizers.Replace(" ", "\u2581"), normalizers.Prepend("\u2581")
    if spaces == "prepend":
        tokenizer.normalizer = normalizers.Sequence([prepend, replace])
    elif spaces == "replace":
        tokenizer.normalizer = replace
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("\u2581", spaces, split=False)
    tokenizer.add_special_tokens(
        [AddedToken(t, normalized=False) for t in ("<unk>", "<s>", "</s>")]
    )
    for token in added:
        (tokenizer.add_special_tokens if token.special else tokenizer.add_tokens)([token])
    if bos:
        tokenizer.post_processor = TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    fields: dict[str, Any] = json.loads(tokenizer.to_str())
    return fields


def write_characters(folder: Path, fields: dict[str, Any], **settings: Any) -> None:
    """Replace the tokenizer of a checkpoint by a tokenizer.json, as transformers 5 saves it."""
    (folder / "tokenizer.model").unlink(missing_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(fields), encoding="utf-8")
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    settings = {"tokenizer_class": "LlamaTokenizer", "backend": "tokenizers", **names, **settings}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))


# Characters of each kind that the expressions in WORDS tell apart.
KINDS = "aAzZsStTlLéÉßẞʰªº漢म\u093f\u0301ǅ19²Ⅷ \t\r\n\u00a0/'’.-$🦙\u200d"


def mixed_lines() -> list[str]:
    """A few hundred random lines of KINDS, always the same."""
    rng = random.Random(0)
    return ["".join(rng.choices(KINDS, k=40)) for _ in range(300)]


def sentences() -> list[str]:
    """A few thousand sentences of invented words, always the same."""
    rng = random.Random(0)
    syllables = [a + b for a in "bdfghjklmnprstvwyz" for b in ("a", "e", "i", "o", "u", "an", "el")]
    words = ["".join(rng.choices(syllables, k=rng.randint(1, 3))) for _ in range(400)]
    words += [*"0123456789", "a", "I", "the", "and", "cafe", "Qu", "xc"]
    return [
        " ".join(rng.choices(words, k=rng.randint(4, 12))).capitalize() + rng.choice(".,!?;:'\"()-")
        for _ in range(2000)
    ]
