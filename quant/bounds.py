"""How far a rounded weight may lie from the original, by the type that it was rounded to.

What a type's rounding does to the *original* weights is bounded, never what the file's own scales
would allow: a block with a wrong scale is outside of its bound.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .lattice import BOUND
from .rounding import Array

# A scale d is stored in F16: rounding moves it by 2^-11 of itself, below 2^-14 by at most 2^-25.
SCALE, SMALL_SCALE = 2.0**-11, 2.0**-25
FLOATS = ("f32", "f16", "bf16")
SLACK = 1 + 1e-5  # for the float32 arithmetic of the rounding itself

EXACT = BOUND * SLACK


def bound(kind: str, weights: Array, exact: bool = False) -> Array | None:
    """The largest error of each of `weights` [rows, columns] that is rounding to ggml's type
    `kind`, such as "q8_0"; None for a type whose rounding is not known here. In an `exact` file
    floats are as they were, and a weight in a block moves by a share of itself alone."""
    if exact:
        allowed: Array = np.abs(weights) * np.float32(0 if kind in FLOATS else EXACT)
        return allowed
    rule = _RULES.get(kind)
    return None if rule is None else rule(weights)


def _f32(weights: Array) -> Array:
    return np.zeros_like(weights)


def _f16(weights: Array) -> Array:
    """The distance to the nearest F16 number: none where there is one."""
    with np.errstate(over="ignore"):
        return np.abs(weights.astype(np.float16).astype(np.float32) - weights)


def _bf16(weights: Array) -> Array:
    """The distance to the nearest BF16 number; subnormal ones may become zero."""
    bits = weights.view(np.uint32)
    nearest = (bits + (0x7FFF + ((bits >> 16) & 1))) & 0xFFFF0000
    tiny = np.where(np.abs(weights) < 2.0**-126, np.abs(weights), 0)
    return np.maximum(np.abs(nearest.view(np.float32) - weights), tiny)


def _q8_0(weights: Array) -> Array:
    """Blocks of 32: d = max|w| / 127, and w is rounded to a whole number of d."""
    d = _largest(weights, 32) / 127
    return _spread(0.5 * d + 127 * _scale_error(d), weights)


def _q4_0(weights: Array) -> Array:
    """Blocks of 32: d = max|w| / 8 with the sign that makes the largest weight -8 d; the others
    are rounded to -8 d ... 7 d, so one near the other end moves by up to a whole d."""
    d = _largest(weights, 32) / 8
    sizes = np.abs(weights).reshape(*d.shape[:-1], 32)
    steps: Array = np.maximum(0.5 * d, sizes - 7 * d) + 8 * _scale_error(d)
    return _slack(steps, weights)


def _q6_K(weights: Array) -> Array:
    """Sixteen blocks of 16 in one of 256: the scale of a block is about d = max|w| / 32 and itself
    rounded to a 128th of the largest. Numbers go from -32 to 31 of it, and the search for the best
    scale leaves some of the largest weights beyond the end: up to two steps, as measured."""
    d = _largest(weights, 16) / 32
    largest = _largest(weights, 256) / 32
    sizes = np.abs(weights).reshape(*d.shape[:-1], 16)
    steps: Array = np.where(sizes > 28 * d, np.float32(2.2), np.float32(0.55)) * d
    scale = 32 * (0.51 * largest / 128 + 128 * _scale_error(largest / 128))
    return _slack(steps + scale.repeat(16, axis=1), weights)


def _q2_0(weights: Array) -> Array:
    """Blocks of 64: d = max|w|, and w is rounded to a whole number of d."""
    d = _largest(weights, 64)
    return _spread(0.5 * d + _scale_error(d), weights)


def _q1_0(weights: Array) -> Array:
    """Blocks of 128: d = mean|w|, and of w only the sign stays."""
    blocks = np.abs(weights).reshape(len(weights), -1, 128)
    d = blocks.mean(axis=2, keepdims=True, dtype=np.float32)
    steps: Array = np.abs(blocks - d) + _scale_error(d)
    return _slack(steps, weights)


_RULES: dict[str, Callable[[Array], Array]] = {
    "f32": _f32,
    "f16": _f16,
    "bf16": _bf16,
    "q8_0": _q8_0,
    "q4_0": _q4_0,
    "q6_K": _q6_K,
    "q2_0": _q2_0,
    "q1_0": _q1_0,
}


def _largest(weights: Array, block: int) -> Array:
    """[rows, blocks, 1]: the largest magnitude of each block."""
    largest: Array = np.abs(weights).reshape(len(weights), -1, block).max(axis=2, keepdims=True)
    return largest


def _scale_error(d: Array) -> Array:
    error: Array = np.maximum(d * np.float32(SCALE), np.float32(SMALL_SCALE))
    return error


def _spread(per_block: Array, weights: Array) -> Array:
    """The number of each block for each of its weights."""
    return _slack(per_block.repeat(weights.shape[1] // per_block.shape[1], axis=2), weights)


def _slack(steps: Array, weights: Array) -> Array:
    allowed: Array = steps.reshape(weights.shape) * np.float32(SLACK)
    return allowed
