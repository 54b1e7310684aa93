"""Weights with the scales of quantization-aware training beside them: k * scale, k from -8 to 7.

torchao's fake quantizer (torchao/quantization/qat, symmetric int4) computes with

    clamp(round(w * (1 / scale)), -8, 7) * scale

for each row or each group of columns, while the checkpoint keeps w. Here k is found in the same
way, and goes with the scale into a Q4_0 block as it is.
"""

from __future__ import annotations

import numpy as np

from .lattice import BOUND, CODES, Deviation, blocks_of
from .rounding import Array
from .types import Q4_0

# A scale is one of four bits if no larger share of the weights is beyond -8 ... 7 of it. Training
# cuts off a few percent; of eight bits four in five weights are beyond.
BEYOND = 0.25


def scales_per_block(scale: Array, rows: int, columns: int) -> Array | None:
    """float32 [rows, blocks of Q4_0] from scales [rows], [rows, 1] or [rows, groups]; None where
    the groups are of another size than whole blocks."""
    groups = scale.size // rows if rows else 0
    if groups < 1 or scale.size != rows * groups or columns % (groups * Q4_0.block):
        return None
    return np.repeat(scale.reshape(rows, groups), columns // groups // Q4_0.block, axis=1)


def fits(values: Array, scales: Array, types: tuple[str, str]) -> bool:
    """Whether rows `values` [rows, columns] are of four bits at `scales` [rows, blocks], and FP16,
    the type of a block's scale, can hold those."""
    with np.errstate(all="ignore"):
        stored = scales.astype(np.float16).astype(np.float32)
        near = np.abs(stored - scales) <= BOUND * scales
        beyond = np.abs(_quotients(values, scales, types)) > 8.5
    return bool((scales > 0).all() and near.all() and beyond.mean() <= BEYOND)


def pack(values: Array, scales: Array, types: tuple[str, str]) -> tuple[Array, Deviation]:
    """Rows in blocks of Q4_0, and what the rounding of scales to FP16 changes; `types` are those
    of weights and scales in the checkpoint."""
    low, high = CODES[Q4_0]
    codes = np.clip(np.rint(_quotients(values, scales, types)), low, high).astype(np.int8)
    stored = scales.astype(np.float16).astype(np.float32)
    different = np.count_nonzero(codes, axis=2)[stored != scales].sum()
    error = float((np.abs(stored - scales) / scales).max())
    deviation = Deviation(values.size, int(different), error)
    return blocks_of(codes.reshape(-1), stored.reshape(-1), Q4_0), deviation


def _quotients(values: Array, scales: Array, types: tuple[str, str]) -> Array:
    """w * (1 / scale) [rows, blocks, 32], in BF16 where torch computes it so: weights and scales
    both are."""
    inverse = np.float32(1) / scales
    in_bf16 = types == ("BF16", "BF16")
    if in_bf16:
        inverse = _bf16(inverse)
    products: Array = values.reshape(*scales.shape, Q4_0.block) * inverse[..., None]
    return _bf16(products) if in_bf16 else products


def _bf16(values: Array) -> Array:
    """The nearest BF16 numbers, ties to even."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded: Array = (bits + (0x7FFF + ((bits >> 16) & 1))) & np.uint32(0xFFFF0000)
    return rounded.view(np.float32)
