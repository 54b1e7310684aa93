"""Draws edits of a file that `verify` is shown with its checkpoint (gguf_edits.py): each either
spoils one thing in a way that must be found, or changes nothing that the checkpoint says."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
from fuzz.gguf_draw import FURTHER_KEYS, value_of
from fuzz.gguf_edits import ARRAY, BOOL, F32, STRING, U32, Edit, File, Info, block, parse
from gguf import GGMLQuantizationType, quantize
from mobilellm_cpp.convert.keys import KNOWN

# ggml's tensor types.
F16, Q4_0, Q8_0, BF16, Q2_0 = 1, 2, 8, 30, 42
FLOATS = {0: np.uint32, F16: np.uint16, BF16: np.uint16}
WRONG_SCALE = {Q8_0: 1.05, Q4_0: 1.4, Q2_0: 1.01}  # beyond a type's rounding; of exact files: 1.01

GGML = "tokenizer.ggml."
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)


class Drawing:
    """One drawing: the file's parts, and what stands where."""

    def __init__(self, rng: random.Random, seed: bytes) -> None:
        self.rng = rng
        self.file: File = parse(seed)
        self.pairs = {pair.key: pair for pair in self.file.pairs}
        self.arch = self.pairs["general.architecture"].value
        self.exact = "mobilellm.exact" in self.pairs

    def value(self, key: str, default: Any = None) -> Any:
        return self.pairs[key].value if key in self.pairs else default

    def items(self, key: str) -> list[Any]:
        return list(self.pairs[key].value[1])

    def matrices(self) -> list[Info]:
        return [tensor for tensor in self.file.tensors if len(tensor.dims) == 2]

    def matrix(self) -> Info:
        return self.rng.choice(self.matrices())

    def token(self, *kinds: int) -> int:
        """The id of a token of one of these kinds."""
        types = self.items(f"{GGML}token_type")
        return self.rng.choice([i for i, kind in enumerate(types) if kind in kinds])


def whole(tensor: Info, data: bytes) -> list[Edit]:
    return [["data", tensor.name, 0, data.hex()]]


# What must be found.


def one_weight(d: Drawing) -> list[Edit]:
    """A single weight, by more than rounding moves it."""
    tensor = d.rng.choice([tensor for tensor in d.file.tensors if "sinks" not in tensor.name])
    if tensor.type in FLOATS:
        values = np.frombuffer(tensor.data, FLOATS[tensor.type])
        bits = 8 * values.itemsize
        i = d.rng.randrange(len(values))
        if not int(values[i]) << 1 & ((1 << bits) - 1):  # a zero has no sign
            return one_weight(d)
        way = d.rng.random()
        new = int(values[i]) ^ (1 << d.rng.randrange(1, bits))
        if way < 0.2:  # an infinity or a NaN
            mantissa = {0: 23, F16: 10, BF16: 7}[tensor.type]
            new = (1 << bits - 1) - (1 << mantissa) + d.rng.choice([0, 1])
        raw = new.to_bytes(values.itemsize, "little")
        return [["data", tensor.name, i * values.itemsize, raw.hex()]]
    weights, size = block(tensor.type)
    at = d.rng.randrange(len(tensor.data) // size) * size
    if not any(tensor.data[at : at + 2]):
        return one_weight(d)
    place = at + d.rng.randrange(2, size)
    byte = tensor.data[place]
    if tensor.type == Q8_0:
        byte = (byte + d.rng.randrange(2, 255)) % 256
    elif tensor.type == Q4_0:
        low, high = byte % 16, byte // 16
        step = 1 if d.exact else 2
        others = [code for code in range(16) if abs(code - low) >= step]
        byte = high * 16 + d.rng.choice(others)
    else:
        byte ^= d.rng.randrange(1, 256)
    return [["data", tensor.name, place, bytes([byte]).hex()]]


def one_scale(d: Drawing) -> list[Edit]:
    """The scale of a single block."""
    tensors = [tensor for tensor in d.file.tensors if tensor.type in WRONG_SCALE]
    if not tensors:
        return one_weight(d)
    tensor = d.rng.choice(tensors)
    size = block(tensor.type)[1]
    at = d.rng.randrange(len(tensor.data) // size) * size
    scale = np.frombuffer(tensor.data[at : at + 2], np.float16)[0]
    factor = 1.01 if d.exact else WRONG_SCALE[tensor.type]
    factors = [factor, 1 / factor, 2.0, 0.5, 0.0, -1.0, np.inf, np.nan]
    if scale == 0:
        return one_scale(d)
    raw = np.float16(np.float32(scale) * np.float32(d.rng.choice(factors))).tobytes()
    return [["data", tensor.name, at, raw.hex()]]


def swapped_rows(d: Drawing) -> list[Edit]:
    tensor = d.matrix()
    n = len(tensor.data) // tensor.dims[1]
    one, other = d.rng.sample(range(tensor.dims[1]), 2)
    rows = [tensor.data[i * n : (i + 1) * n] for i in (one, other)]
    if rows[0] == rows[1]:
        return swapped_rows(d)
    edits = zip((one, other), reversed(rows), strict=True)
    return [["data", tensor.name, i * n, row.hex()] for i, row in edits]


def swapped_tensors(d: Drawing) -> list[Edit]:
    one = d.rng.choice(d.file.tensors)
    like = [
        tensor
        for tensor in d.file.tensors
        if (tensor.dims, tensor.type) == (one.dims, one.type) and tensor.data != one.data
    ]
    if not like:
        return swapped_tensors(d)
    other = d.rng.choice(like)
    return [*whole(one, other.data), *whole(other, one.data)]


def a_norm(d: Drawing) -> list[Edit]:
    tensor = d.rng.choice([t for t in d.file.tensors if len(t.dims) == 1 and "sinks" not in t.name])
    values = np.frombuffer(tensor.data, np.float32)
    factor = d.rng.choice([1.001, 0.5, -1.0, 0.0, np.nan])
    return whole(tensor, (values * np.float32(factor)).astype(np.float32).tobytes())


def a_number(d: Drawing) -> list[Edit]:
    """A value of the architecture's own keys."""
    numbers = [p for p in d.file.pairs if p.key.startswith(f"{d.arch}.") and p.type in (U32, F32)]
    pair = d.rng.choice(numbers)
    if pair.type == F32:
        new = d.rng.choice([pair.value * 1.001, pair.value * 2, 0.0, -1.0, 1e30, float("nan")])
    else:
        new = d.rng.choice([pair.value + 1, pair.value - 1, pair.value * 2, 0, 2**31, 2**32 - 1])
    return [["set", pair.key, pair.type, new]]


def a_layer(d: Drawing) -> list[Edit]:
    """One entry of what is said layer by layer, or whether q and k are normed."""
    own = [p for p in d.file.pairs if p.key.startswith(f"{d.arch}.") and p.type in (ARRAY, BOOL)]
    own = [pair for pair in own if pair.key != "mobilellm.exact"]
    if not own:
        return a_number(d)
    pair = d.rng.choice(own)
    if pair.type == BOOL:
        return [["set", pair.key, BOOL, not pair.value]]
    type, items = pair.value
    i = d.rng.randrange(len(items))
    new = not items[i] if type == BOOL else (items[i] + 1) % (max(items) + 1)
    cut = [["items", pair.key, d.rng.choice([len(items) - 1, len(items) + 1])]]
    return cut if d.rng.random() < 0.2 else [["item", pair.key, i, new]]


def a_missing_key(d: Drawing) -> list[Edit]:
    """One whose default is another value."""
    defaults = {"rope.freq_base": 10000.0, "attention.qk_norm": False}
    needed = [
        *("context_length", "embedding_length", "feed_forward_length", "block_count"),
        *("attention.head_count", "attention.layer_norm_rms_epsilon", "block_schedule"),
        *(key for key, default in defaults.items() if d.value(f"{d.arch}.{key}") != default),
    ]
    keys = [f"{d.arch}.{key}" for key in needed if f"{d.arch}.{key}" in d.pairs]
    tokenizer = [f"{GGML}{key}" for key in ("model", "tokens", "token_type", "scores", "merges")]
    return [["drop", d.rng.choice([*keys, *(key for key in tokenizer if key in d.pairs)])]]


def a_strange_key(d: Drawing) -> list[Edit]:
    """One that llama.cpp reads for other models."""
    key, type = d.rng.choice(
        [item for item in FURTHER_KEYS.items() if "{arch}." + item[0] not in KNOWN]
    )
    return [["set", f"{d.arch}.{key}", type, value_of(d.rng, type, None)]]


def token_texts(d: Drawing) -> list[Edit]:
    one, other = d.token(NORMAL, CONTROL), d.token(NORMAL)
    texts = d.items(f"{GGML}tokens")
    if one == other:
        return token_texts(d)
    if d.rng.random() < 0.5:
        return [["item", f"{GGML}tokens", one, texts[one] + "x" * 9]]
    return [
        ["item", f"{GGML}tokens", one, texts[other]],
        ["item", f"{GGML}tokens", other, texts[one]],
    ]


def a_kind(d: Drawing) -> list[Edit]:
    i = d.rng.randrange(len(d.items(f"{GGML}tokens")))
    kind = d.items(f"{GGML}token_type")[i]
    others = [k for k in range(8) if k not in (kind, CONTROL)]
    return [["item", f"{GGML}token_type", i, d.rng.choice(others)]]


def a_score_or_merge(d: Drawing) -> list[Edit]:
    if f"{GGML}scores" in d.pairs:
        i = d.token(NORMAL)
        score = d.items(f"{GGML}scores")[i]
        new = d.rng.choice([score + 1, score - 1, score + 0.5, 0.25, 1e9, float("nan")])
        return [["item", f"{GGML}scores", i, new]]
    key = f"{GGML}merges"
    merges = d.items(key)
    i = d.rng.randrange(len(merges) - 1)
    if d.rng.random() < 0.5:
        return [["items", key, d.rng.choice([i, len(merges) - 1])]]
    return [["item", key, i, merges[i + 1]], ["item", key, i + 1, merges[i]]]


def an_id(d: Drawing) -> list[Edit]:
    """Another token in a place with a meaning."""
    name = d.rng.choice(["bos", "eos", "unknown", "padding", "eot", "eom", "fim_pad", "fim_rep"])
    key = f"{GGML}{name}_token_id"
    old = d.value(key)
    others = [i for i in (d.token(NORMAL), d.token(NORMAL), 3, 4) if i != old]
    return [["set", key, U32, d.rng.choice(others)]]


def around_a_text(d: Drawing) -> list[Edit]:
    """What is put before and after a text, or made of a conversation."""
    if "tokenizer.chat_template" in d.pairs and d.rng.random() < 0.4:
        template = d.value("tokenizer.chat_template")
        new = d.rng.choice([template + " ", template.replace("user", "x"), "", "{{ messages }}"])
        if new == template or d.rng.random() < 0.2:
            return [["drop", "tokenizer.chat_template"]]
        return [["set", "tokenizer.chat_template", STRING, new]]
    name = d.rng.choice(["add_bos_token", "add_eos_token", "add_space_prefix"])
    ours = "mobilellm.tokenizer.space_prefix" in d.pairs  # goes before llama.cpp's
    if name == "add_space_prefix" and (ours or d.value(f"{GGML}model") != "llama"):
        name = "add_bos_token"
    return [["set", f"{GGML}{name}", BOOL, not d.value(f"{GGML}{name}", True)]]


def another_kind(d: Drawing) -> list[Edit]:
    """An architecture or a tokenizer that is not this one. (Other ways to split words show only
    where a vocabulary has words, which these hardly have.)"""
    if d.rng.random() < 0.4:
        others = [a for a in ("llama", "qwen2", "mistral3", "gemma", "x") if a != d.arch]
        return [["set", "general.architecture", STRING, d.rng.choice(others)]]
    others = [m for m in ("llama", "gpt2", "t5", "bert", "x") if m != d.value(f"{GGML}model")]
    return [["set", f"{GGML}model", STRING, d.rng.choice(others)]]


def a_lie(d: Drawing) -> list[Edit]:
    """A rounded file that says it is exact."""
    rounded = {tensor.type for tensor in d.file.tensors} & {Q8_0, Q4_0}
    if d.exact or not rounded:
        return one_weight(d)
    return [["set", "mobilellm.exact", BOOL, True]]


SPOIL: list[Callable[[Drawing], list[Edit]]] = [
    *([one_weight] * 4),
    *([one_scale] * 3),
    swapped_rows,
    swapped_tensors,
    a_norm,
    *([a_number] * 3),
    *([a_layer] * 2),
    a_missing_key,
    a_strange_key,
    *([token_texts] * 2),
    *([a_kind] * 2),
    *([a_score_or_merge] * 2),
    *([an_id] * 2),
    *([around_a_text] * 2),
    another_kind,
    a_lie,
]


# What must not be taken for a fault.


def a_remark(d: Drawing) -> list[Edit]:
    key = d.rng.choice(["general.name", "general.author", "general.x", "custom.key", "tokenizer.x"])
    texts = ["", "x", "\u00e9 \U0001f600", "y" * 300]
    if d.rng.random() < 0.3:
        return [["set", "general.file_type", U32, d.rng.randrange(40)]]
    return [["set", key, STRING, d.rng.choice(texts)]]


def a_default(d: Drawing) -> list[Edit]:
    """A key that says what llama.cpp takes without it."""
    head_size = d.value(f"{d.arch}.embedding_length") // d.value(f"{d.arch}.attention.head_count")
    defaults = {
        f"{d.arch}.rope.freq_base": 10000.0,
        f"{d.arch}.attention.key_length": head_size,
        f"{d.arch}.attention.value_length": head_size,
        f"{d.arch}.vocab_size": len(d.items(f"{GGML}tokens")),
        "mobilellm.exact": True,
    }
    if d.value(f"{GGML}model") == "llama":
        defaults |= {f"{GGML}bos_token_id": 1, f"{GGML}unknown_token_id": 0}
        defaults[f"{GGML}add_space_prefix"] = True
    if d.arch == "llama" and "rope.dimension_count" in d.pairs:
        defaults[f"{d.arch}.rope.dimension_count"] = head_size
    keys = [key for key, value in defaults.items() if d.value(key) == value]
    return [["drop", d.rng.choice(keys)]] if keys else a_remark(d)


def another_rounding(d: Drawing) -> list[Edit]:
    """A matrix in another type, rounded from the weights as they were."""
    tensors = [tensor for tensor in d.matrices() if tensor.type == 0]
    if not tensors or d.exact:
        return a_remark(d)
    tensor = d.rng.choice(tensors)
    values = np.frombuffer(tensor.data, np.float32).reshape(tensor.dims[::-1])
    kind = d.rng.choice(["F16", "BF16", "Q8_0", "Q4_0", "Q5_0", "Q5_1", "Q4_1"])
    number = GGMLQuantizationType[kind]
    data = quantize(values, number).tobytes()
    return [["tensor", tensor.name, "type", int(number)], *whole(tensor, data)]


def an_unused_id(d: Drawing) -> list[Edit]:
    name = d.rng.choice(["fim_pre", "fim_suf", "fim_mid", "mask", "seperator", "cls"])
    return [["set", f"{GGML}{name}_token_id", U32, d.token(NORMAL)]]


def more_bytes(d: Drawing) -> list[Edit]:
    return [["grow", d.rng.choice([1, 31, 32, 4096])]]


HARMLESS: list[Callable[[Drawing], list[Edit]]] = [
    *([a_remark] * 2),
    *([a_default] * 3),
    *([another_rounding] * 3),
    an_unused_id,
    more_bytes,
]


def draw(rng: random.Random, seed: bytes) -> tuple[list[Edit], bool]:
    """The edits, and whether they are harmless."""
    drawing = Drawing(rng, seed)
    if rng.random() < 0.3:
        edits: list[Edit] = []
        for maker in rng.sample(HARMLESS, rng.choice([1, 1, 2, 3])):
            edits += maker(drawing)
        return edits, True
    return rng.choice(SPOIL)(drawing), False
