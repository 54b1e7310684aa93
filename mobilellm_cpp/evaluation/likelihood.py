"""Log-likelihoods of many continuations at once.

Pairs are taken in the order of their tokens, so that those which begin alike are neighbours. What
several have in common stands in the batch, and in the KV cache, once, as part of every sequence
that goes on from there: the question of several answers, the examples before all questions. What
the pairs of a batch have in common with those of the batch before is not computed again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from ..engine.library import decode, llama_cpp
from ..engine.model import MobileLLM
from ..errors import ModelError

Pair = tuple[Sequence[int], Sequence[int]]  # tokens of a context, tokens of what follows it


@dataclass
class _Token:
    """A token of a batch: where it stands, in which sequences, and what follows it: for each token
    that is asked for, the pair and the token."""

    id: int
    at: int
    sequences: list[int] = field(default_factory=list)
    asked: list[tuple[int, int]] = field(default_factory=list)


@dataclass(frozen=True)
class _Row:
    """A pair as it is computed: all its tokens but the last; the first `known` of them are only
    read."""

    pair: int
    tokens: tuple[int, ...]
    known: int
    last: int


class Scorer:
    """Scores pairs on a model that nobody else uses meanwhile."""

    def __init__(self, llm: MobileLLM) -> None:
        self.llm = llm
        self.limit = llm.n_ctx()
        self.sequences = int(llama_cpp.llama_n_seq_max(llm.ctx))
        self._slides = llama_cpp.llama_model_n_swa(llm.model) > 0  # its cache cannot be cut back
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
        before: list[_Row] = []
        for rows_of_batch in self._batches(pairs):
            kept = self._keep(before, rows_of_batch)
            before = rows_of_batch
            batch = [token for token in _tokens(rows_of_batch) if token.at >= kept]
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

    def _batches(self, pairs: Sequence[Pair]) -> Iterator[list[_Row]]:
        """What goes through together: sequences and tokens that fit."""
        rows = []
        for i, (context, continuation) in enumerate(pairs):
            if not context or not continuation:
                raise ModelError("a context and its continuation must each have at least one token")
            known = tuple(context[-max(1, self.limit + 1 - len(continuation)) :])
            rows.append(_Row(i, (*known, *continuation[:-1]), len(known), continuation[-1]))
        rows.sort(key=lambda row: row.tokens)
        batch: list[_Row] = []
        new: list[int] = []  # of each row, the tokens that the row before does not have
        for row in rows:
            batch.append(row)
            new.append(len(row.tokens) - (_alike(batch[-2], row) if new else 0))
            while len(batch) > 1 and (len(batch) > self.sequences or sum(new) > self.limit):
                last = len(batch) - 1  # cut there, or before where less is in common
                at = max(range(1 + last // 2, last + 1), key=lambda i: (new[i] > new[last], i))
                yield batch[:at]
                batch, new = batch[at:], [len(batch[at].tokens), *new[at + 1 :]]
        if batch:
            yield batch

    def _keep(self, before: list[_Row], batch: list[_Row]) -> int:
        """How many tokens at the beginning of all rows are in the cache already, as part of each
        sequence of the batch; the rest of the cache is emptied."""
        kept = 0
        if before and not self._slides:
            alike = min(_alike(before[0], batch[0]), _alike(batch[0], batch[-1]))
            kept = min(alike, *(row.known - 1 for row in batch))
        if kept == 0 or not llama_cpp.llama_memory_seq_rm(self._memory, -1, kept, -1):
            llama_cpp.llama_memory_clear(self._memory, True)
            return 0
        for sequence in range(1, len(batch)):
            llama_cpp.llama_memory_seq_cp(self._memory, 0, sequence, 0, kept)
        return kept

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


def _alike(a: _Row, b: _Row) -> int:
    """How many tokens two rows have in common at the beginning."""
    pairs = enumerate(zip(a.tokens, b.tokens, strict=False))
    return next((i for i, (x, y) in pairs if x != y), min(len(a.tokens), len(b.tokens)))


def _tokens(rows: list[_Row]) -> list[_Token]:
    """The tokens of sorted rows, each row a sequence; what neighbours have in common stands once,
    and every token after the one before it."""
    found: list[_Token] = []
    path: list[_Token] = []  # of the row before
    for sequence, row in enumerate(rows):
        del path[_alike(rows[sequence - 1], row) if sequence else 0 :]
        new = [_Token(row.tokens[at], at) for at in range(len(path), len(row.tokens))]
        found += new
        path += new
        following = (*row.tokens[1:], row.last)
        for token in path:
            token.sequences.append(sequence)
            if token.at >= row.known - 1:
                token.asked.append((row.pair, following[token.at]))
    return found


def _log_sum(rows: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """log of the sum of exp of each row."""
    top = rows.max(1, keepdims=True)
    total: npt.NDArray[np.float64] = np.exp(rows - top).sum(1, dtype=np.float64)
    logs: npt.NDArray[np.float64] = np.log(total) + top[:, 0]
    return logs
