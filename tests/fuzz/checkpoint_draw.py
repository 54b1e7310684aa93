"""Draws edits of a checkpoint (checkpoint_edits.py); most leave files that can be parsed."""

from __future__ import annotations

import random
import struct
from typing import Any

from fuzz import strange
from fuzz.checkpoint_edits import HEADER, WIDTHS, Edit, Files, load, parse_header

# Fields that change what a config means where they appear.
FURTHER_FIELDS: dict[str, Any] = {
    "head_dim": 16,
    "rope_scaling": {"type": "linear", "factor": 2.0},
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "factor": 1},
    "partial_rotary_factor": 0.5,
    "sliding_window": 16,
    "layer_types": ["full_attention", "sliding_attention"],
    "no_rope_layers": [1, 0],
    "no_rope_layer_interval": 4,
    "use_qk_norm": True,
    "intermediate_size_mlp": 64,
    "num_local_experts": 0,
    "interleave_moe_layer_step": 1,
    "attn_temperature_tuning": False,
    "attention_chunk_size": 8192,
    "floor_scale": 8192,
    "text_config": {},
    "quantization_config": {"quant_method": "x"},
    "mlp_bias": True,
    "layer_sharing": True,
    "share_embedding": True,
    "tie_word_embeddings": True,
    "eos_token_id": [2, 3],
    "pad_token_id": 0,
    "unk_token_id": 0,
    "torch_dtype": "float8",
    "auto_map": {"AutoModel": "evil.Model"},
}
FURTHER_SETTINGS: dict[str, Any] = {
    "added_tokens_decoder": {"5": {"content": "<x>", "special": True}},
    "chat_template": "{{ messages[0].content }}",
    "add_prefix_space": False,
    "add_eos_token": True,
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": {"content": "<s>"},
}
# What takes time that grows faster than the file, or would if the expression were run.
EXPRESSIONS = [
    r"(a+)+$",
    r"(?:\p{L}+\s?)*x",
    r"^(\w|\w\w)*$",
    "(" * 500,
    "a{1000}{1000}",
    r"\p{X}",
    "",
]
NORMALIZERS = [
    {"type": "Prepend", "prepend": "x"},
    {"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": "\u2581"},
    {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
    {"type": "Sequence", "normalizers": [{"type": "NFKC"}, 7, None]},
]
FURTHER_FILES = {
    "added_tokens.json": ['{"<x>": 300}', '{"<x>": -1}', '{"<x>": 5, "<y>": 5}', "[]", '{"": 7}'],
    "chat_template.jinja": ["{{ messages[0].content }}", "\ud800", "{% for", "", "\0"],
    "generation_config.json": ['{"eos_token_id": [2, 3]}', '{"eos_token_id": [1e9, "x"]}', "["],
    "tokenizer.json": ["{}", '{"model": {"type": "BPE", "vocab": {}, "merges": []}}', "nul"],
    "model.safetensors": ["", "\0\0\0\0\0\0\0\0", "\2\0\0\0\0\0\0\0{}"],
    "pytorch_model.bin": ["", "PK\3\4", "PK\5\6" + "\0" * 18],
    "pytorch_model.bin.index.json": ['{"weight_map": {"x": "pytorch_model.bin"}}'],
    "model.safetensors.index.json": ['{"weight_map": {"x": "model.safetensors"}}'],
}
RAW = ["1e999", "-1e999", "NaN", "-Infinity", "1" * 5000, "0.1e-400", "[" * 2000, '{"a":1,"a":2}']
RAW += ['"\\ud800"', "tru", "1.", "-0", "1E5", '"\t"', "\ufeff1", "[1,]"]
GLOBALS = ["os system", "builtins eval", "builtins exec", "posix system", "torch FloatStorage"]
GLOBALS += ["torch._utils _rebuild_tensor_v2", "collections OrderedDict", "torch LongStorage"]


def draw(rng: random.Random, seed: Files) -> list[Edit]:
    """A few edits for the seed; most leave files that can be parsed."""
    makers = [config_edit] * 6 + [tokenizer_edit] * 5 + [weights_edit] * 6 + [index_edit] * 2
    makers += [file_edit] * 2 + [byte_edit]
    edits: list[Edit] = []
    while not edits or rng.random() < 0.35:
        edits += rng.choice(makers)(rng, seed)
    return edits


def some_path(rng: random.Random, tree: Any, stop: float) -> list[Any]:
    """A way from the root of a tree to some place in it."""
    path: list[Any] = []
    while isinstance(tree, (dict, list)) and tree and (not path or rng.random() > stop):
        step = rng.choice(list(tree)) if isinstance(tree, dict) else rng.randrange(len(tree))
        path.append(step)
        tree = tree[step]
    return path


def tree_edit(rng: random.Random, files: Files, name: str, stop: float = 0.2) -> list[Edit]:
    """An edit at some place of a JSON file."""
    tree = load(files, name)
    path = some_path(rng, tree, stop)
    if not path:
        return [["json", name, [], strange.json_value(rng, tree)]]
    old = tree
    for step in path:
        old = old[step]
    way = rng.random()
    if way < 0.08:
        return [["json-drop", name, path]]
    if way < 0.12:
        return [["json-raw", name, path, rng.choice(RAW)]]
    if way < 0.2 and isinstance(path[-1], str):
        return [["name", name, path, strange.text(rng, path[-1])]]
    return [["json", name, path, strange.json_value(rng, old)]]


def further(rng: random.Random, name: str, known: dict[str, Any]) -> list[Edit]:
    key, value = rng.choice(list(known.items()))
    if rng.random() < 0.4:
        value = strange.json_value(rng, value)
    elif isinstance(value, dict) and value:
        inner = rng.choice(list(value))
        value = {**value, inner: strange.json_value(rng, value[inner])}
    return [["json", name, [key], value]]


def config_edit(rng: random.Random, files: Files) -> list[Edit]:
    if rng.random() < 0.3:
        return further(rng, "config.json", FURTHER_FIELDS)
    return tree_edit(rng, files, "config.json")


def tokenizer_edit(rng: random.Random, files: Files) -> list[Edit]:
    names = [name for name in files if "token" in name or name == "generation_config.json"]
    name = rng.choice(names)
    if name == "tokenizer.json" and rng.random() < 0.4:
        return tokenizer_json_edit(rng, files)
    if name != "tokenizer.model":
        if name == "tokenizer_config.json" and rng.random() < 0.5:
            return further(rng, name, FURTHER_SETTINGS)
        return tree_edit(rng, files, name)
    way = rng.random()
    i = rng.choice([0, 1, 2, 3, rng.randrange(400)])
    if way < 0.3:
        return [["piece", i, "text", strange.text(rng, "\u2581ba")]]
    if way < 0.45:
        return [["piece", i, "score", rng.choice([0.0, -1.5, 1e38, float("nan"), float("inf")])]]
    if way < 0.6:
        return [["piece", i, "type", rng.choice([0, 1, 2, 3, 4, 5, 6, 7, -1, 2**31])]]
    if way < 0.7:
        return [[rng.choice(["piece-drop", "piece-again"]), i]]
    if way < 0.85:  # trainer: model type, byte fallback, ids of unk, bos, eos, pad
        number = rng.choice([3, 4, 35, 40, 41, 42, 43])
        return [["model", [2, number], strange.integer(rng, 2)]]
    if way < 0.95:  # normalizer: charsmap, dummy prefix, whitespace, escape; 5 is the denormalizer
        if rng.random() < 0.5:
            size = rng.choice([0, 4, 8, 64, 1024])
            raw = struct.pack("<I", rng.choice([size, 4, 2**32 - 1])) + rng.randbytes(size)
            return [["model", [rng.choice([3, 5]), 2], raw.hex()]]
        return [["model", [3, rng.choice([3, 4, 5])], rng.choice([0, 1])]]
    return [["cut", name, rng.randrange(len(files[name]))]]


def tokenizer_json_edit(rng: random.Random, files: Files) -> list[Edit]:
    name, way = "tokenizer.json", rng.random()
    if way < 0.3:
        split = {"type": "Split", "pattern": {"Regex": rng.choice(EXPRESSIONS)}}
        split |= {"behavior": "Isolated", "invert": rng.random() < 0.2}
        level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
        steps = [split, level][: rng.choice([1, 2, 2])]
        return [
            ["json", name, ["pre_tokenizer"], {"type": "Sequence", "pretokenizers": steps}],
            ["json", name, ["normalizer"], None],
        ]
    if way < 0.4:
        return [["json", name, ["normalizer"], rng.choice(NORMALIZERS)]]
    if way < 0.55:
        return [["doubled", rng.choice([3, 10, 12, 13, 16, 20])]]
    if way < 0.7:
        return [["repeat", name, ["model", "merges"], rng.choice([2, 100, 1000])]]
    token = ["added_tokens", rng.randrange(len(load(files, name)["added_tokens"]))]
    if way < 0.8:
        return [["repeat", name, [*token, "content"], rng.choice([2, 40, 100_000])]]
    flag = rng.choice(["lstrip", "rstrip", "normalized", "special", "single_word", "id"])
    return [["json", name, [*token, flag], rng.choice([True, False, True, None, 7, "x"])]]


def weights_edit(rng: random.Random, files: Files) -> list[Edit]:
    name = rng.choice([name for name in files if name.endswith((".safetensors", ".bin"))])
    if name.endswith(".bin"):
        if rng.random() < 0.3:
            at = rng.randrange(len(files[name]))
            return [["bytes", name, at, strange.raw_bytes(rng, rng.choice([1, 4, 64])).hex()]]
        if rng.random() < 0.6:
            return [["pickle", rng.randrange(400), "integer", strange.integer(rng, 32)]]
        words = [*GLOBALS, "cpu", "cuda:0", "meta", "0", "999", "../0", "x", ""]
        return [["pickle", rng.randrange(200), "text", rng.choice(words)]]
    header, _ = parse_header(files[name])
    tensor = rng.choice([key for key in header if key != "__metadata__"])
    entry = header[tensor]
    way = rng.random()
    if way < 0.15:
        return [["tensor", name, tensor, "dtype", rng.choice(list(WIDTHS))]]
    if way < 0.35:
        shape = list(entry["shape"])
        i = rng.randrange(len(shape))
        shape[i] = abs(strange.integer(rng, shape[i]))
        shape = rng.choice([shape, shape[::-1], [*shape, 1], [], shape[:1]])
        return [["tensor", name, tensor, "shape", shape]]
    if way < 0.6:
        at = rng.randrange(max(1, entry["data_offsets"][1] - entry["data_offsets"][0]))
        raw = strange.raw_bytes(rng, rng.choice([1, 2, 4, 64, 512]))
        return [["data", name, tensor, at & ~1, raw.hex()]]
    if way < 0.65:
        return [["length", name, strange.integer(rng, 500)]]
    if way < 0.8:
        return [
            ["name", name + HEADER, [tensor], rng.choice([*header, tensor + "x", "lm_head.weight"])]
        ]
    field = rng.choice(["data_offsets", "shape", "dtype"])
    path = [tensor, field]
    if field != "dtype":
        path.append(rng.randrange(len(entry[field])))
    old: Any = header
    for step in path:
        old = old[step]
    return [["json", name + HEADER, path, strange.json_value(rng, old)]]


def index_edit(rng: random.Random, files: Files) -> list[Edit]:
    names = [name for name in files if name.endswith(".index.json")]
    if not names:
        return file_edit(rng, files)
    name = names[0]
    tree = load(files, name)
    tensor = rng.choice(list(tree["weight_map"]))
    if rng.random() < 0.3:
        return tree_edit(rng, files, name, stop=0.4)
    shards = sorted(set(tree["weight_map"].values()))
    own = shards[0]
    targets = [*shards, "../" + own, "./" + own, own.upper(), own + "/", "/" + own, own + "\0"]
    targets += ["", ".", "..", "a\\b", "x.safetensors", "config.json", None, 7, [own], {}]
    return [["json", name, ["weight_map", tensor], rng.choice(targets)]]


def file_edit(rng: random.Random, files: Files) -> list[Edit]:
    way = rng.random()
    if way < 0.5:
        name = rng.choice(list(FURTHER_FILES))
        return [["file", name, rng.choice(FURTHER_FILES[name])]]
    name = rng.choice(list(files))
    if way < 0.6:
        return [["remove", name]]
    if way < 0.7:
        return [["copy", name, rng.choice([*files, *FURTHER_FILES])]]
    if way < 0.8:
        return [[rng.choice(["pipe", "folder"]), name]]
    targets = ["/dev/zero", "/dev/null", "../outside", "../../outside", "nowhere", name]
    return [["link", name, rng.choice(targets)]]


def byte_edit(rng: random.Random, files: Files) -> list[Edit]:
    name = rng.choice(list(files))
    total = len(files[name])
    way = rng.random()
    if way < 0.3:
        return [["cut", name, rng.randrange(total)]]
    if way < 0.4:
        return [["grow", name, rng.choice([1, 8, 4096])]]
    raw = strange.raw_bytes(rng, rng.choice([1, 1, 2, 4, 8]))
    return [["bytes", name, rng.randrange(min(total, 4096)), raw.hex()]]
