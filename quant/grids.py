"""The values that a block of each type can hold, and the search for its scales.

A group is the run of columns that share a scale (16, 32 or 64). Rows of a matrix are independent
of each other, so everything here works on many groups at once: weights come as [columns, groups]
and scales as [groups]. A group of a K-quant has a small whole number as scale, which its block's
own scale multiplies; `Grid.whole` is the range of that number, and 0 stands for types whose groups
have FP16 scales.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .types import (
    IQ4_NL,
    Q2_0,
    Q3_K,
    Q4_0,
    Q4_1,
    Q4_K,
    Q5_0,
    Q5_1,
    Q5_K,
    Q6_K,
    Q8_0,
    TensorType,
)

IQ4_NL_LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)

# The nearest level to each whole number from -128 on; where two are as near it does not matter.
_NEAREST = torch.tensor(
    [min(IQ4_NL_LEVELS, key=lambda level: abs(level - x)) for x in range(-128, 128)]
).float()
SHRINKS = torch.linspace(0.62, 1.06, 12)  # of the scale that just reaches the largest weight
ENDS = (1.0, 0.9, 0.8)  # of the lowest and of the highest weight, where there is a minimum
STEPS = torch.tensor([1.0, 0.95, 1.05, 0.9, 1.1])  # around the scale that a first search found


@dataclass(frozen=True)
class Grid:
    """Codes low to high; a weight is scale * code + minimum. IQ4_NL's codes are its levels. `whole`
    is the largest whole number of a group's scale and minimum in a block of 256, and whether it has
    a sign."""

    kind: TensorType
    group: int
    low: int
    high: int
    minimum: bool = False
    whole: int = 0
    signed: bool = True

    def codes(self, weights: Tensor, scale: Tensor, minimum: Tensor) -> Tensor:
        """The nearest code of each weight, as float32; [..., groups] all."""
        inverse = torch.where(scale == 0, scale, 1 / scale)
        exact = (weights - minimum) * inverse
        if self.kind is IQ4_NL:
            at = exact.round_().clamp_(-128, 127).add_(128).int()
            return _NEAREST.index_select(0, at.view(-1)).view(at.shape)
        return exact.round_().clamp_(self.low, self.high)

    def values(self, codes: Tensor, scale: Tensor, minimum: Tensor) -> Tensor:
        """The weights that codes stand for."""
        return scale * codes + minimum

    def fit(self, weights: Tensor, importance: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and minimum of each group with the least error under the `importance` [columns] of
        its columns: a grid of first guesses, each refitted by least squares to its codes."""
        guesses = self._guesses(weights)
        h = importance[:, None]
        best = torch.full(weights.shape[1:], torch.inf)
        scale, minimum = torch.zeros_like(best), torch.zeros_like(best)
        for first_scale, first_minimum in guesses:
            codes = self.codes(weights, first_scale, first_minimum)
            if self.minimum:
                d, m = _line(codes, weights, h)
                m = m.clamp(max=0) if self.whole else m
                d = torch.where(d > 0, d, first_scale)
            else:
                square = (h * codes * codes).sum(0)
                d = torch.where(square > 0, (h * codes * weights).sum(0) / square, first_scale)
                m = torch.zeros_like(d)
            codes = self.codes(weights, d, m)
            error = (h * (weights - d * codes - m).square()).sum(0)
            better = error < best
            best = torch.where(better, error, best)
            scale, minimum = torch.where(better, d, scale), torch.where(better, m, minimum)
        return scale, minimum

    def _guesses(self, weights: Tensor) -> list[tuple[Tensor, Tensor]]:
        if self.minimum:
            low, high = weights.amin(0), weights.amax(0)
            if self.whole:  # a K-quant's minimum has no sign: it is subtracted
                low = low.clamp(max=0)
            span = self.high - self.low
            return [
                ((b * high - a * low).clamp(min=1e-12) / span, a * low) for a in ENDS for b in ENDS
            ]
        at = weights.abs().argmax(0, keepdim=True)
        largest = weights.gather(0, at)[0]
        zero = torch.zeros_like(largest)
        lopsided = abs(self.low) != abs(self.high)
        ends = (self.low, self.high) if lopsided else (self.low,)
        return [(float(s) * largest / end, zero) for end in ends for s in SHRINKS]


GRIDS: dict[TensorType, Grid] = {
    Q2_0: Grid(Q2_0, 64, -1, 2),
    Q4_0: Grid(Q4_0, 32, -8, 7),
    Q5_0: Grid(Q5_0, 32, -16, 15),
    Q8_0: Grid(Q8_0, 32, -127, 127),
    IQ4_NL: Grid(IQ4_NL, 32, IQ4_NL_LEVELS[0], IQ4_NL_LEVELS[-1]),
    Q4_1: Grid(Q4_1, 32, 0, 15, minimum=True),
    Q5_1: Grid(Q5_1, 32, 0, 31, minimum=True),
    Q4_K: Grid(Q4_K, 32, 0, 15, minimum=True, whole=63, signed=False),
    Q5_K: Grid(Q5_K, 32, 0, 31, minimum=True, whole=63, signed=False),
    Q3_K: Grid(Q3_K, 16, -4, 3, whole=31),
    Q6_K: Grid(Q6_K, 16, -32, 31, whole=127),
}


def half(x: Tensor) -> Tensor:
    """The nearest FP16 numbers."""
    return x.half().float()


def _line(x: Tensor, y: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """Slope and offset of y over x [columns, groups] by least squares under weights h."""
    total = h.sum()
    mean_x, mean_y = (h * x).sum(0) / total, (h * y).sum(0) / total
    spread = (h * (x - mean_x).square()).sum(0)
    slope = (h * (x - mean_x) * (y - mean_y)).sum(0) / spread.clamp(min=1e-20)
    return slope, mean_y - slope * mean_x
