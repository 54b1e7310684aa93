"""The last pass: all FP16 scales and the norms of a rounded model, tuned together until it predicts
what the float model predicts. Codes stay what calibration made them.

Whatever the type, a block's weights are linear in its FP16 numbers: d A + m B, where A and B are
what ggml's dequantization makes of the block with (d, m) = (1, 0) and (0, 1). Each number may move
by a few percent, by gradient descent (Adam) on the KL divergence from the float model's predictions
over the calibration text; a part of the text is kept apart and says when to stop.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

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
from .network import Network

Bytes = npt.NDArray[np.uint8]
Progress = Callable[[int, int, str], None]

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

RATE = 2e-3  # of the numbers themselves, a step
CHECKED = 4  # sequences that are not trained on
EVERY = 8  # steps between two looks at them


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
    rounded: Mapping[str, Bytes],
    tokens: Tensor,
    steps: int,
    progress: Progress | None = None,
) -> tuple[dict[str, Bytes], dict[str, Tensor], tuple[float, float]]:
    """The matrices of the blocks and the norms after at most `steps` steps of a sequence each, and
    the divergence on the sequences kept apart before and after, in nats. Without a gain all stays
    as it was. Needs memory for the model in int16 and its gradients of a block."""
    source = network.source
    matrices = {
        name: _Matrix.read(rounded[name], kinds[name], *source.tensors[name].shape)
        for name in rounded
        if name.startswith("blk.") and kinds[name] in PLACES
    }
    norms = {
        name: torch.from_numpy(source.values(name))
        for name, info in source.tensors.items()
        if len(info.shape) == 1 and name.endswith("norm.weight")
    }
    norm_moves = {name: torch.zeros_like(w, requires_grad=True) for name, w in norms.items()}
    fixed = {
        name: torch.from_numpy(
            dequantize(data.reshape(-1), kinds[name].id, source.tensors[name].shape[-1])
        ).view(source.tensors[name].shape)
        for name, data in rounded.items()
        if name not in matrices
    }
    teacher = {name: torch.from_numpy(source.values(name)) for name in fixed}

    def student_block(stored: int) -> dict[str, Tensor]:
        prefix = f"blk.{stored}."
        own = {}
        for name, matrix in matrices.items():
            if name.startswith(prefix):
                own[name] = matrix.weights()
        for name, norm in norms.items():
            if name.startswith(prefix):
                own[name] = norm * (1 + norm_moves[name])
        own |= {name: weight for name, weight in fixed.items() if name.startswith(prefix)}
        return {name.split(".")[2]: weight for name, weight in own.items()}

    def predictions(sequence: Tensor, exact: bool) -> Tensor:
        ends = teacher if exact else fixed
        x = ends["token_embd.weight"][sequence[None]]
        for stored in network.schedule:
            if exact:
                x = network.block(x, network.weights(stored), stored)
            else:
                x = checkpoint(
                    lambda x, b: network.block(x, student_block(b), b),
                    x,
                    stored,
                    use_reentrant=False,
                )
        norm = norms["output_norm.weight"]
        if not exact:
            norm = norm * (1 + norm_moves["output_norm.weight"])
        logits: Tensor = network.norm(x, norm)[0] @ ends[network.head_name()].T
        return logits.log_softmax(-1)

    def divergence(sequence: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = predictions(sequence, exact=True)
        found = predictions(sequence, exact=False)
        return (wanted.exp() * (wanted - found)).sum(-1).mean()

    def checked() -> float:
        with torch.no_grad():
            return float(torch.stack([divergence(sequence) for sequence in apart]).mean())

    apart, learned = tokens[:CHECKED], tokens[CHECKED:]
    moves = [move for matrix in matrices.values() for move in matrix.moves]
    moves += list(norm_moves.values())
    adam = torch.optim.Adam(moves, lr=RATE, betas=(0.9, 0.95))
    before = least = checked()
    best = [move.detach().clone() for move in moves]
    for step in range(steps):
        for group in adam.param_groups:
            group["lr"] = RATE * (1 - step / steps)
        adam.zero_grad()
        loss = divergence(learned[step % len(learned)])
        loss.backward()  # type: ignore[no-untyped-call]
        adam.step()
        if (step + 1) % EVERY == 0 or step + 1 == steps:
            now = checked()
            if now < least:
                least, best = now, [move.detach().clone() for move in moves]
        if progress is not None:
            progress(step + 1, steps, f"{least:.4f} nats")
    with torch.no_grad():
        for move, kept in zip(moves, best, strict=True):
            move.copy_(kept)
        made = {name: matrix.packed() for name, matrix in matrices.items()}
        moved = {name: norm * (1 + norm_moves[name]) for name, norm in norms.items()}
    return made, moved, (before, least)
