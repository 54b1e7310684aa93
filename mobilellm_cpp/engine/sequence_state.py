"""What is known of a sequence: its tokens, how each is computed, and what is in the cache."""

from collections.abc import Callable, Iterable
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from .prompt_lookup import PromptLookup

# After a token: the next one that samplers chose, or the logits.
Made = tuple[int | None, npt.NDArray[np.float32] | None]

FEW = 12  # tokens of one sequence in a step that the fused step computes one by one


class Wanted(Protocol):
    """What a sequence wants after its last token: a token by llama.cpp's samplers, or the
    logits."""

    @property
    def chain(self) -> int | None: ...  # a llama_sampler; None: the logits are copied

    @property
    def n_best(self) -> int: ...


class Rows:
    """What is wanted after many tokens: their logits or their hidden states, as rows of an
    array."""

    def __init__(self, width: int, indices: Iterable[int], states: bool) -> None:
        self.row_of = {index: row for row, index in enumerate(indices)}
        self.states = states
        self.out = np.empty((len(self.row_of), width), np.float32)

    def address(self, index: int) -> int:
        """Where the row of a token goes; 0: nothing is wanted of it."""
        row = self.row_of.get(index)
        return 0 if row is None else self.out.ctypes.data + row * self.out.strides[0]


class State:
    """What is known of a sequence, also after its Sequence is gone: then others may go on from
    it."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.runs: list[tuple[int, bool]] = []  # [end, computed as many]
        self.done = 0  # leading tokens whose K and V are in the cache, or in `parked`
        self.slot: Any = None  # its number in the cache
        self.parked: Any = None  # K and V of done tokens, copied out of the cache
        self.changes = 0  # of the model, before `done` was computed
        self.found = 0  # leading tokens that another sequence had computed
        self.trim = False  # the cache holds more than `done`
        self.live = True
        self.wanted: Wanted | None = None
        self.rows: Rows | None = None
        self.made: list[Made] = []  # what follows its last tokens, the last one's at the end
        self.lookup: PromptLookup | None = None  # who drafts what follows
        self.waits = False  # a caller does
        self.thread = 0  # of the last caller
        self.watch: Callable[[int], None] | None = None  # told before each step what is done
        self.turn = 0  # steps since it has its place
        self.last = 0.0  # when it made the last one
        self.since = 0.0  # when its caller began to wait

    def add(self, tokens: list[int], many: bool) -> None:
        if not tokens:
            return
        self.tokens += tokens
        if self.runs and self.runs[-1][1] == many:
            self.runs.pop()
        self.runs.append((len(self.tokens), many))

    def cut(self, length: int) -> None:
        """Forgets all tokens from `length` on."""
        if length < len(self.tokens):
            del self.tokens[length:]
            kept = [run for run in self.runs if run[0] <= length]
            if length > (kept[-1][0] if kept else 0):
                kept.append((length, self.runs[len(kept)][1]))
            self.runs = kept
        self.go_back(length)

    def go_back(self, done: int) -> None:
        """Tokens from `done` on are to be computed again."""
        if done < self.done:
            self.done, self.trim = done, True
        self.made = []

    def settled(self) -> int:
        """How many tokens are no draft that its caller has still to agree with."""
        return len(self.tokens) - max(0, len(self.made) - 1)

    def again(self) -> None:
        """The last token is to be computed again, in the way it was."""
        start = self.runs[-2][0] if len(self.runs) > 1 else 0
        self.go_back(max(start, len(self.tokens) - (FEW + 1 if self.runs[-1][1] else 1)))

    def pending(self) -> bool:
        return self.done < len(self.tokens) and len(self.made) < 2

    def run(self) -> tuple[int, int, bool]:
        """Start, end and way of the run of the next token."""
        start = 0
        for end, many in self.runs:
            if end > self.done:
                return start, end, many
            start = end
        raise AssertionError("nothing is pending")

    def same(self, tokens: list[int], many: bool) -> int:
        """How many of its computed tokens begin `tokens` and were computed in that way."""
        if not self.runs or self.runs[0][1] != many:
            return 0
        return common_prefix(self.tokens[: min(self.done, self.runs[0][0])], tokens)


def common_prefix(a: list[int], b: list[int]) -> int:
    n = min(len(a), len(b))
    if a[:n] == b[:n]:
        return n
    return next(i for i in range(n) if a[i] != b[i])
