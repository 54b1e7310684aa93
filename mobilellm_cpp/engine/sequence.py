"""A sequence in the hands of whoever goes on with it; sequences.py owns the context."""

import ctypes
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from .prompt_lookup import PromptLookup
from .sequence_state import Rows, State, Wanted, common_prefix

if TYPE_CHECKING:
    from .sequences import Sequences


class Sequence:
    """A sequence that somebody goes on with. When the last reference is gone so is its claim to the
    cache."""

    def __init__(self, owner: "Sequences") -> None:
        self.owner = owner
        self.state = State()

    def __del__(self) -> None:
        self.state.live = False  # no lock: this may run anywhere

    @property
    def tokens(self) -> list[int]:
        """Its tokens, without those of a draft that its caller has still to agree with."""
        state = self.state
        return state.tokens if len(state.made) < 2 else state.tokens[: state.settled()]

    def speculate(self, most: int, end: int) -> None:
        """From now on its generated tokens are drafted, see PromptLookup."""
        self.state.lookup = PromptLookup(most, end) if most else None

    def rewrite(self, tokens: list[int]) -> None:
        """Makes it consist of tokens; what it has in common with them need not be computed
        again."""
        with self.owner.lock:
            state = self.state
            state.wanted = state.lookup = None
            keep = min(common_prefix(state.tokens, tokens), len(tokens) - 1)
            state.cut(keep if self.owner.places.can_cut(state, keep) else 0)
            added = tokens[len(state.tokens) :]
            state.add(added, self.owner.as_many(len(added)))

    def extend(self, tokens: list[int]) -> None:
        """Adds tokens that were given."""
        with self.owner.lock:
            self._settle()
            self.state.made = []
            self.state.add(list(tokens), self.owner.as_many(len(tokens)))

    def _settle(self) -> None:
        """Forgets the rest of a draft."""
        made = self.state.made[:1]
        if len(self.state.made) > 1:
            self.state.cut(self.state.settled())
            self.state.made = made

    def append(self, token: int, wanted: Wanted | None) -> None:
        """Adds a generated token. Steps of others may go on from it, if anything is wanted."""
        state = self.state
        if len(state.made) > 1:
            if state.tokens[state.settled()] == token:  # as drafted
                state.made = state.made[1:]
                state.wanted = wanted
                return
            with self.owner.lock:
                self._settle()
        state.made = []
        state.wanted = None  # a step of another thread sees nothing half done
        state.add([token], many=False)
        state.wanted = wanted

    def next(self, wanted: Wanted) -> tuple[int | None, npt.NDArray[np.float32] | None]:
        """After its last token: the token that the samplers choose, or the logits (a copy). Raises
        ModelError where it cannot be computed."""
        state = self.state
        state.wanted = wanted
        if not state.pending() and not state.made:
            with self.owner.lock:  # it was computed when nobody wanted to know
                state.again()
        if state.pending():
            self.owner.run(state)
        return state.made[0]

    def step(self, wanted: Wanted | None) -> bool:
        """One step at most towards what next(wanted) or compute() gives, for a caller that goes on
        with several sequences in one thread. True: it is at hand."""
        state = self.state
        state.wanted = wanted
        if state.pending():
            self.owner.step(state)
        return not state.pending()

    @property
    def reads(self) -> bool:
        """Whether a prompt is still to be computed, which takes a step of many tokens."""
        state = self.state
        return state.pending() and state.run()[2]

    def compute(self, rows: Rows) -> npt.NDArray[np.float32]:
        """The rows of all its tokens."""
        self.state.rows = rows
        self.owner.run(self.state)
        return rows.out

    def copy(self) -> tuple[bytes, int]:
        """K and V of its computed tokens, and how many these are, for restore()."""
        with self.owner.lock:
            self.owner.check_open()
            self._settle()
            state = self.state
            if state.slot is None:
                return bytes(state.parked or b""), state.done if state.parked else 0
            self.owner.places.place(state)  # what was cut goes
            return bytes(self.owner.places.copied(state)), state.done

    def restore(self, tokens: list[int], data: bytes) -> None:
        """Takes back what copy() gave."""
        with self.owner.lock:
            self.owner.check_open()
            self.owner.places.drop(self.state)
            self.state.cut(0)
            self.state.add(list(tokens), many=False)
            self.state.parked = (ctypes.c_uint8 * len(data)).from_buffer_copy(data)
            self.state.done, self.state.changes = len(tokens), self.owner.places.changes
            self.owner.places.place(self.state)
