"""Blocks of GGUF from codes and scales: the bytes that ggml's dequantize_row_* read back.

The layouts are those of ggml-common.h; each is drawn where it is packed. q is the code counted from
the lowest one.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from .compensated import BLOCK, Rounded
from .grids import IQ4_NL_LEVELS, Grid
from .types import IQ4_NL, Q2_0, Q3_K, Q4_0, Q4_1, Q4_K, Q5_0, Q5_1, Q5_K, Q6_K, Q8_0

Array = npt.NDArray[Any]


def packed(result: Rounded) -> npt.NDArray[np.uint8]:
    """uint8 [rows, bytes of a row]."""
    grid = result.grid
    rows = len(result.codes)
    kind = grid.kind
    codes: Array = result.codes.numpy().astype(np.int16)
    codes = np.searchsorted(IQ4_NL_LEVELS, codes) if kind is IQ4_NL else codes - grid.low
    if grid.whole:
        blocks: Array = codes.reshape(-1, BLOCK).astype(np.uint8)
        assert result.whole is not None and result.outer is not None
        per_block = BLOCK // grid.group
        whole = [x.numpy().astype(np.int16).reshape(-1, per_block) for x in result.whole]
        outer = [_f16(x.numpy().reshape(-1)) for x in result.outer]
        parts = {Q3_K: _q3_k, Q4_K: _q45_k, Q5_K: _q45_k, Q6_K: _q6_k}[kind](
            grid, blocks, whole, outer
        )
    else:
        blocks = codes.reshape(-1, grid.group)
        parts = [_f16(result.scale.numpy().reshape(-1))]
        if grid.minimum:
            parts.append(_f16(result.minimum.numpy().reshape(-1)))
        if kind is Q8_0:
            parts.append((blocks + grid.low).astype(np.int8).view(np.uint8))
        elif kind is Q2_0:
            parts.append(_crumbs(blocks.astype(np.uint8).reshape(-1, 16, 4).transpose(2, 0, 1)))
        else:
            assert kind in (Q4_0, Q4_1, Q5_0, Q5_1, IQ4_NL)
            quants = blocks.astype(np.uint8)
            if kind in (Q5_0, Q5_1):  # the fifth bit of weight i is bit i of 32
                parts.append(np.packbits(quants >> 4, axis=1, bitorder="little"))
            parts.append(_nibbles(quants & 15, 16))
    return np.concatenate(parts, axis=1).reshape(rows, -1)


def _f16(values: Array) -> Array:
    return values.astype("<f2").view(np.uint8).reshape(-1, 2)


def _nibbles(quants: Array, half: int) -> Array:
    """Weights i and i + half share a byte, in each run of 2 * half."""
    pairs = quants.reshape(len(quants), -1, 2, half)
    joined: Array = pairs[:, :, 0] | pairs[:, :, 1] << 4
    return joined.reshape(len(quants), -1)


def _crumbs(four: Array) -> Array:
    """Four arrays of two bits each, the first in the lowest bits."""
    joined: Array = four[0] | four[1] << 2 | four[2] << 4 | four[3] << 6
    return joined


def _q45_k(grid: Grid, quants: Array, whole: list[Array], outer: list[Array]) -> list[Array]:
    """d, dmin, 12 bytes with 8 scales and 8 minima of 6 bits, the fifth bits, nibbles.

    bytes 0-3: scales 0-3, above them the high 2 bits of scales 4-7
    bytes 4-7: minima 0-3, above them the high 2 bits of minima 4-7
    bytes 8-11: the low 4 bits of scales 4-7, and of minima 4-7
    """
    scales, minima = (x.astype(np.uint8) for x in whole)
    six = np.concatenate(
        [
            scales[:, :4] | scales[:, 4:] >> 4 << 6,
            minima[:, :4] | minima[:, 4:] >> 4 << 6,
            scales[:, 4:] & 15 | minima[:, 4:] << 4,
        ],
        axis=1,
    )
    parts = [*outer, six]
    if grid.kind is Q5_K:  # bit i of byte j is that of weight 32 i + j
        fifth = (quants >> 4).reshape(-1, 8, 32)
        parts.append(np.packbits(fifth, axis=1, bitorder="little")[:, 0])
    return [*parts, _nibbles(quants & 15, 32)]


def _q6_k(grid: Grid, quants: Array, whole: list[Array], outer: list[Array]) -> list[Array]:
    """Low 4 bits, high 2 bits, 16 scales of 8 bits, d. In each half of 128, weights 0-31 and 64-95
    share bytes of nibbles, 32-63 and 96-127 the next; weights i, i + 32, i + 64, i + 96 a byte of
    high bits."""
    halves = quants.reshape(-1, 2, 4, 32)
    low = halves & 15
    nibbles = np.stack([low[:, :, 0] | low[:, :, 2] << 4, low[:, :, 1] | low[:, :, 3] << 4], 2)
    high = _crumbs((halves >> 4).transpose(2, 0, 1, 3))
    scales = whole[0].astype(np.int8).view(np.uint8)
    return [nibbles.reshape(-1, 128), high.reshape(-1, 64), scales, outer[0]]


def _q3_k(grid: Grid, quants: Array, whole: list[Array], outer: list[Array]) -> list[Array]:
    """High bits, low 2 bits, 12 bytes with 16 scales of 6 bits (32 added), d. Bit i of byte j of
    the high bits is that of weight 32 i + j; in each half of 128, weights j, j + 32, j + 64 and
    j + 96 share a byte of low bits.

    bytes 0-7: the low 4 bits of scales 0-7, and of scales 8-15
    bytes 8-11: the high 2 bits of scales j, j + 4, j + 8, j + 12
    """
    high = np.packbits((quants >> 2).reshape(-1, 8, 32), axis=1, bitorder="little")[:, 0]
    low = _crumbs((quants & 3).reshape(-1, 2, 4, 32).transpose(2, 0, 1, 3)).reshape(-1, 64)
    scales = (whole[0] + 32).astype(np.uint8)
    first = scales[:, :8] & 15 | (scales[:, 8:] & 15) << 4
    last = _crumbs((scales >> 4).reshape(-1, 4, 4).transpose(1, 0, 2))
    return [high, low, first, last, outer[0]]
