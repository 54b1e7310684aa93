"""How likely a model finds a given text: log probabilities of its tokens, some of them at a time.

So their logits take little memory, and who goes on with several texts in one thread keeps none of
them waiting.
"""

from collections.abc import Generator
from typing import TYPE_CHECKING

from .answers import LogProb, log_prob
from .sequence import Sequence
from .sequence_state import Rows

if TYPE_CHECKING:
    from .model import MobileLLM

WINDOW = 64  # tokens whose logits are there at a time


class Scores:
    """records: one for each token, with the n_best likeliest ones in its place; None for the first,
    which follows nothing."""

    def __init__(self, llm: "MobileLLM", tokens: list[int], n_best: int) -> None:
        self.records: list[LogProb | None] = [None]
        self.tokens, self._llm, self._n_best = tokens, llm, n_best
        self._sequence: Sequence | None = None
        self._steps = self._all()

    @property
    def reads(self) -> bool:
        """Whether its next step is one of many tokens."""
        return len(self.records) < len(self.tokens)

    def step(self) -> bool:
        """One step of the engine at most. False: there is nothing left to do."""
        return next(self._steps, None) is not None

    def close(self) -> None:
        """Ends it; its place is free."""
        self._steps.close()
        self._sequence = None

    def _all(self) -> Generator[bool, None, None]:
        llm, given = self._llm, self.tokens[:-1]
        for first in range(0, len(given), WINDOW):
            part = given[first : first + WINDOW]
            rows = Rows(llm.n_vocab(), range(first, first + len(part)), states=False)
            if self._sequence is None:
                self._sequence = llm._sequences.open(part)
                self._sequence.state.rows = rows
            else:
                self._sequence.state.rows = rows  # before others may go on with its new tokens
                self._sequence.extend(part)
            while not self._sequence.step(None):
                yield True
            llm._check_numbers(rows.out)
            for token, row in zip(self.tokens[first + 1 :], rows.out, strict=False):
                piece = llm._piece(token, special=True)
                self.records.append(log_prob(token, piece, row, self._n_best))
            yield True
        self._sequence = None
