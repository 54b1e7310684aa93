"""Scales and norms of a rounded block, tuned until it does what the float model's block does.

As in OmniQuant (Shao et al. 2023, arXiv 2308.13137), but after rounding: codes stay what
calibration made them. Whatever the type, a block's weights are linear in its FP16 numbers:
d A + m B, where A and B are what ggml's dequantization makes of the block with (d, m) = (1, 0) and
(0, 1). These numbers and the norms move by gradient descent (Adam). The loss is the error of the
residual stream after each execution, as a share of the token's own square, the next norm being
blind to its size. Some sequences are kept apart and say whether it was a gain.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..quant.rounding import dequantize
from ..quant.types import (
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
from .network import NORMS, Network, Weights
from .source import Source

Bytes = npt.NDArray[np.uint8]

# The bytes of a block at which its FP16 numbers stand.
PLACES: dict[TensorType, tuple[int, ...]] = {
    Q2_0: (0,),
    Q4_0: (0,),
    Q5_0: (0,),
    Q8_0: (0,),
    IQ4_NL: (0,),
    Q4_1: (0, 2),
    Q5_1: (0, 2),
    Q4_K: (0, 2),
    Q5_K: (0, 2),
    Q6_K: (208,),
    Q3_K: (108,),
}

RATE = 1e-3  # of the numbers themselves, a step
CHECKED = 4  # sequences that are not learned from


@dataclass
class _Matrix:
    """A matrix as its FP16 numbers [rows, blocks] and what each stands for, int16
    [rows, blocks, block]; `moves` are the shares by which the numbers change."""

    data: Bytes
    kind: TensorType
    numbers: list[Tensor]
    parts: list[Tensor]
    moves: list[Tensor]

    @staticmethod
    def read(data: Bytes, kind: TensorType, rows: int, columns: int) -> _Matrix:
        blocks = data.reshape(rows, columns // kind.block, kind.block_bytes)
        numbers, parts = [], []
        for place in PLACES[kind]:
            raw = np.ascontiguousarray(blocks[..., place : place + 2]).view("<f2")[..., 0]
            numbers.append(torch.from_numpy(raw.astype(np.float32)))
            unit = blocks.copy()
            for other in PLACES[kind]:
                one = np.float16(other == place)
                unit[..., other : other + 2] = np.frombuffer(one.tobytes(), np.uint8)
            values = dequantize(unit.reshape(-1), kind.id, columns)
            parts.append(torch.from_numpy(values.astype(np.int16)).view(rows, -1, kind.block))
        moves = [torch.zeros_like(number, requires_grad=True) for number in numbers]
        return _Matrix(data, kind, numbers, parts, moves)

    def weights(self) -> Tensor:
        """[rows, columns], with gradients to the moves."""
        total: Tensor | None = None
        for number, part, move in zip(self.numbers, self.parts, self.moves, strict=True):
            one = (number * (1 + move))[..., None] * part
            total = one if total is None else total + one
        assert total is not None
        return total.flatten(1)

    def packed(self) -> Bytes:
        """The blocks with the tuned numbers in them."""
        rows = len(self.numbers[0])
        blocks = self.data.reshape(rows, -1, self.kind.block_bytes).copy()
        pairs = zip(PLACES[self.kind], self.numbers, self.moves, strict=True)
        for place, number, move in pairs:
            half = (number * (1 + move.detach())).numpy().astype("<f2")
            blocks[..., place : place + 2] = half[..., None].view(np.uint8)
        whole: Bytes = blocks.reshape(rows, -1)
        return whole


def tuned(
    network: Network,
    kinds: Mapping[str, TensorType],
    stored: int,
    found: Mapping[str, Bytes],
    rough: Tensor,
    targets: list[Tensor],
    steps: int,
) -> dict[str, Bytes]:
    """The matrices `found` of a stored block and its norms (float32) after `steps` steps of a
    sequence each, all as bytes; without a gain as they were. `rough` is the stream before the
    block, `targets` the float model's after each execution, all [sequences, tokens, columns]."""
    source = network.source
    norms = {f"blk.{stored}.{part}.weight": part for part in NORMS}
    before = dict(found) | {name: source.values(name).view(np.uint8) for name in norms}
    matrices, vectors = {}, {}
    fixed: dict[str, Tensor] = {}
    for name, data in before.items():
        part = name.split(".")[2]
        if part in NORMS:
            vectors[part] = torch.from_numpy(source.values(name))
        elif kinds[name] in PLACES:
            matrices[part] = _Matrix.read(data, kinds[name], *source.tensors[name].shape)
        else:
            fixed[part] = _values(source, name, data, kinds)
    norm_moves = {part: torch.zeros_like(w, requires_grad=True) for part, w in vectors.items()}

    def loss(weights: Weights, at: int) -> Tensor:
        x, total = rough[at : at + 1], torch.zeros(())
        for target in targets:
            x = network.block(x, weights, stored)
            wanted = target[at : at + 1]
            share = (x - wanted).square().mean(-1) / wanted.square().mean(-1)
            total = total + share.mean()
        return total

    apart = max(1, min(CHECKED, len(rough) // 4))
    learned = len(rough) - apart

    def checked(files: Mapping[str, Bytes]) -> float:
        weights = {n.split(".")[2]: _values(source, n, data, kinds) for n, data in files.items()}
        with torch.no_grad():
            return float(sum(loss(weights, at) for at in range(learned, len(rough))))

    moves = [move for matrix in matrices.values() for move in matrix.moves]
    adam = torch.optim.Adam([*moves, *norm_moves.values()], lr=RATE, betas=(0.9, 0.95), eps=1e-16)
    with torch.enable_grad():
        for step in range(steps if learned else 0):
            for group in adam.param_groups:
                group["lr"] = RATE * (1 - step / steps)
            weights = fixed | {part: matrix.weights() for part, matrix in matrices.items()}
            weights |= {part: w * (1 + norm_moves[part]) for part, w in vectors.items()}
            adam.zero_grad()
            loss(weights, step % learned).backward()  # type: ignore[no-untyped-call]
            adam.step()
    after = dict(before)
    for name in after:
        part = name.split(".")[2]
        if part in matrices:
            after[name] = matrices[part].packed()
        elif part in vectors:
            moved = vectors[part] * (1 + norm_moves[part].detach())
            after[name] = moved.numpy().view(np.uint8)
    return after if checked(after) < checked(before) else before


def _values(source: Source, name: str, data: Bytes, kinds: Mapping[str, TensorType]) -> Tensor:
    """What the bytes of a tensor stand for."""
    shape = source.tensors[name].shape
    return torch.from_numpy(dequantize(data.reshape(-1), kinds[name].id, shape[-1]).reshape(shape))
