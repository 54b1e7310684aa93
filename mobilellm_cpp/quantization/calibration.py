"""Rounds all matrices of a file under what its real inputs are, a block at a time.

Two streams of activations run through the model, one computed with the file's own weights, the
other with the rounded ones. Each matrix is rounded under the second moments of the inputs that it
will see, those of the rounded stream, so that its outputs come nearest to what the float model
computes there (as in GPTAQ, arXiv 2504.02692). What is added to the residual stream also makes up
for what the stream lost before. For a block that is executed several times the moments of all its
executions are summed, and the losses are those before its first one. Then `tuning.py` may tune the
block's scales and norms.
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

from ..engine.library import give_memory_back
from ..quant.compensated import damped, rounded
from ..quant.grids import GRIDS
from ..quant.packing import packed
from ..quant.rounding import Rounder, dequantize
from ..quant.types import TensorType
from .network import ATTENTION_INPUTS, MATRICES, NORMS, Network, Weights
from .tuning import tuned

Bytes = npt.NDArray[np.uint8]

STAGES = (ATTENTION_INPUTS, ("attn_output",), ("ffn_gate", "ffn_up"), ("ffn_down",))
INTO_STREAM = ("attn_output", "ffn_down")
Step = tuple[str, Tensor, Tensor]  # of Network.steps
BATCH = 4  # sequences that run at once
CORRECTION = 0.5  # the part of the difference between the streams that a matrix makes up for


@dataclass
class Moments:
    """Sums over tokens for the inputs x of a stage in the rounded stream. `h`: x x' over all
    executions. Of the first one alone, because executions ask one matrix to make up for different
    losses, and a compromise helps none: `first`, x x' again, `cross`, x times what the float stream
    has in its place, and `lost`, what the residual stream lacks, times x'."""

    h: Tensor
    first: Tensor
    cross: Tensor
    lost: Tensor | None = None
    tokens: int = 0
    tokens_first: int = 0

    def add(self, exact: Step, rough: Step) -> None:
        """What both streams have before the same product of the first execution."""
        x, y = exact[1].flatten(0, 1), rough[1].flatten(0, 1)
        squares = y.T @ y
        self.h += squares
        self.first += squares
        self.cross += y.T @ x
        self.tokens += len(y)
        self.tokens_first += len(y)
        if self.lost is not None:
            self.lost += (exact[2] - rough[2]).flatten(0, 1).T @ y

    def add_again(self, rough: Tensor) -> None:
        """Inputs of a later execution."""
        y = rough.flatten(0, 1)
        self.h += y.T @ y
        self.tokens += len(y)

    def target(self, weights: Tensor, correction: float) -> tuple[Tensor, Tensor]:
        """H, damped, and the weights that do best on the first execution before they are
        rounded."""
        moved = weights @ ((self.cross - self.first).T / self.tokens_first)
        if self.lost is not None:
            moved += self.lost / self.tokens_first
        first = damped(self.first / self.tokens_first)
        strong = first + torch.eye(len(first)) * first.diagonal().mean() * 0.05  # few prove little
        shift = torch.linalg.solve(strong, moved.T).T
        return damped(self.h / self.tokens), weights + correction * shift


@dataclass
class Calibration:
    """The state of a run over one file."""

    network: Network
    kinds: Mapping[str, TensorType]
    tokens: Tensor  # [sequences, tokens]
    done: Callable[[str], Bytes | None]  # what an earlier run has rounded
    correction: float = CORRECTION
    tune: int = 0  # steps that tune each block
    first_only: bool = False  # take a shared block's statistics from its first execution alone

    @torch.no_grad()
    def run(self) -> Iterator[tuple[str, Bytes]]:
        """Each matrix as the bytes of its type, block after block, and embedding and head; with
        `tune` each block's norms after its matrices."""
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
        schedule = runs(network.schedule)
        for at, (stored, times) in enumerate(schedule):
            own = network.weights(stored)
            parts = (*MATRICES, *NORMS) if self.tune else MATRICES
            names = {part: f"blk.{stored}.{part}.weight" for part in parts}
            if names["attn_q"] not in found:
                block, exact_end, rough_end = self._block(stored, times, own, exact, rough, later)
                if self.tune:
                    block = self._tuned(stored, times, own, block, rough, exact_end)
                found.update(block)
                yield from block.items()
                left = times - 1
            else:
                exact_end, rough_end, left = exact, rough, times
            weights = own | {part: self._as_used(n, found[n]) for part, n in names.items()}
            exact = self._advance(exact_end, own, stored, left)
            start, left = (rough, times) if self.tune else (rough_end, left)
            rough = self._advance(start, weights, stored, left)
            del own, weights
            if all(stored != again for again, _ in schedule[at + 1 :]):
                found = {name: data for name, data in found.items() if name not in names.values()}
            give_memory_back()  # matrices of many sizes leave gaps in the heap with every block

    def _tuned(
        self,
        stored: int,
        times: int,
        own: Weights,
        block: dict[str, Bytes],
        rough: Tensor,
        exact_end: Tensor,
    ) -> dict[str, Bytes]:
        """A block's matrices and norms, tuned, where an earlier run has not done it."""
        norms = {name: self.done(name) for name in (f"blk.{stored}.{p}.weight" for p in NORMS)}
        kept = {name: data for name, data in norms.items() if data is not None}
        if len(kept) == len(norms):
            return block | kept
        targets = [exact_end]
        for _ in range(1, times):
            targets.append(self._advance(targets[-1], own, stored, 1))
        return tuned(self.network, self.kinds, stored, block, rough, targets, self.tune)

    def _block(
        self,
        stored: int,
        times: int,
        own: Weights,
        exact: Tensor,
        rough: Tensor,
        later: Mapping[Any, Tensor],
    ) -> tuple[dict[str, Bytes], Tensor, Tensor]:
        """The matrices of one block: those with the same input at once, each stage with what is
        rounded already. Then both streams after one execution."""
        network = self.network
        found: dict[str, Bytes] = {}
        weights = dict(own)
        starts = [
            (exact[at : at + BATCH], rough[at : at + BATCH]) for at in range(0, len(exact), BATCH)
        ]
        steps = [
            (network.steps(x, own, stored), network.steps(y, weights, stored)) for x, y in starts
        ]
        for stage in STAGES:
            first = stage[0]
            names = {part: f"blk.{stored}.{part}.weight" for part in stage}
            old = {name: self.done(name) for name in names.values()}
            wanted = [n for n, data in old.items() if data is None and self.kinds[n] in GRIDS]
            columns = own[first].shape[1]
            h, once, cross = (torch.zeros(columns, columns) for _ in range(3))
            moments = Moments(h, once, cross)
            if first in INTO_STREAM:
                moments.lost = torch.zeros(len(own[first]), columns)
            for (left, right), start in zip(steps, starts, strict=True):
                here = next(left), next(right)
                if wanted:
                    moments.add(*here)
                    for again in self._again(first, times, stored, weights, start[1]):
                        moments.add_again(again)
            if (extra := later.get((stored, first))) is not None and not self.first_only:
                moments.h += extra
                moments.tokens *= 2  # about: there are as many later executions as first ones
            for part, name in names.items():
                data = old[name]
                found[name] = self._rounded(name, own[part], moments) if data is None else data
                weights[part] = self._as_used(name, found[name])
        ends = [(next(left)[1], next(right)[1]) for left, right in steps]
        return found, torch.cat([x for x, _ in ends]), torch.cat([y for _, y in ends])

    def _again(
        self, part: str, times: int, stored: int, weights: Weights, rough: Tensor
    ) -> Iterator[Tensor]:
        """The inputs of a part in the executions that follow the first one directly."""
        for _ in range(1, 1 if self.first_only else times):
            rough = self.network.block(rough, weights, stored)
            steps = self.network.steps(rough, weights, stored)
            yield next(inputs for name, inputs, _ in steps if name == part)

    def _advance(self, x: Tensor, weights: Weights, stored: int, times: int) -> Tensor:
        """The stream after so many executions."""
        if times == 0:
            return x
        parts = []
        for at in range(0, len(x), BATCH):
            part = x[at : at + BATCH]
            for _ in range(times):
                part = self.network.block(part, weights, stored)
            parts.append(part)
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

                    def watch(part: str, rows: Tensor, stored: int = stored) -> None:
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
