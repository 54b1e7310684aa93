"""Rounds all matrices of a file under what its real inputs are, a block at a time.

Two streams of activations run through the model, one computed with the file's own weights, the
other with the rounded ones. Each matrix is rounded under the second moments of the inputs that it
will see, those of the rounded stream, so that its outputs come nearest to what the float model
computes there (as in GPTAQ, arXiv 2504.02692). What is added to the residual stream also makes up
for what the stream lost before. For a block that is executed several times the moments of all its
executions are summed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..quant.compensated import damped, rounded
from ..quant.grids import GRIDS
from ..quant.packing import packed
from ..quant.rounding import Rounder, dequantize
from ..quant.types import TensorType
from .network import ATTENTION_INPUTS, MATRICES, Network, Weights

Bytes = npt.NDArray[np.uint8]

STAGES = (ATTENTION_INPUTS, ("attn_output",), ("ffn_gate", "ffn_up"), ("ffn_down",))
INTO_STREAM = ("attn_output", "ffn_down")
BATCH = 4  # sequences that run at once
CORRECTION = 0.5  # the part of the difference between the streams that a matrix makes up for


class _Seen(Exception):
    """The pass has come as far as it was asked to."""


@dataclass
class Moments:
    """Sums over tokens for the inputs x of a stage in the rounded stream: x x', and what the float
    stream has in its place; `lost`: what the residual stream lacks, times x'."""

    h: Tensor
    cross: Tensor
    lost: Tensor | None = None
    tokens: int = 0

    def target(self, weights: Tensor, correction: float) -> tuple[Tensor, Tensor]:
        """H, damped, and the weights that do best on it before they are rounded."""
        h = damped(self.h / self.tokens)
        moved = weights @ ((self.cross - self.h).T / self.tokens)
        if self.lost is not None:
            moved += self.lost / self.tokens
        strong = h + torch.eye(len(h)) * h.diagonal().mean() * 0.05  # few tokens prove little
        return h, weights + correction * torch.linalg.solve(strong, moved.T).T


@dataclass
class Calibration:
    """The state of a run over one file."""

    network: Network
    kinds: Mapping[str, TensorType]
    tokens: Tensor  # [sequences, tokens]
    done: Callable[[str], Bytes | None]  # what an earlier run has rounded
    correction: float = CORRECTION
    first_only: bool = False  # take a shared block's statistics from its first execution alone

    @torch.no_grad()
    def run(self) -> Iterator[tuple[str, Bytes]]:
        """Each matrix as the bytes of its type, block after block, and embedding and head."""
        network = self.network
        source = network.source
        embedding = torch.from_numpy(source.values("token_embd.weight"))
        later = self._later_moments(embedding)
        used = {"token_embd.weight": embedding}
        for name in ("token_embd.weight", "output.weight"):
            if name in source.tensors:
                data = self._ends(name, later)
                used[name] = self._as_used(name, data)
                yield name, data
        exact = embedding[self.tokens]
        rough = used["token_embd.weight"][self.tokens]
        found: dict[str, Bytes] = {}
        for stored, times in runs(network.schedule):
            own = network.weights(stored)
            names = {part: f"blk.{stored}.{part}.weight" for part in MATRICES}
            if names["attn_q"] not in found:
                block = self._block(stored, times, own, exact, rough, later)
                found.update(block)
                yield from block.items()
            weights = own | {part: self._as_used(n, found[n]) for part, n in names.items()}
            for _ in range(times):
                exact = self._advance(exact, own, stored)
                rough = self._advance(rough, weights, stored)

    def _block(
        self,
        stored: int,
        times: int,
        own: Weights,
        exact: Tensor,
        rough: Tensor,
        later: Mapping[Any, Tensor],
    ) -> dict[str, Bytes]:
        """The matrices of one block: those with the same input at once."""
        found: dict[str, Bytes] = {}
        weights = dict(own)
        for stage in STAGES:
            names = {part: f"blk.{stored}.{part}.weight" for part in stage}
            old = {name: self.done(name) for name in names.values()}
            moments = None
            for part, name in names.items():
                data = old[name]
                if data is None:
                    if moments is None and self.kinds[name] in GRIDS:
                        moments = self._moments(
                            stored, times, stage[0], own, weights, exact, rough, later
                        )
                    data = self._rounded(name, own[part], moments)
                found[name] = data
                weights[part] = self._as_used(name, data)
        return found

    def _moments(
        self,
        stored: int,
        times: int,
        part: str,
        own: Weights,
        weights: Weights,
        exact: Tensor,
        rough: Tensor,
        later: Mapping[Any, Tensor],
    ) -> Moments:
        """Of the inputs of a stage, in the executions that follow each other here, with those that
        come later in the model as the float model sees them."""
        columns = own[part].shape[1]
        moments = Moments(torch.zeros(columns, columns), torch.zeros(columns, columns))
        if part in INTO_STREAM:
            moments.lost = torch.zeros(own[part].shape[0], columns)
        executions = 1 if self.first_only else times
        for at in range(0, len(exact), BATCH):
            left = self._inputs(exact[at : at + BATCH], own, stored, part, executions)
            right = self._inputs(rough[at : at + BATCH], weights, stored, part, executions)
            for (x, stream), (y, rough_stream) in zip(left, right, strict=True):
                moments.h += y.T @ y
                moments.cross += y.T @ x
                moments.tokens += len(y)
                if moments.lost is not None:
                    moments.lost += (stream - rough_stream).T @ y
        if (extra := later.get((stored, part))) is not None and not self.first_only:
            moments.h += extra
            moments.cross += extra
            moments.tokens *= 2  # about: there are as many later executions as first ones
        return moments

    def _inputs(
        self, x: Tensor, weights: Weights, stored: int, part: str, times: int
    ) -> list[tuple[Tensor, Tensor]]:
        """For each of `times` executions the input of a part and the residual stream that its
        output is added to, [tokens, columns] both."""
        found: list[tuple[Tensor, Tensor]] = []
        stream = x

        def watch(name: str, inputs: Tensor) -> None:
            if name == part:
                base = stream
                if part == "ffn_down":
                    base = stream + attention[0]
                found.append((inputs.flatten(0, 1), base.flatten(0, 1)))
                if len(found) == times:
                    raise _Seen

        network = self.network
        attention: list[Tensor] = []
        try:
            for _ in range(times):
                attention[:] = [network.attention(stream, weights, stored, watch)]
                middle = stream + attention[0]
                stream = middle + network.feed_forward(middle, weights, watch)
        except _Seen:
            pass
        return found

    def _advance(self, x: Tensor, weights: Weights, stored: int) -> Tensor:
        parts = [
            self.network.block(x[at : at + BATCH], weights, stored)
            for at in range(0, len(x), BATCH)
        ]
        return torch.cat(parts)

    def _rounded(self, name: str, weights: Tensor, moments: Moments | None) -> Bytes:
        """One matrix in its type; one without a grid here (floats) as ggml rounds it."""
        kind = self.kinds[name]
        if moments is None or kind not in GRIDS:
            return plain(weights.numpy(), kind)
        h, target = moments.target(weights, self.correction)
        result = rounded(target, h, GRIDS[kind])
        return packed(result)

    def _as_used(self, name: str, data: Bytes) -> Tensor:
        """What the bytes of a matrix stand for."""
        shape = self.network.source.tensors[name].shape
        return torch.from_numpy(
            dequantize(data.reshape(-1), self.kinds[name].id, shape[-1]).reshape(shape)
        )

    def _ends(self, name: str, later: Mapping[Any, Tensor]) -> Bytes:
        """Embedding or head: what its rows meet are the last hidden states; as an embedding each
        row is as well an input of its own, for which all its columns count alike."""
        if (data := self.done(name)) is not None:
            return data
        kind = self.kinds[name]
        weights = torch.from_numpy(self.network.source.values(name))
        h = later.get(name)
        if h is None or kind not in GRIDS:
            return plain(weights.numpy(), kind)
        return packed(rounded(weights, damped(h), GRIDS[kind]))

    def _later_moments(self, embedding: Tensor) -> dict[Any, Tensor]:
        """Second moments in the float model: of the last hidden states, as the head's, where it is
        rounded to few bits, and of the executions of blocks that do not follow the first ones."""
        network, source = self.network, self.network.source
        head = network.head_name()
        first_runs: set[int] = set()
        rest = []
        for stored, _ in runs(network.schedule):
            rest.append(stored in first_runs)
            first_runs.add(stored)
        wants_head = self.kinds[head].block > 1 and self.kinds[head].name != "Q8_0"
        if not wants_head and not any(rest):
            return {}
        found: dict[Any, Tensor] = defaultdict(lambda: torch.zeros(()))
        x = embedding[self.tokens]
        for (stored, times), is_later in zip(runs(network.schedule), rest, strict=True):
            own = network.weights(stored)
            for _ in range(times):
                for at in range(0, len(x), BATCH):

                    def watch(part: str, inputs: Tensor, stored: int = stored) -> None:
                        rows = inputs.flatten(0, 1)
                        found[stored, part] = found[stored, part] + rows.T @ rows

                    part = x[at : at + BATCH]
                    seen = watch if is_later else lambda part, inputs: None
                    x[at : at + BATCH] = network.block(part, own, stored, seen)
        norm = torch.from_numpy(source.values("output_norm.weight"))
        last = network.norm(x, norm).flatten(0, 1)
        h = last.T @ last / len(last)
        if head == "token_embd.weight":
            h = h + torch.eye(len(h)) * h.diagonal().mean()
        found[head] = h
        return found


def runs(schedule: list[int]) -> list[tuple[int, int]]:
    """The stored blocks in order of execution, and how often each is executed in a row."""
    found: list[tuple[int, int]] = []
    for block in schedule:
        if found and found[-1][0] == block:
            found[-1] = (block, found[-1][1] + 1)
        else:
            found.append((block, 1))
    return found


def plain(values: npt.NDArray[np.float32], kind: TensorType, imatrix: Any = None) -> Bytes:
    """uint8 [rows, bytes]: a matrix as ggml rounds it, a column's errors weighted by `imatrix`."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    data = Rounder().round(bits, "F32", kind, imatrix)
    return np.array(data).reshape(-1).view(np.uint8).reshape(len(values), -1)
