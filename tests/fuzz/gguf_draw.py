"""Draws edits of a GGUF file (gguf_edits.py); most leave a file that a parser can read."""

from __future__ import annotations

import random
import struct
from typing import Any

from fuzz import strange
from fuzz.gguf_edits import (
    ARRAY,
    BOOL,
    F32,
    FORMATS,
    N_TENSOR_TYPES,
    STRING,
    U32,
    Edit,
    File,
    parse,
    put,
)

# Keys that llama.cpp reads for many architectures, with the type that it expects.
FURTHER_KEYS = {
    **dict.fromkeys(
        (
            "attention.causal",
            "attention.qk_norm",
            "attention.rope_pattern",
            "expert_weights_norm",
            "rope.scaling.finetuned",
            "swin_norm",
            "use_parallel_residual",
        ),
        BOOL,
    ),
    **dict.fromkeys(
        (
            "attention.clamp_kqv",
            "attention.max_alibi_bias",
            "attention.output_scale",
            "attention.scale",
            "attention.temperature_scale",
            "attn_logit_softcapping",
            "embedding_scale",
            "expert_weights_scale",
            "final_logit_softcapping",
            "logit_scale",
            "residual_scale",
            "rope.freq_base_swa",
            "rope.scale_linear",
            "rope.scaling.attn_factor",
            "rope.scaling.factor",
            "rope.scaling.yarn_beta_fast",
            "rope.scaling.yarn_ext_factor",
            "rope.scaling.yarn_log_multiplier",
        ),
        F32,
    ),
    **dict.fromkeys(
        (
            "attention.key_length_mla",
            "attention.key_length_swa",
            "attention.shared_kv_layers",
            "attention.sliding_window",
            "attention.sliding_window_pattern",
            "attention.temperature_length",
            "attention.value_length_swa",
            "block_schedule",
            "decoder_block_count",
            "decoder_start_token_id",
            "embedding_length_out",
            "embedding_length_per_layer_input",
            "expert_count",
            "expert_feed_forward_length",
            "expert_gating_func",
            "expert_group_count",
            "expert_group_used_count",
            "expert_shared_count",
            "expert_used_count",
            "features_length",
            "full_attention_interval",
            "interleave_moe_layer_step",
            "leading_dense_block_count",
            "moe_every_n_layers",
            "n_deepstack_layers",
            "nextn_predict_layers",
            "num_loops",
            "pooling_type",
            "rope.dimension_count_swa",
            "rope.dimension_sections",
            "rope.scaling.original_context_length",
            "ssm.conv_kernel",
            "ssm.state_size",
            "token_shift_count",
            "wkv.head_size",
        ),
        U32,
    ),
    "rope.scaling.type": STRING,
    "tensor_data_layout": STRING,
    "classifier.output_labels": STRING,
}
FURTHER_GENERAL = {
    **dict.fromkeys(
        (
            "general.alignment",
            "general.quantization_version",
            "general.sampling.top_k",
            "split.count",
            "split.no",
            "split.tensors.count",
            "tokenizer.ggml.cls_token_id",
            "tokenizer.ggml.eom_token_id",
            "tokenizer.ggml.eot_token_id",
            "tokenizer.ggml.fim_pre_token_id",
            "tokenizer.ggml.mask_token_id",
            "tokenizer.ggml.padding_token_id",
            "tokenizer.ggml.seperator_token_id",
            "tokenizer.ggml.token_type_count",
        ),
        U32,
    ),
    **dict.fromkeys(
        (
            "tokenizer.ggml.add_bos_token",
            "tokenizer.ggml.add_eos_token",
            "tokenizer.ggml.add_sep_token",
            "tokenizer.ggml.add_space_prefix",
            "tokenizer.ggml.remove_extra_whitespaces",
        ),
        BOOL,
    ),
    **dict.fromkeys(
        (
            "general.name",
            "general.type",
            "tokenizer.ggml.merges",
            "tokenizer.ggml.pre",
            "tokenizer.ggml.precompiled_charsmap",
            "tokenizer.ggml.suppress_tokens",
            "tokenizer.huggingface.json",
            "tokenizer.rwkv.world",
        ),
        STRING,
    ),
}
TEMPLATES = [
    *("", "{% for", "{{ 1 // 0 }}", "{{ x.y.z }}", "{{ messages[9].content }}", "{{ '\\0' }}"),
    *("{{ ''.__class__ }}", "{{ raise_exception('no') }}", "{{ 'a' * 100000 }}", "\ud800"),
    *("{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}", "{{ bos_token * 70 }}", "{{ cycler }}"),
    *("{% for i in range(10 ** 9) %}x{% endfor %}", "{% include 'x' %}", "{{ messages | length }}"),
]


def draw(rng: random.Random, seed: bytes) -> list[Edit]:
    """A few edits for the seed; most leave a file that a parser can read."""
    file = parse(seed)
    arch = next(p.value for p in file.pairs if p.key == "general.architecture")
    makers = [pair_edit] * 8 + [further_edit] * 3 + [array_edit] * 4 + [tensor_edit] * 5
    makers += [vocabulary_edit] * 3 + [data_edit] * 3 + [claim_edit] * 2 + [byte_edit]
    if not any(p.type == ARRAY for p in file.pairs):  # an adapter
        makers = [m for m in makers if m not in (array_edit, vocabulary_edit)]
    edits: list[Edit] = []
    for _ in range(rng.choice([1, 1, 1, 2, 2, 3, 4])):
        edits += rng.choice(makers)(rng, file, arch)
    return edits


def value_of(rng: random.Random, type: int, old: Any) -> Any:
    if type == STRING:
        return strange.text(rng, old if isinstance(old, str) else "x")
    if type == BOOL:
        return not old
    if type in (F32, 12):
        return strange.real(rng, old if isinstance(old, float) else 1.0)
    return strange.integer(rng, old if isinstance(old, int) else 2)


def pair_edit(rng: random.Random, file: File, arch: str) -> list[Edit]:
    pair = rng.choice(file.pairs)
    if pair.key.endswith("chat_template") and rng.random() < 0.8:
        return [["set", pair.key, STRING, rng.choice(TEMPLATES)]]
    way = rng.random()
    if way < 0.08:
        return [["drop", pair.key]]
    if way < 0.11:
        return [["again", pair.key]]
    if way < 0.14:
        return [["name", pair.key, rng.choice([pair.key + "x", "", arch + ".x", "a\0b"])]]
    if pair.type == ARRAY:
        return array_edit(rng, file, arch)
    if way < 0.3:  # another type
        type = rng.choice([*FORMATS, STRING])
        return [["set", pair.key, type, value_of(rng, type, pair.value)]]
    if way < 0.4 and pair.type != STRING:  # a value for each block
        items = [value_of(rng, pair.type, pair.value) for _ in range(rng.choice([0, 1, 2, 3, 600]))]
        items[:1] = [pair.value] * len(items[:1])
        return [["set", pair.key, ARRAY, [pair.type, items]]]
    return [["set", pair.key, pair.type, value_of(rng, pair.type, pair.value)]]


def further_edit(rng: random.Random, file: File, arch: str) -> list[Edit]:
    if rng.random() < 0.6:
        key, type = rng.choice(list(FURTHER_KEYS.items()))
        key = f"{arch}.{key}"
    else:
        key, type = rng.choice(list(FURTHER_GENERAL.items()))
    if rng.random() < 0.25:
        items = [value_of(rng, type, None) for _ in range(rng.choice([0, 1, 2, 4, 5]))]
        return [["set", key, ARRAY, [type, items]]]
    return [["set", key, type, value_of(rng, type, None)]]


def array_edit(rng: random.Random, file: File, arch: str) -> list[Edit]:
    pair = rng.choice([p for p in file.pairs if p.type == ARRAY])
    type, items = pair.value
    way = rng.random()
    if way < 0.3 or not items:
        n = rng.choice([0, 1, 2, 3, 259, len(items) - 1, len(items) + 1, len(items) * 2, 513])
        return [["items", pair.key, max(0, n)]]
    if way < 0.35:
        other = rng.choice([*FORMATS, STRING])
        same = all(isinstance(i, str) for i in items) == (other == STRING)
        kept = items if same else ["x" if other == STRING else 1] * len(items)
        return [["set", pair.key, ARRAY, [other, kept]]]
    edits: list[Edit] = []
    for _ in range(rng.choice([1, 1, 2, 5, 40])):
        i = rng.randrange(len(items))
        new = rng.choice(items) if rng.random() < 0.3 else value_of(rng, type, items[i])
        edits.append(["item", pair.key, i, new])
    return edits


def vocabulary_edit(rng: random.Random, file: File, arch: str) -> list[Edit]:
    """Another kind of tokenizer over the same tokens, with what it reads."""
    ggml = "tokenizer.ggml."
    tokens = next(p.value[1] for p in file.pairs if p.key == ggml + "tokens")
    model = rng.choice(["gpt2", "t5", "bert", "rwkv", "plamo2", "hybriko", "llama", "gemma4", "x"])
    edits: list[Edit] = [["set", ggml + "model", STRING, model]]
    if model == "gpt2" or rng.random() < 0.3:
        words = [rng.choice(tokens) for _ in range(rng.choice([0, 1, 2, 50]))]
        merges = [f"{word[:1]} {word[1:]}" for word in words]
        if merges and rng.random() < 0.4:
            merges[0] = rng.choice(["", " ", "a", "a b c", " b", "a ", "\ud800 b", "x" * 999])
        edits.append(["set", ggml + "merges", ARRAY, [STRING, merges]])
    if rng.random() < 0.7:
        pre = [
            "default",
            "llama3",
            "llama-bpe",
            "llama4",
            "mobilellm",
            "mobilellm-merges",
            "gpt-4o",
            "gpt2",
            "qwen2",
            "bloom",
            "",
        ]
        edits.append(["set", ggml + "pre", STRING, rng.choice(pre)])
    if rng.random() < 0.3:
        prefix = rng.choice(["none", "every", "every-once", "first", "first-once", "x"])
        edits.append(["set", "mobilellm.tokenizer.space_prefix", STRING, prefix])
    if model == "t5" or rng.random() < 0.1:
        size = rng.choice([0, 1, 3, 4, 8, 64, 1024, 1025])
        claim = rng.choice([size - 4, size, 4, 0, 8, 2**32 - 1, 2**31]) % 2**32
        raw = struct.pack("<I", claim) + rng.randbytes(size)
        edits.append(["set", ggml + "precompiled_charsmap", ARRAY, [0, list(raw[:size])]])
    for _ in range(rng.choice([0, 0, 1, 2])):
        name = rng.choice(["bos", "eos", "unknown", "padding", "cls", "mask", "eot", "fim_pre"])
        value = rng.choice([0, 1, len(tokens) - 1, len(tokens), 2**31, 2**32 - 1])
        edits.append(["set", f"{ggml}{name}_token_id", U32, value])
    return edits


def tensor_edit(rng: random.Random, file: File, arch: str) -> list[Edit]:
    tensor = rng.choice(file.tensors)
    way = rng.random()
    if way < 0.1:
        return [["tensor-drop", tensor.name]]
    if way < 0.2:
        new = rng.choice(
            [
                tensor.name.replace("blk.1", "blk.7"),
                tensor.name.removesuffix(".weight") + ".bias",
                tensor.name.removesuffix(".weight") + ".scale",
                "output.weight",
                "rope_freqs.weight",
                "x" * 64,
                tensor.name,
                "",
            ]
        )
        return [["tensor-again", tensor.name, new]]
    if way < 0.25:
        names = [rng.choice(file.tensors).name, "x", "blk.1." + "y" * 60, "blk.4294967296.attn_q"]
        return [["tensor", tensor.name, "name", rng.choice(names)]]
    if way < 0.65:
        type = rng.randrange(N_TENSOR_TYPES)
        if rng.random() < 0.3:  # all matrices alike
            return [
                ["tensor", t.name, "type", type] for t in file.tensors if len(t.dims) > 1
            ]  # fmt: skip
        return [["tensor", tensor.name, "type", type]]
    if way < 0.9:
        dims = list(tensor.dims)
        change = rng.random()
        if change < 0.5:
            i = rng.randrange(len(dims))
            dims[i] = strange.integer(rng, dims[i]) % 2**64
        elif change < 0.7:
            dims = dims[::-1]
        else:
            dims = rng.choice([[], dims[:1], [*dims, 1], [*dims, 2], [1, *dims], [*dims] * 2])
        return [["tensor", tensor.name, "dims", dims]]
    offset = rng.choice([0, 1, 32, 64, 2**20, 2**32, 2**63, 2**64 - 32])
    return [["tensor", tensor.name, "offset", offset]]


def data_edit(rng: random.Random, file: File, arch: str) -> list[Edit]:
    tensor = rng.choice(file.tensors)
    n = rng.choice([1, 2, 4, 34, 256, 4096])
    at = rng.randrange(max(1, len(tensor.data)))
    return [["data", tensor.name, at, strange.raw_bytes(rng, n).hex()]]


def claim_edit(rng: random.Random, file: File, arch: str) -> list[Edit]:
    pair = rng.choice(file.pairs)
    if rng.random() < 0.2:
        field = rng.choice(["magic", "version", "tensors", "pairs"])
        old = {"version": 3, "tensors": len(file.tensors), "pairs": len(file.pairs)}.get(field, 0)
        return [["head", field, strange.integer(rng, old)]]
    field = rng.choice(["type", "items", "count"])
    old = len(pair.value[1]) if pair.type == ARRAY else 8
    n = rng.randrange(14) if field != "count" else strange.integer(rng, old)
    return [["claim", pair.key, field, n]]


def byte_edit(rng: random.Random, file: File, arch: str) -> list[Edit]:
    total = len(put(file, {}))
    header = total - sum(-(-len(t.data) // 32) * 32 for t in file.tensors)
    way = rng.random()
    if way < 0.2:
        return [["cut", rng.randrange(total)]]
    if way < 0.3:
        return [["grow", rng.choice([1, 31, 32, 4096])]]
    raw = strange.raw_bytes(rng, rng.choice([1, 1, 2, 4, 8]))
    return [["bytes", rng.randrange(header), raw.hex()]]
