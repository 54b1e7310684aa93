"""Log-likelihoods of many continuations at once.

Continuations of the same context share it: its tokens stand in the batch, and in the KV cache,
once, as part of every sequence that goes on from there. Several contexts go through in one batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..engine.library import decode, llama_cpp
from ..engine.model import MobileLLM
from ..errors import ModelError

Pair = tuple[Sequence[int], Sequence[int]]  # tokens of a context, tokens of what follows it


@dataclass(frozen=True)
class _Token:
    """A token of a batch: where it stands, in which sequences, and what follows it: for each token
    that is asked for, the pair and the token."""

    id: int
    at: int
    sequences: tuple[int, ...]
    asked: tuple[tuple[int, int], ...]


class Scorer:
    """Scores pairs on a model that nobody else uses meanwhile."""

    def __init__(self, llm: MobileLLM) -> None:
        self.llm = llm
        self.limit = llm.n_ctx()
        self.sequences = int(llama_cpp.llama_n_seq_max(llm.ctx))
        self._memory = llama_cpp.llama_get_memory(llm.ctx)
        self._batch = llama_cpp.llama_batch_init(llm.n_batch, 0, self.sequences)

    def close(self) -> None:
        """Frees the batch; the model stays."""
        llama_cpp.llama_batch_free(self._batch)

    def score(
        self, pairs: Sequence[Pair], progress: Callable[[int], None] = lambda done: None
    ) -> list[tuple[float, bool]]:
        """For each pair the log-probability of the continuation, and whether each token of it is
        the likeliest one. What is longer than the context loses its beginning. Raises ModelError
        for an empty context or continuation."""
        sums = np.zeros(len(pairs))
        greedy = np.ones(len(pairs), bool)
        done = 0
        for batch in self._batches(pairs):
            llama_cpp.llama_memory_clear(self._memory, True)
            for first in range(0, len(batch), self.llm.n_batch):
                part = batch[first : first + self.llm.n_batch]
                rows = self._logits(part)
                places = [(row, asked) for row, t in enumerate(_asking(part)) for asked in t.asked]
                if not places:
                    continue
                top = rows.argmax(1)
                log_sum = _log_sum(rows)
                for row, (pair, token) in places:
                    sums[pair] += float(rows[row, token]) - log_sum[row]
                    greedy[pair] &= bool(top[row] == token)
            done += len({pair for t in batch for pair, _ in t.asked})
            progress(done)
        return [(float(s), bool(g)) for s, g in zip(sums, greedy, strict=True)]

    def _batches(self, pairs: Sequence[Pair]) -> Iterator[list[_Token]]:
        """What goes through together: sequences and tokens that fit."""
        groups: dict[tuple[int, ...], list[int]] = {}
        for i, (context, continuation) in enumerate(pairs):
            if not context or not continuation:
                raise ModelError("a context and its continuation must each have at least one token")
            room = max(1, self.limit + 1 - len(continuation))
            groups.setdefault(tuple(context[-room:]), []).append(i)
        batch: list[_Token] = []
        used = 0
        for context, members in groups.items():
            for first in range(0, len(members), self.sequences):
                some = members[first : first + self.sequences]
                size = len(context) + sum(len(pairs[i][1]) - 1 for i in some)
                full = len(batch) + size > max(self.llm.n_batch, size) and batch
                if full or used + len(some) > self.sequences or len(batch) + size > self.limit:
                    if batch:
                        yield batch
                    batch, used = [], 0
                batch += _tokens(context, {i: pairs[i][1] for i in some}, used)
                used += len(some)
        if batch:
            yield batch

    def _logits(self, tokens: list[_Token]) -> npt.NDArray[np.float32]:
        """float32 [rows, n_vocab]: after each token that something is asked of."""
        batch = self._batch
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i] = token.id, token.at
            batch.n_seq_id[i] = len(token.sequences)
            for k, sequence in enumerate(token.sequences):
                batch.seq_id[i][k] = sequence
            batch.logits[i] = bool(token.asked)
        decode(self.llm.ctx, batch)
        count = sum(bool(token.asked) for token in tokens)
        if count == 0:
            return np.empty((0, self.llm.n_vocab()), np.float32)
        pointer = llama_cpp.llama_get_logits(self.llm.ctx)
        rows: npt.NDArray[np.float32]
        rows = np.ctypeslib.as_array(pointer, shape=(count, self.llm.n_vocab()))
        if not np.isfinite(rows).all():
            raise ModelError(f"{self.llm.model_path} is damaged: its results are not numbers")
        return rows


def _asking(tokens: Iterable[_Token]) -> Iterator[_Token]:
    return (token for token in tokens if token.asked)


def _tokens(
    context: tuple[int, ...], continuations: dict[int, Sequence[int]], first: int
) -> Iterator[_Token]:
    """The context, in all sequences from `first` on, and each continuation in one of them."""
    everyone = tuple(range(first, first + len(continuations)))
    for at, token in enumerate(context):
        last = at + 1 == len(context)
        asked = tuple((pair, tokens[0]) for pair, tokens in continuations.items()) if last else ()
        yield _Token(token, at, everyone, asked)
    for sequence, (pair, tokens) in zip(everyone, continuations.items(), strict=True):
        for at, (token, following) in enumerate(zip(tokens, tokens[1:], strict=False)):
            yield _Token(token, len(context) + at, (sequence,), ((pair, following),))


def _log_sum(rows: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """log of the sum of exp of each row."""
    top = rows.max(1, keepdims=True)
    total: npt.NDArray[np.float64] = np.exp(rows - top).sum(1, dtype=np.float64)
    logs: npt.NDArray[np.float64] = np.log(total) + top[:, 0]
    return logs
