"""A GGUF file taken apart, changed and put together again, soundly or not.

An edit is a list of plain values, so that a case can be kept as JSON:

    ["set", key, type, value]       a metadata value; an array's is [item type, items]
    ["item", key, i, value]         one item of an array
    ["items", key, n]               an array cut or repeated to n items
    ["drop", key], ["again", key]   leave a pair out, write it twice
    ["name", key, new]
    ["claim", key, field, n]        field: type, items (their type) or count (also of a string's
                                    bytes); the bytes that follow stay
    ["tensor", name, field, value]  field: name, dims, type (data and offsets follow suit), offset
    ["tensor-drop", name], ["tensor-again", name, new]
    ["data", name, at, hex]         weights; at counts from the end when negative
    ["head", field, n]              field: magic, version, tensors, pairs
    ["bytes", at, hex], ["cut", n], ["grow", n]     the finished file

A lone surrogate in a text makes bytes that are no UTF-8.
"""

from __future__ import annotations

import ctypes
import functools
import math
import random
import struct
from dataclasses import dataclass, field
from typing import Any

from fuzz import strange

from mobilellm_cpp.library import lib

Edit = list[Any]

FORMATS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}  # value types of GGUF
U32, I32, F32, BOOL, STRING, ARRAY = 4, 5, 6, 7, 8, 9
N_TENSOR_TYPES = 43  # ggml's, and one that is none


@dataclass
class Pair:
    key: str
    type: int
    value: Any  # for an array [item type, items]
    claims: dict[str, int] = field(default_factory=dict)


@dataclass
class Info:
    name: str
    dims: list[int]
    type: int
    data: bytes
    offset: int | None = None  # None: where the data really is


@dataclass
class File:
    pairs: list[Pair]
    tensors: list[Info]


@functools.cache
def block(type: int) -> tuple[int, int]:
    """Weights and bytes of a block of a tensor type; (1, 1) for what is no type."""
    lib.ggml_type_size.restype = ctypes.c_size_t
    lib.ggml_blck_size.restype = ctypes.c_int64
    if not 0 <= type < N_TENSOR_TYPES - 1:
        return 1, 1
    return lib.ggml_blck_size(type) or 1, lib.ggml_type_size(type) or 1


def parse(data: bytes) -> File:
    """A sound little-endian file of version 3 and alignment 32."""
    at = 8

    def take(code: str) -> Any:
        nonlocal at
        (value,) = struct.unpack_from("<" + code, data, at)
        at += struct.calcsize("<" + code)
        return value

    def take_text() -> str:
        nonlocal at
        n = take("Q")
        at += n
        return data[at - n : at].decode()

    def take_value(type: int) -> Any:
        if type == STRING:
            return take_text()
        if type == ARRAY:
            items = take("I")
            return [items, [take_value(items) for _ in range(take("Q"))]]
        return take(FORMATS[type])

    n_tensors, n_pairs = take("Q"), take("Q")
    pairs = []
    for _ in range(n_pairs):
        key, type = take_text(), take("I")
        pairs.append(Pair(key, type, take_value(type)))
    heads = []
    for _ in range(n_tensors):
        name = take_text()
        dims = [take("Q") for _ in range(take("I"))]
        heads.append((name, dims, take("I"), take("Q")))
    start = -(-at // 32) * 32
    tensors = []
    for name, dims, type, offset in heads:
        first = start + offset
        tensors.append(Info(name, dims, type, data[first : first + size(dims, type)]))
    return File(pairs, tensors)


def size(dims: list[int], type: int) -> int:
    weights, n_bytes = block(type)
    return min(math.prod(dims) // weights * n_bytes, 1 << 20)


def put(file: File, head: dict[str, int]) -> bytes:
    def text(value: str, n: int | None = None) -> bytes:
        raw = value.encode("utf-8", "surrogatepass")
        return struct.pack("<Q", len(raw) if n is None else n) + raw

    def number(type: int, value: Any) -> bytes:
        code = FORMATS.get(type, "Q")
        if not isinstance(value, (int, float)):
            value = 0
        if code in "fd?":
            value = bool(value) if code == "?" else float(value)
            if code == "f" and math.isfinite(value) and abs(value) > 3.4028235e38:
                value = math.copysign(math.inf, value)
        else:
            bits = 8 * struct.calcsize("<" + code)
            value = (int(value) if math.isfinite(value) else 0) % (1 << bits)
            if code.islower() and value >> (bits - 1):
                value -= 1 << bits
        return struct.pack("<" + code, value)

    out = [
        head.get("magic", 0x46554747).to_bytes(4, "little"),
        struct.pack("<I", head.get("version", 3)),
        struct.pack("<Q", head.get("tensors", len(file.tensors))),
        struct.pack("<Q", head.get("pairs", len(file.pairs))),
    ]
    for pair in file.pairs:
        claims = pair.claims
        out += [text(pair.key), struct.pack("<I", claims.get("type", pair.type))]
        if pair.type == STRING:
            out.append(text(pair.value, claims.get("count")))
        elif pair.type == ARRAY:
            type, items = pair.value
            n = claims.get("count", len(items))
            out.append(struct.pack("<IQ", claims.get("items", type), n))
            out += [text(i) if type == STRING else number(type, i) for i in items]
        else:
            out.append(number(pair.type, pair.value))
    offset, body = 0, []
    for tensor in file.tensors:
        n = len(tensor.dims)
        at = offset if tensor.offset is None else tensor.offset
        out += [text(tensor.name), struct.pack(f"<I{n}Q", n, *tensor.dims)]
        out.append(struct.pack("<IQ", tensor.type, at))
        body.append(tensor.data.ljust(-(-len(tensor.data) // 32) * 32, b"\0"))
        offset += len(body[-1])
    raw = b"".join(out)
    return raw.ljust(-(-len(raw) // 32) * 32, b"\0") + b"".join(body)


def apply(seed: bytes, edits: list[Edit]) -> bytes:
    """The seed with the edits; those that do not fit (any more) do nothing."""
    file = parse(seed)
    head: dict[str, int] = {}
    last = []
    for edit in edits:
        op, *rest = edit
        if op == "head":
            head[rest[0]] = rest[1] % (1 << (32 if rest[0] in ("magic", "version") else 64))
        elif op in ("bytes", "cut", "grow"):
            last.append(edit)
        elif op == "set":
            key, type, value = rest
            found = [p for p in file.pairs if p.key == key]
            if found:
                found[0].type, found[0].value = type, value
            else:
                file.pairs.append(Pair(key, type, value))
        elif op in ("item", "items", "drop", "again", "name", "claim"):
            for pair in [p for p in file.pairs if p.key == rest[0]][:1]:
                edit_pair(file, pair, op, rest[1:])
        else:
            for tensor in [t for t in file.tensors if t.name == rest[0]][:1]:
                edit_tensor(file, tensor, op, rest[1:])
    data = put(file, head)
    for op, n, *content in last:
        if op == "bytes":
            data = data[:n] + bytes.fromhex(content[0]) + data[n + len(content[0]) // 2 :]
        else:
            data = data[:n] if op == "cut" else data + bytes(n)
    return data


def edit_pair(file: File, pair: Pair, op: str, rest: list[Any]) -> None:
    if op == "drop":
        file.pairs.remove(pair)
    elif op == "again":
        file.pairs.append(Pair(pair.key, pair.type, pair.value))
    elif op == "name":
        pair.key = rest[0]
    elif op == "claim":
        pair.claims[rest[0]] = rest[1] % (1 << (64 if rest[0] == "count" else 32))
    elif pair.type == ARRAY:
        type, items = pair.value
        if op == "items":
            n = rest[0]
            pair.value = [type, (items * (n // max(1, len(items)) + 1))[:n]]
        elif rest[0] < len(items):
            pair.value = [type, [*items[: rest[0]], rest[1], *items[rest[0] + 1 :]]]


def edit_tensor(file: File, tensor: Info, op: str, rest: list[Any]) -> None:
    if op == "tensor-drop":
        file.tensors.remove(tensor)
    elif op == "tensor-again":
        file.tensors.append(Info(rest[0], tensor.dims, tensor.type, tensor.data))
    elif op == "data":
        at, raw = rest[0] % max(1, len(tensor.data)), bytes.fromhex(rest[1])
        tensor.data = (tensor.data[:at] + raw + tensor.data[at + len(raw) :])[: len(tensor.data)]
    elif rest[0] in ("name", "offset"):
        setattr(tensor, rest[0], rest[1])
    else:
        setattr(tensor, rest[0], rest[1])
        n = size(tensor.dims, tensor.type)
        tensor.data = (tensor.data * (n // max(1, len(tensor.data)) + 1))[:n]


# Drawing edits.

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
            "gpt-4o",
            "gpt2",
            "qwen2",
            "bloom",
            "",
        ]
        edits.append(["set", ggml + "pre", STRING, rng.choice(pre)])
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
