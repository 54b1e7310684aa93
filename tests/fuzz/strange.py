"""Values that readers of files stumble over, made from the value that stood there."""

from __future__ import annotations

import random
from typing import Any

INTEGERS = [
    *(0, 1, 2, 3, 4, 7, 8, 15, 16, 31, 32, 33, 63, 64, 100, 255, 256, 511, 512, 513, 1000),
    *(2**15, 2**16, 10**6, 2**24, 2**28, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**53, 2**62),
    *(2**63 - 1, 2**63, 2**64 - 1, -1, -2, -(2**31), -(2**63)),
]
FLOATS = [
    *(0.0, -0.0, 1.0, -1.0, 0.5, 1e-5, 1e-38, 1e-45, 1e-300, 1e5, 1e38, 3.4e38, 1e39, 1e308),
    *(float("inf"), float("-inf"), float("nan")),
]
TEXTS = [
    *("", " ", "\0", "a\nb", "\x1b[31mred", "%s%n", "..", "../up", "/etc/passwd", "~", "\ud800"),
    *("default", "linear", "yarn", "longrope", "none", "llama3", "dynamic", "gelu", "silu"),
    *("llama", "mobilellm", "gpt2", "bert", "t5", "rwkv", "plamo2", "no_vocab", "qwen2", "gemma3"),
    *("LlamaForCausalLM", "MobileLLMForCausalLM", "Llama4ForCausalLM", "MobileLLMP1ForCausalLM"),
    *("llama-bpe", "llama4", "full_attention", "sliding_attention", "F8_E4M3", "float16"),
    *("<s>", "</s>", "<0x0A>", "\u2581", "\u2581a", "\ufffd", "\U0001f600", "x" * 5000),
]


def integer(rng: random.Random, old: int) -> int:
    near = [old + 1, old - 1, old * 2, old // 2, old * 3, -old, old + 2**32, old ^ 1]
    return rng.choice(near if rng.random() < 0.5 else INTEGERS)


def real(rng: random.Random, old: float) -> float:
    return rng.choice([old * 2, -old, old / 2, old * 1e30] if rng.random() < 0.3 else FLOATS)


def text(rng: random.Random, old: str) -> str:
    kind = rng.random()
    if kind < 0.7 or not old:
        return rng.choice(TEXTS)
    at = rng.randrange(len(old))
    return old[:at] + rng.choice(["", old[at] * 2, "\0", "x", "\u2581", old]) + old[at + 1 :]


def json_value(rng: random.Random, old: Any) -> Any:
    """Another value for a place in a JSON file: mostly one of the same kind."""
    if rng.random() < 0.25:
        old = rng.choice([None, True, False, 0, 1.5, "x", [], {}, [old], {"a": old}])
        if rng.random() < 0.5:
            return old
    if isinstance(old, bool) or old is None:
        return rng.choice([True, False, None, 0, 1, "true", [], {}])
    if isinstance(old, int):
        return integer(rng, old) if rng.random() < 0.8 else float(old)
    if isinstance(old, float):
        return real(rng, old)
    if isinstance(old, str):
        return text(rng, old)
    if isinstance(old, list):
        changes = [[], old[:-1], old + old[:1], old[::-1], old * 3, [None, *old], [old]]
        return rng.choice(changes)
    return rng.choice([{}, None, [], list(old), dict(list(old.items())[:-1]), {**old, "": 0}])


def raw_bytes(rng: random.Random, n: int) -> bytes:
    """n bytes: a pattern that means something to floats and counts, or noise."""
    patterns = [b"\0", b"\xff", b"\x7f", b"\x80", b"\x00\x00\xc0\x7f", b"\x00\x7c", b"\x80\x7f"]
    if rng.random() < 0.6:
        return (rng.choice(patterns) * n)[:n]
    return rng.randbytes(n)
