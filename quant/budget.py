"""The best mix of types that fits a number of bits: each tensor's types with what they cost.

Costs add up, so at the optimum every tensor pays about the same for its last bit: starting from the
smallest types, the step that saves most for its bits is taken first, as long as it fits.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping

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

# Bits a weight of the matrices of each recipe, the embedding included. balanced is to cost at most
# 0.03 nats: that takes a bit more where rounding is not calibrated (docs/measurements.md).
RECIPES = {"tiny": 3.5, "small": 4.5, "balanced": 5.2, "best": 6.5}
UNCALIBRATED = {**RECIPES, "balanced": 6.0}

# What a recipe may take: every type that the kernels of this package run.
CANDIDATES = (Q2_0, Q3_K, Q4_0, IQ4_NL, Q4_K, Q4_1, Q5_0, Q5_K, Q5_1, Q6_K, Q8_0)


def candidates(columns: int) -> list[TensorType]:
    """The types whose blocks divide a row of so many columns."""
    return [kind for kind in CANDIDATES if columns % kind.block == 0]


def best_mix(
    costs: Mapping[str, Mapping[TensorType, float]], sizes: Mapping[str, int], bits: float
) -> dict[str, TensorType]:
    """A type for each tensor: `costs` of its possible ones, `sizes` in weights, and the `bits` in
    all that must not be exceeded; where even the smallest types do, those are taken."""
    ladders = {name: _ladder(of) for name, of in costs.items()}
    chosen = {name: 0 for name in ladders}
    left = bits - sum(_bits(ladders[name][0]) * sizes[name] for name in ladders)
    steps: list[tuple[float, str]] = []

    def offer(name: str) -> None:
        ladder, at = ladders[name], chosen[name]
        if at + 1 < len(ladder):
            a, b = ladder[at], ladder[at + 1]
            more = (_bits(b) - _bits(a)) * sizes[name]
            heapq.heappush(steps, (-(costs[name][a] - costs[name][b]) / more, name))

    for name in ladders:
        offer(name)
    while steps:
        _, name = heapq.heappop(steps)
        a, b = ladders[name][chosen[name] : chosen[name] + 2]
        more = (_bits(b) - _bits(a)) * sizes[name]
        if more <= left:
            left -= more
            chosen[name] += 1
            offer(name)
    return {name: ladder[chosen[name]] for name, ladder in ladders.items()}


def _bits(kind: TensorType) -> float:
    return 8 * kind.block_bytes / kind.block


def _ladder(costs: Mapping[TensorType, float]) -> list[TensorType]:
    """The types on the lower convex hull of cost over bits, the smallest first."""
    hull: list[TensorType] = []
    for kind in sorted(costs, key=lambda kind: (_bits(kind), costs[kind])):
        if hull and (_bits(kind) == _bits(hull[-1]) or costs[kind] >= costs[hull[-1]]):
            continue
        while len(hull) > 1:
            a, b = hull[-2:]
            slope = (costs[a] - costs[b]) / (_bits(b) - _bits(a))
            if (costs[b] - costs[kind]) / (_bits(kind) - _bits(b)) <= slope:
                break
            hull.pop()
        hull.append(kind)
    return hull
