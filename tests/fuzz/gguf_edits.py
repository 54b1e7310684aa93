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
import struct
from dataclasses import dataclass, field
from typing import Any

from mobilellm_cpp.engine.library import lib

Edit = list[Any]

FORMATS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}  # value types of GGUF
U32, F32, BOOL, STRING, ARRAY = 4, 6, 7, 8, 9
N_TENSOR_TYPES = 44  # ggml's, and one that is none


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
