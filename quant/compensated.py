"""Rounding of a matrix so that its products with real inputs stay what they were.

For inputs with second moments H the error of a rounded row q is (w - q) H (w - q)'. GPTQ (Frantar
et al. 2022, arXiv 2210.17323) rounds column by column and lets the columns that are still to come
make up for each error. What is added here: the scales of each group are chosen by trying several
through that very procedure; afterwards single codes (Behdin et al. 2023, QuantEase, arXiv
2309.01885) and all scales of a row together are improved in turn, each step exactly under H.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .grids import STEPS, Grid, half

DAMPING = 0.01  # of the mean of H's diagonal, added to it
BLOCK = 256  # columns of a K-quant's block
ROUNDS = 2  # of codes and scales in turn after the first rounding


@dataclass
class Rounded:
    """A rounded matrix [rows, columns]: `codes` int8 or uint8 numbers as float32, `scale` and
    `minimum` [rows, groups] as they take effect; for K-quants also the whole numbers of each group
    and the FP16 scales [rows, blocks] that multiply them."""

    grid: Grid
    codes: Tensor
    scale: Tensor
    minimum: Tensor
    whole: tuple[Tensor, Tensor] | None = None
    outer: tuple[Tensor, Tensor] | None = None

    def values(self) -> Tensor:
        """The weights [rows, columns]."""
        n = self.grid.group
        scale, minimum = (x.repeat_interleave(n, 1) for x in (self.scale, self.minimum))
        return self.grid.values(self.codes, scale, minimum)


def damped(h: Tensor) -> Tensor:
    """H with a little added to its diagonal, so that it can be inverted; columns whose input is
    always zero count like the others."""
    mean = h.diagonal().mean().clamp(min=1e-12)
    return h + torch.eye(len(h)) * mean * DAMPING


def rounded(weights: Tensor, h: Tensor, grid: Grid, rounds: int = ROUNDS) -> Rounded:
    """The matrix on the grid of a type, under second moments `h` [columns, columns], damped."""
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    result = _sequential(weights, upper, grid)
    for _ in range(rounds):
        _improve_codes(result, weights, h)
        if not grid.whole:
            _improve_scales(result, weights, h)
    if rounds:
        _improve_codes(result, weights, h)
    return result


def _sequential(weights: Tensor, upper: Tensor, grid: Grid) -> Rounded:
    """GPTQ; `upper` is the Cholesky factor U of H's inverse, U'U."""
    rows, columns = weights.shape
    left = weights.T.contiguous()  # [columns, rows]: what is still to be rounded
    importance = upper.diagonal().square().reciprocal()
    n, groups = grid.group, columns // grid.group
    codes = torch.empty(columns, rows)
    scale, minimum = torch.empty(groups, rows), torch.empty(groups, rows)
    wholes = (torch.empty(groups, rows), torch.empty(groups, rows)) if grid.whole else None
    outers: tuple[list[Tensor], list[Tensor]] = ([], [])
    for g in range(groups):
        a, b = g * n, (g + 1) * n
        if grid.whole and a % BLOCK == 0:
            for part, found in zip(outers, _outer_scales(left, importance, grid, a), strict=True):
                part.append(found)
        d, m = grid.fit(left[a:b], importance[a:b])
        if wholes is None:
            tries = _tries(grid, d, m)
        else:
            d, m, *numbers = _whole_tries(grid, d, m, outers[0][-1], outers[1][-1])
            tries = d, m
        found_codes, errors, best = _try(left[a:b], upper[a:b, a:b], grid, *tries)
        codes[a:b] = found_codes
        scale[g], minimum[g] = (x.gather(0, best)[0] for x in tries)
        if wholes is not None:
            for whole, number in zip(wholes, numbers, strict=True):
                whole[g] = number.gather(0, best)[0]
        left[b:] -= upper[a:b, b:].T @ errors
    result = Rounded(grid, codes.T.contiguous(), scale.T.contiguous(), minimum.T.contiguous())
    if wholes is not None:
        result.whole = (wholes[0].T.contiguous(), wholes[1].T.contiguous())
        result.outer = (torch.stack(outers[0], 1), torch.stack(outers[1], 1))
    return result


def _try(
    weights: Tensor, upper: Tensor, grid: Grid, scale: Tensor, minimum: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Rounds the columns of one group [columns, rows] with each of several scales [tries, rows]:
    the codes and errors (over the diagonal of U) of the best try of each row, and which it was."""
    tries = len(scale)
    left = weights[:, None].repeat(1, tries, 1)
    codes, errors = torch.empty_like(left), torch.empty_like(left)
    for j in range(len(left)):
        codes[j] = grid.codes(left[j].clone(), scale, minimum)
        errors[j] = (left[j] - grid.values(codes[j], scale, minimum)) / upper[j, j]
        if j + 1 < len(left):
            left[j + 1 :] -= upper[j, j + 1 :, None, None] * errors[j]
    best = errors.square().sum(0).argmin(0, keepdim=True)  # [1, rows]
    at = best.expand(len(left), 1, -1) if best.dim() == 3 else best[None].expand(len(left), 1, -1)
    return codes.gather(1, at)[:, 0], errors.gather(1, at)[:, 0], best


def _tries(grid: Grid, scale: Tensor, minimum: Tensor) -> tuple[Tensor, Tensor]:
    """Scales around the one that was found; with a minimum the middle of the range stays."""
    scales = half(STEPS[:, None] * scale)
    middle = (grid.low + grid.high) / 2 if grid.minimum else 0.0
    return scales, half(minimum + middle * (scale - scales)) if grid.minimum else scales * 0


def _outer_scales(left: Tensor, importance: Tensor, grid: Grid, a: int) -> tuple[Tensor, Tensor]:
    """FP16 scales of a K-quant's block for the scales and the minima of its groups."""
    found = [
        grid.fit(left[at : at + grid.group], importance[at : at + grid.group])
        for at in range(a, a + BLOCK, grid.group)
    ]
    scales = torch.stack([d for d, _ in found])
    at = scales.abs().argmax(0, keepdim=True)
    largest = scales.gather(0, at)[0]
    lowest = torch.stack([m for _, m in found]).amin(0)
    return half(largest / grid.whole), half(-lowest / grid.whole)


def _whole_tries(
    grid: Grid, scale: Tensor, minimum: Tensor, outer: Tensor, outer_minimum: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scales and minima near those found that are whole multiples of the block's, and these whole
    numbers; [tries, rows] all."""
    low = -grid.whole if grid.signed else 0

    def near(x: Tensor, unit: Tensor, least: int, steps: Tensor) -> Tensor:
        number = torch.where(unit == 0, unit, x / unit).round()
        return (number + steps[:, None]).clamp(least, grid.whole)

    if grid.minimum:
        steps = torch.cartesian_prod(torch.tensor([0.0, -1, 1]), torch.tensor([0.0, -1, 1]))
        number = near(scale, outer, low, steps[:, 0])
        number_minimum = near(-minimum, outer_minimum, 0, steps[:, 1])
    else:
        number = near(scale, outer, low, torch.tensor([0.0, -1, 1, -2, 2]))
        number_minimum = torch.zeros_like(number)
    return number * outer, -number_minimum * outer_minimum, number, number_minimum


def _improve_codes(result: Rounded, weights: Tensor, h: Tensor, width: int = 64) -> None:
    """Rounds each column anew, in turn, given all others: coordinate descent under H."""
    grid = result.grid
    scale = result.scale.repeat_interleave(grid.group, 1).T.contiguous()
    minimum = result.minimum.repeat_interleave(grid.group, 1).T.contiguous()
    codes = result.codes.T.contiguous()
    values = grid.values(codes, scale, minimum)  # [columns, rows]
    gradient = h @ (weights.T - values)
    for a in range(0, len(codes), width):
        b = min(a + width, len(codes))
        part = gradient[a:b].clone()
        before = values[a:b].clone()
        for j in range(a, b):
            target = values[j] + part[j - a] / h[j, j]
            codes[j] = grid.codes(target, scale[j], minimum[j])
            moved = grid.values(codes[j], scale[j], minimum[j]) - values[j]
            values[j] += moved
            part[j - a :].addr_(h[j:b, j], moved, alpha=-1)
        gradient[b:] -= h[b:, a:b] @ (values[a:b] - before)
    result.codes = codes.T.contiguous()


def _improve_scales(result: Rounded, weights: Tensor, h: Tensor, rows: int = 128) -> None:
    """All scales (and minima) of a row at once, the codes as they are: least squares under H."""
    grid, n = result.grid, result.grid.group
    groups = weights.shape[1] // n
    for a in range(0, len(weights), rows):
        w = weights[a : a + rows]
        basis = result.codes[a : a + rows]
        parts = [basis, torch.ones_like(basis)] if grid.minimum else [basis]
        count = len(parts) * groups
        normal = _normal(parts, h, n)
        wanted = w @ h
        target = torch.cat([(p * wanted).view(-1, groups, n).sum(2) for p in parts], 1)
        size = normal.diagonal(dim1=1, dim2=2).mean(1).clamp(min=1e-20)
        normal += torch.eye(count) * 1e-6 * size[:, None, None]
        solved, failed = torch.linalg.solve_ex(normal, target[:, :, None])
        found = half(solved[:, :, 0])
        before = torch.cat([result.scale[a : a + rows], result.minimum[a : a + rows]], 1)
        sound = ((failed == 0) & torch.isfinite(found).all(1))[:, None]
        found = torch.where(sound, found, before[:, :count])
        result.scale[a : a + rows] = found[:, :groups]
        if grid.minimum:
            result.minimum[a : a + rows] = found[:, groups:]


def _normal(parts: list[Tensor], h: Tensor, n: int) -> Tensor:
    """[rows, count, count]: H between the groups of n columns of each row, each group of each part
    [rows, columns] as one direction. What is on one side of the diagonal is on the other, too."""
    rows, columns = parts[0].shape
    groups = columns // n
    turned = [part.T.contiguous() for part in parts]
    normal = torch.empty(rows, len(parts) * groups, len(parts) * groups)
    for g in range(groups):
        a, b = g * n, (g + 1) * n
        for i, left in enumerate(turned):
            moved = h[a:, a:b] @ left[a:b]
            for k, right in enumerate(turned):
                found = (moved * right[a:]).view(-1, n, rows).sum(1).T
                normal[:, k * groups + g : (k + 1) * groups, i * groups + g] = found
                normal[:, i * groups + g, k * groups + g : (k + 1) * groups] = found
    return normal


def loss(result: Rounded, weights: Tensor, h: Tensor) -> float:
    """The error under H, summed over the rows."""
    error = weights - result.values()
    return float((error @ h * error).sum())
