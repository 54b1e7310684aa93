"""Weights that lie on a lattice already: recognised in the stored floats and written as they are.

Checkpoints that were trained for few bits (ParetoQ, arXiv 2502.02631; int4 in groups of 32) are
published as floats, yet a row holds only k * step, rounded to the stored float type, for one step
and small whole numbers k. Here step and k are found again and go into a GGUF block as they are.
ggml's quantizer would choose other scales. A step must fit into FP16, the type of a block's scale,
and reproduce every weight to BOUND; what does not is on no lattice.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .rounding import SOURCES, Array, Rounder
from .types import BF16, F16, Q1_0, Q2_0, Q4_0, TensorType

BOUND = 0.004  # of a weight; one rounding to BF16 moves a weight by at most 0.0039 of it

# The lowest and highest k of a block; Q1_0 has no zero. The scale may be negative.
CODES = {Q1_0: (-1, 1), Q2_0: (-1, 2), Q4_0: (-8, 7)}
LEVELS = 8  # distinct magnitudes that a lattice can have, zero apart

# Rounding of two levels moves their ratio by up to 2 ** -7; fractions of whole numbers to 8 are
# at least 1 / 49 apart, so the whole numbers are never in doubt.
RATIO = 0.008


@dataclass
class Lattice:
    """What was found in each of n units (rows or groups): arrays of length n."""

    found: Array  # whether the unit is on a lattice
    step: Array  # float32, a value of FP16; 0 where all weights are 0
    low: Array  # the lowest and the highest k
    high: Array
    zeros: Array  # whether some weight is 0
    changed: Array  # how many weights are not k * step
    error: Array  # by how much of the weight at most

    def steps(self, kind: TensorType) -> tuple[Array, Array]:
        """The scale of each unit in blocks of `kind`, and whether they can hold the unit."""
        low, high = CODES[kind]
        upright = (self.low >= low) & (self.high <= high)
        turned = (self.low >= -high) & (self.high <= -low)
        held = self.found & (upright | turned)
        if kind is Q1_0:
            held &= ~self.zeros | (self.step == 0)
        return np.where(upright, self.step, -self.step), held


def recognise(bits: Array, source: str) -> Lattice:
    """The lattice of each unit of `bits` (units, weights), raw bits of type `source`.

    The stored levels are ascending magnitudes; k of the largest is the smallest number to 8 that
    makes those of all others whole. The unit is on a lattice if one real step gives every level
    by rounding to the type that the levels show (BF16, FP16 or float32). In its place the FP16
    number is taken that changes the fewest weights, of those nearest to what each level says.
    """
    sign = 1 << (8 * bits.itemsize - 1)
    units = np.ascontiguousarray(bits.T)  # one in each column: numpy reduces the first axis faster
    magnitudes = units & units.dtype.type(sign - 1)
    levels, complete = _levels(magnitudes, sign)
    if not complete.any():
        levels = np.zeros_like(levels[:1])  # saves the search that finds nothing
    counts = np.stack([_count(magnitudes == level) for level in levels])
    with np.errstate(all="ignore"):  # numbers too large or too small for FP16 are not found
        step, changed, error = _fit(_widen(levels, source), counts)
    found = complete & (error <= BOUND)

    # among non-negative floats, and among negative ones, bits order the magnitudes
    signed = units.view(np.int16 if bits.itemsize == 2 else np.int32)
    highest = np.maximum(signed.max(axis=0), 0).astype(units.dtype)
    lowest = units.max(axis=0)
    lowest = np.where(lowest >= sign, lowest & (sign - 1), 0).astype(units.dtype)
    per_step = np.where(found & (step > 0), step, np.float32(np.inf))
    return Lattice(
        found=found,
        step=step,
        low=-np.rint(_widen(lowest, source) / per_step),
        high=np.rint(_widen(highest, source) / per_step),
        zeros=counts.sum(axis=0) < len(units),
        changed=changed,
        error=error,
    )


def holders(bits: Array, source: str) -> set[TensorType]:
    """The block types that can hold every row of `bits` (rows, columns) on its lattice."""
    lattice = recognise(bits, source)
    return {kind for kind in CODES if _scales(bits, source, kind, lattice)[0] is not None}


def float_holders(bits: Array, source: str) -> set[TensorType]:
    """The float types that hold all of `bits` exactly: its own, and shorter ones of float32."""
    able = {SOURCES[source]}
    if source == "F32":
        if not (bits & 0xFFFF).any():
            able.add(BF16)
        values = bits.view(np.float32)
        with np.errstate(over="ignore"):
            if np.array_equal(values.astype(np.float16).astype(np.float32), values):
                able.add(F16)
    return able


@dataclass(frozen=True)
class Deviation:
    """Of `weights` that went into blocks, `different` ones differ from the stored ones, by at most
    `largest` of the weight."""

    weights: int
    different: int
    largest: float

    def plus(self, lattice: Lattice, held: Array) -> Deviation:
        """This and what the `held` units of a lattice add."""
        different = self.different + int(lattice.changed[held].sum(dtype=np.float64))
        largest = float(lattice.error[held].max(initial=self.largest))
        return Deviation(self.weights, different, largest)


class LatticeRounder(Rounder):
    """A Rounder that writes lattices into blocks as they are; threads add to `deviations`."""

    def __init__(self, deviations: list[Deviation]) -> None:
        super().__init__()
        self.deviations = deviations

    def round(
        self, bits: Array, source: str, target: TensorType, imatrix: Array | None = None
    ) -> Array:
        if target not in CODES:
            return super().round(bits, source, target, imatrix)
        blocks, deviation = pack(bits, self.widen(bits, source), source, target)
        self.deviations.append(deviation)
        return blocks


def pack(bits: Array, values: Array, source: str, kind: TensorType) -> tuple[Array, Deviation]:
    """Rows `bits` (rows, columns), as float32 `values`, in blocks of `kind`, one of their holders.

    A negative zero becomes zero.
    """
    rows, deviation = _scales(bits, source, kind, recognise(bits, source))
    assert rows is not None
    scales = rows.reshape(-1)
    per_weight = np.repeat(np.where(scales == 0, 1, scales), kind.block)
    codes = np.rint(values.reshape(-1) / per_weight).astype(np.int8)
    return blocks_of(codes, scales, kind), deviation


def blocks_of(codes: Array, scales: Array, kind: TensorType) -> Array:
    """Blocks of `kind` from the codes k of all weights, int8, and the scale of each block."""
    blocks = np.empty(scales.size, dtype=[("d", "<f2"), ("quants", "u1", 16)])
    blocks["d"] = scales
    blocks["quants"] = _QUANTS[kind](codes).reshape(-1, 16)
    return blocks


# The 16 bytes of a block after its scale d, from codes k of all its weights: weight i is k[i] * d.


def _quants_q1_0(codes: Array) -> Array:
    """A block has 128 weights; bit i % 8 of byte i // 8 is 1 for d and 0 for -d.

    byte 0: 7 6 5 4 3 2 1 0   byte 1: 15 14 13 12 11 10 9 8   …
    """
    return np.packbits(codes >= 0, bitorder="little")  # all zeros: d = 0


def _quants_q2_0(codes: Array) -> Array:
    """A block has 64 weights; k + 1 takes two bits, four neighbours are in a byte.

    byte 0: 3 3 2 2 1 1 0 0   byte 1: 7 7 6 6 5 5 4 4   …
    """
    four = (codes + 1).view("<u4")  # weight 0 in bits 0 and 1, weight 1 in bits 8 and 9, …
    quants: Array = (four | four >> 6 | four >> 12 | four >> 18).astype(np.uint8)
    return quants


def _quants_q4_0(codes: Array) -> Array:
    """A block has 32 weights; k + 8 takes four bits, the second half of the block the high ones.

    byte 0: 16 16 16 16 0 0 0 0   byte 1: 17 17 17 17 1 1 1 1   …
    """
    halves = (codes + 8).view("<u8").reshape(-1, 2, 2)
    quants: Array = (halves[:, 0] | halves[:, 1] << 4).view(np.uint8)
    return quants


_QUANTS = {Q1_0: _quants_q1_0, Q2_0: _quants_q2_0, Q4_0: _quants_q4_0}


def _scales(
    bits: Array, source: str, kind: TensorType, lattice: Lattice
) -> tuple[Array | None, Deviation]:
    """The scale of each block (rows, blocks), None where blocks of `kind` cannot hold the rows:
    each row on its `lattice`, or else, in Q4_0, each group of 32 on its own."""
    columns = bits.shape[1]
    nothing = Deviation(bits.size, 0, 0.0)
    if columns % kind.block:
        return None, nothing
    step, held = lattice.steps(kind)
    scales = np.repeat(step[:, None], columns // kind.block, axis=1)
    deviation = nothing.plus(lattice, held)
    if held.all():
        return scales, deviation
    if kind is not Q4_0:
        return None, nothing
    groups = recognise(bits[~held].reshape(-1, kind.block), source)
    step, held_groups = groups.steps(kind)
    scales[~held] = step.reshape(-1, columns // kind.block)
    return (scales if held_groups.all() else None), deviation.plus(groups, held_groups)


def _levels(magnitudes: Array, sign: int) -> tuple[Array, Array]:
    """The distinct magnitudes above zero of each column, ascending, as (levels, units), filled up
    with zeros; and whether there are no more than LEVELS."""
    one = magnitudes.dtype.type(1)
    above = np.empty_like(magnitudes)
    last = np.zeros(magnitudes.shape[1], magnitudes.dtype)
    levels: list[Array] = []
    while True:
        # whatever is not above the last level wraps around and becomes the larger
        np.subtract(magnitudes, last + one, out=above)
        nearest = above.min(axis=0)
        more = nearest < sign
        if len(levels) == LEVELS or not more.any():
            return np.array(levels or [last]), ~more
        last = np.where(more, last + one + nearest, last)
        levels.append(np.where(more, last, 0))


def _fit(values: Array, counts: Array) -> tuple[Array, Array, Array]:
    """The step of each unit from its levels (levels, units) and the weights at each, how many
    weights it changes, and by how much at most: infinite where the levels are on no lattice."""
    top = values.max(axis=0)
    ratios = values / np.where(top > 0, top, 1)
    codes = np.zeros_like(values)  # k of each level, 0 where a unit has fewer levels
    is_open: Array = top > 0
    for k in range(1, LEVELS + 1):
        _, fits = _whole(ratios[0] * np.float32(k))  # most units can do without the rest
        units = np.flatnonzero(fits & is_open)
        whole, fits = _whole(ratios[:, units] * np.float32(k))
        every = fits.all(axis=0)
        codes[:, units[every]] = whole[:, every]
        is_open[units[every]] = False

    relative, absolute = _rounding(values)
    divisor = np.where(codes > 0, codes, 1)
    least = (values * (1 - relative) - absolute) / divisor
    most = (values * (1 + relative) + absolute) / divisor
    one_step = least.max(axis=0) <= np.where(codes > 0, most, np.inf).min(axis=0)

    step, changed, error = _step(values, codes, divisor, counts)
    return step, changed, np.where(one_step & ~is_open, error, np.inf)


def _whole(ratios: Array) -> tuple[Array, Array]:
    """The nearest whole numbers, and whether they are near enough."""
    whole = np.rint(ratios)
    return whole, np.abs(ratios - whole) <= RATIO * whole


def _rounding(values: Array) -> tuple[Array, Array]:
    """How far rounding may have moved levels (levels, units): relatively and absolutely. The type
    that they were rounded to shows in their bits; float32 is allowed two roundings."""
    is_f16 = (values.astype(np.float16).astype(np.float32) == values).all(axis=0)
    is_bf16 = ((values.view(np.uint32) & 0xFFFF) == 0).all(axis=0)
    relative = np.where(is_bf16, np.float32(2**-8), np.where(is_f16, 2**-11, 2**-22))
    absolute = np.where(is_f16 & ~is_bf16, np.float32(2**-25), 0)  # FP16 subnormals
    # a product may have been rounded to float32 first
    return (relative * (1 + 2**-10)).astype(np.float32), absolute


def _step(values: Array, codes: Array, divisor: Array, counts: Array) -> tuple[Array, Array, Array]:
    """The FP16 step of each unit that keeps all weights within BOUND and changes the fewest, then
    by the least; how many it changes, and by how much at most (infinite: there is none)."""
    quotients = values / divisor
    largest = quotients.max(axis=0)
    middle = (largest + np.where(codes > 0, quotients, largest).min(axis=0)) / 2
    inverse = 1 / np.where(values > 0, values, 1)
    weights = counts.astype(np.float32)
    best = np.zeros_like(largest)
    fewest = np.full_like(largest, np.inf)
    least = np.full_like(largest, np.inf)
    off = np.empty_like(values)
    for quotient in (*quotients, middle):
        step = quotient.astype(np.float16).astype(np.float32)
        np.multiply(codes, step, out=off)
        np.abs(np.subtract(off, values, out=off), out=off)
        changed = np.multiply(weights, off > 0).sum(axis=0)
        error = np.multiply(off, inverse, out=off).max(axis=0)
        better = (error <= BOUND) & ((changed < fewest) | ((changed == fewest) & (error < least)))
        np.copyto(best, step, where=better)
        np.copyto(fewest, changed, where=better)
        np.copyto(least, error, where=better)
        if not least.any():
            break
    return best, fewest, least


def _count(mask: Array) -> Array:
    """How many are true of each column."""
    count: Array = np.add.reduce(mask.view(np.uint8), axis=0, dtype=np.uint32)
    return count


def _widen(bits: Array, source: str) -> Array:
    """A few values as float32."""
    if source == "F32":
        return bits.view(np.float32)
    if source == "F16":
        return bits.view(np.float16).astype(np.float32)
    return (bits.astype(np.uint32) << 16).view(np.float32)
