"""Any number of sequences over one llama.cpp context: a sequence is its tokens, the KV cache is
only a cache.

Whoever wants a sequence to go on makes a step for it, and takes along all others that can go on:
the context belongs to one thread for a step, never for an answer. A sequence that has lost its
place in the cache gets it back, from a copy or by computing its tokens again.

What a sequence computes depends on its own tokens alone, to the last bit. The fused step (see
docs/architecture.md) has two ways whose bits differ, for few tokens and for many; each token of a
sequence is always computed in the same one, and steps never mix the two. Where the model does not
run in the fused step, sequences have the cache one at a time."""

import ctypes
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import ContextError, ModelError
from .cancelling import check_cancelled
from .library import Step, not_computed, run_step
from .places import IDLE, Places
from .prompt_lookup import Costs
from .sequence import Sequence
from .sequence_state import FEW, Made, Rows, State, Wanted, common_prefix

FEW_IN_ALL = 64  # of all sequences
QUICK, LONG = 0.06, 0.15  # seconds that a step of a prompt takes, while others wait and alone
LEAST = 32  # tokens of such a step


class Sequences:
    """The one owner of a context. `context` gives the llama_context; n_slots sequences at most have
    a place in its cache at a time; n_ubatch tokens at most are computed in a step."""

    def __init__(
        self, context: Any, n_slots: int, n_ubatch: int, n_vocab: int, window: int, causal: bool
    ) -> None:
        self.lock = threading.Lock()
        self.context = context
        self.n_ubatch = n_ubatch
        self.places = Places(context, n_slots, n_ubatch, window, causal)
        self._n_slots = n_slots
        self._n_vocab = n_vocab
        self._was_many = False
        self._last_members: list[State] = []  # of the last step, and how long it took
        self._last_seconds = 0.0
        self._rate = LEAST / QUICK  # tokens/s of the last step of many; at first as if it were slow
        self._costs = Costs()
        self._step = Step(n_ubatch)
        self._closed = False
        self._users = threading.Condition()
        self._n_users = 0
        _all.add(self)

    @property
    def fused(self) -> bool | None:
        """Whether steps are computed in one node, once it is known."""
        return self.places.fused

    def open(self, tokens: list[int]) -> Sequence:
        """A new sequence; tokens are its prompt."""
        sequence = Sequence(self)
        sequence.state.add(list(tokens), self.as_many(len(tokens)))
        return sequence

    def known(self, tokens: list[int]) -> int:
        """How many tokens of a prompt other sequences have in the cache."""
        many = self.as_many(len(tokens))
        with self.lock:
            placed = [
                each for each in self.places.placed.values() if each.changes == self.places.changes
            ]
            return max((each.same(tokens, many) for each in placed), default=0)

    def preload(self, tokens: list[int], data: bytes) -> None:
        """Puts K and V of a prompt, from copy() of one in another process, into the cache, for
        prompts that begin like it. Nothing happens where every place is in use."""
        sequence = self.open(tokens)
        state = sequence.state
        with self.lock:
            self.check_open()
            if self.fused is None:
                self._probe()
            state.parked = (ctypes.c_uint8 * len(data)).from_buffer_copy(data)
            state.done, state.changes = len(tokens), self.places.changes
            if self.places.free or any(not each.live for each in self.places.placed.values()):
                self.places.place(state)
            state.live = False

    def states(
        self, texts: list[list[int]], width: int
    ) -> Iterator[npt.NDArray[np.float32] | None]:
        """The hidden states (width: n_embd) of all tokens of each text, several texts in a step
        where the model allows it; None after a step that ends no text."""
        for first in range(0, len(texts), self._n_slots):
            part = [self.open(tokens) for tokens in texts[first : first + self._n_slots]]
            for sequence in part:
                sequence.state.rows = Rows(width, range(len(sequence.tokens)), states=True)
            yield from self._run_together(part)

    def rows(self, tokens: list[int], width: int, indices: list[int]) -> npt.NDArray[np.float32]:
        """The logits after the tokens at these places."""
        sequence = self.open(tokens)
        sequence.state.rows = Rows(width, indices, states=False)
        return sequence.compute(sequence.state.rows)

    def _run_together(self, sequences: list[Sequence]) -> Iterator[npt.NDArray[np.float32] | None]:
        states = [sequence.state for sequence in sequences]
        for state in states:
            state.thread, state.waits = threading.get_ident(), True
        try:
            with self.lock:
                self.check_open()
                if self.fused is None:
                    self._probe()
                for state in states if self.fused else []:
                    self.places.place(state)
            for state in states:
                for _ in self._steps(state):
                    yield None
                state.live = False  # its place is free
                if state.rows is not None:
                    yield state.rows.out
        finally:
            for state in states:
                state.waits = False

    def as_many(self, n: int) -> bool:
        """In which way a prompt of n tokens is computed."""
        return n > FEW if self.n_ubatch > 2 * FEW else False

    def close(self) -> None:
        """Waits for what runs; from now on every call raises ModelError."""
        with self._users:
            self._closed = True
            self._users.wait_for(lambda: self._n_users == 0)
        with self.lock:
            self.places.placed.clear()

    @contextmanager
    def using(self) -> Iterator[None]:
        """Keeps the model from being freed meanwhile."""
        with self._users:
            self.check_open()
            self._n_users += 1
        try:
            yield
        finally:
            with self._users:
                self._n_users -= 1
                self._users.notify_all()

    def change(self, work: Callable[[], None]) -> None:
        """Carries out work that changes what the model computes: all is computed again."""
        with self.lock:
            self.check_open()
            work()
            for state in list(self.places.placed.values()):
                self.places.drop(state)
            self.places.changes += 1
            self.places.fused = None

    def nobody_waits(self) -> None:
        """The other threads are gone."""
        self._n_users = 0
        self.places.waiting.clear()
        for state in self.places.placed.values():
            state.waits = False

    def check_open(self) -> None:
        if self._closed:
            raise ModelError("this model is closed")

    # Going on

    def run(self, state: State) -> None:
        """Returns when nothing of the sequence is pending."""
        for _ in self._steps(state):
            pass

    def _steps(self, state: State) -> Iterator[None]:
        """The steps until nothing of the sequence is pending."""
        self._check_causal(state)
        state.thread = threading.get_ident()
        state.waits, state.since = True, time.monotonic()
        self.places.waiting[id(state)] = state
        try:
            while state.pending():
                check_cancelled()
                if state.watch is not None:
                    state.watch(state.done)
                self._let_others_come(state)
                with self.lock:
                    self.check_open()
                    mine = not state.pending() or self._go_on(state)
                if not mine:
                    time.sleep(IDLE / 4)
                yield
        finally:
            state.waits = False
            self.places.waiting.pop(id(state), None)

    def step(self, state: State) -> None:
        """One step, of the sequence or of those that it would keep waiting."""
        check_cancelled()
        self._check_causal(state)
        state.thread = threading.get_ident()
        with self.lock:
            self.check_open()
            moved = self._go_on(state)
        if not moved:
            time.sleep(IDLE / 4)

    def _check_causal(self, state: State) -> None:
        if not self.places.causal and state.done > 0:
            raise ModelError(
                "the model cannot be run further: it is not causal, an encoder for embeddings"
            )
        if not self.places.causal and len(state.tokens) > self.n_ubatch:
            raise ModelError(
                f"the model cannot be run: it is not causal, and {len(state.tokens)} tokens do not "
                f"fit into one step of n_ubatch {self.n_ubatch}"
            )

    def _let_others_come(self, state: State) -> None:
        """Waits a little, a quarter of a step at most, for callers of the last step to take what it
        made and ask for more: so that the next one is made for all of them."""
        until = time.monotonic() + min(self._last_seconds / 4, IDLE)
        while time.monotonic() < until and any(
            other.live and other.thread != state.thread and not other.pending()
            for other in self._last_members
        ):
            time.sleep(IDLE / 40)

    def _go_on(self, first: State) -> bool:
        """One step that brings `first` on, or others that it would keep waiting. False: there is no
        place in the cache that it may take now."""
        if self.fused is None:
            self._probe()
        if not self.places.place(first):
            return False
        _, _, many = first.run()
        others = self._others(first) if self.fused else []
        few = [state for state in others if not state.run()[2]]
        if not many:
            return self._compute(first, few, many)
        if few and self._was_many and self._compute(few[0], few[1:], many=False):
            return True
        if not self.places.place(first):  # which may have lost it to them
            return False
        return self._compute(first, [s for s in others if s.run()[2] and s.waits], many)

    def _probe(self) -> None:
        """Computes a token to see how this model runs, with what is set at the moment."""
        for state in list(self.places.placed.values()):
            self.places.drop(state)
        slot = self.places.free[-1]
        self._step.clear(states=False)
        self._step.add(0, 0, slot)
        result = run_step(self.context, self._step)
        self.places.remove(slot, 0)
        if result != 0:
            raise not_computed(result)
        self.places.fused = self._step.fused

    def _others(self, first: State) -> list[State]:
        """Sequences with a place that can go on."""
        states = (first.rows or _none).states
        return [
            state
            for state in self.places.placed.values()
            if state is not first
            and state.live
            and state.pending()
            and (state.wanted is not None or state.rows is not None)
            and (state.rows or _none).states == states
        ]

    def _compute(self, first: State, along: list[State], many: bool) -> bool:
        """One step of a sequence and those that go along. False: there is no room for now."""
        drafts = not many and bool(self.fused)
        while True:
            members = self._gather(first, along, many, drafts)
            step = self._step
            start = time.monotonic()
            result = run_step(self.context, step)
            if result == 0:
                self._was_many = many
                self._last_seconds = time.monotonic() - start
                if many:
                    self._rate = sum(m.n for m in members) / max(self._last_seconds, 1e-9)
                elif len(members) == 1:
                    self._costs.learn(step.native.n_tokens, self._last_seconds)
                self._deliver(members)
                self._last_members = [member.state for member in members]
                return True
            if any(member.draft for member in members):
                drafts = False
            elif result == 2:  # somebody else has changed the cache
                for state in (member.state for member in members):
                    if self.places.last_position(state) != state.done - 1:
                        self.places.drop(state)
                along = []
                if not self.places.place(first):
                    return False
            elif result == 1:
                if self.places.make_room(first, keep=[first, *along]):
                    continue
                if not along and len(self.places.placed) > 1:
                    return False
                if not along:
                    raise ContextError("the context is full")
                along = []
            elif along:  # let those that can be computed be
                along = []
            else:
                raise not_computed(result)

    def _gather(
        self, first: State, along: list[State], many: bool, drafts: bool
    ) -> list["_Member"]:
        """Fills the step; who takes part in it."""
        step = self._step
        step.clear(states=first.rows is not None and first.rows.states)
        room = self.n_ubatch
        if self.fused and many:
            room = int(self._rate * (QUICK if self._busy(first) else LONG))
            room = min(self.n_ubatch, max(LEAST, room))
        elif self.fused:
            room = min(self.n_ubatch, FEW_IN_ALL)
        members = []
        for state in [first, *along]:
            n = self._piece(state, many, room)
            if n > 0:
                room -= n
                members.append(_Member(state, n))
        if drafts:
            self._draft(members)
        for member in members:
            self.places.trim(member.state)
            self._fill(member)
        return members

    def _draft(self, members: list["_Member"]) -> None:
        """Lets sequences of which one token is left draft what follows. Of many callers each gains
        less, for their steps read the weights for several tokens in any case."""
        room = min(FEW, self.n_ubatch) - sum(member.n for member in members)
        cost = self._costs.more
        gain = (1 + cost * (len(members) - 1)) / len(members)
        for member in members:
            state = member.state
            if not state.lookup or not state.wanted or len(state.tokens) - state.done != 1:
                continue
            # what a caller may refuse later must not have driven cells out of a window
            if state.wanted.chain is not None or not self.places.window:
                member.draft = state.lookup.draft(state.tokens, room, gain, cost)
                room -= len(member.draft)

    def _busy(self, first: State) -> bool:
        """Whether other sequences are being gone on with."""
        recent = time.monotonic() - 25 * IDLE
        return bool(self.fused) and any(
            state is not first and state.live and (state.pending() or state.last > recent)
            for state in self.places.placed.values()
        )

    def _piece(self, state: State, many: bool, room: int) -> int:
        """How many tokens of a sequence to compute in a step with so much room; 0: none."""
        start, end, _ = state.run()
        rest = end - state.done
        if self.fused and not many:
            return min(rest, FEW, room)
        if not self.fused:  # always in the same pieces
            return min(rest, self.n_ubatch - (state.done - start) % self.n_ubatch)
        n = min(rest, room)
        if 0 < rest - n <= FEW:
            n = rest - FEW - 1
        return n if n > FEW or n == rest else 0

    def _fill(self, member: "_Member") -> None:
        step, state = self._step, member.state
        begin, last = state.done, len(state.tokens) - 1
        for index in range(begin, begin + member.n):
            step.add(state.tokens[index], index, state.slot)
            if state.rows is not None:
                if state.rows.states or state.rows.address(index):
                    step.want(rows=state.rows.address(index))
            elif index == last and state.wanted is not None:
                self._want(member, state.wanted)
        for index, token in enumerate(member.draft, last + 1):
            step.add(token, index, state.slot)
            assert state.wanted is not None
            self._want(member, state.wanted)

    def _want(self, member: "_Member", wanted: Wanted) -> None:
        """Of the token that was added last."""
        if wanted.chain is None:
            logits = np.empty(self._n_vocab, np.float32)
            self._step.want(rows=logits.ctypes.data)
            member.made.append((None, logits))
        else:
            self._step.want(chain=wanted.chain, n_best=wanted.n_best)
            member.made.append((None, None))

    def _deliver(self, members: list["_Member"]) -> None:
        now, at = time.monotonic(), 0
        for member in members:
            state, begin, end = member.state, member.state.done, member.state.done + member.n
            state.turn += 1
            state.last = now
            if state.rows is not None:
                rows = state.rows
                wanted = [1 for i in range(begin, end) if rows.states or rows.address(i)]
                at += len(wanted)
            elif member.made:
                made, agreed = member.made, len(member.draft)
                if made[0][1] is None:  # else the caller chooses
                    chosen = [self._step.chosen(at + i) for i in range(len(made))]
                    agreed = common_prefix(chosen[:-1], member.draft)
                    made = [(token, None) for token in chosen[: agreed + 1]]
                at += len(member.made)
                end += agreed
                state.add(member.draft[:agreed], many=False)
                state.made = made
                if agreed < len(member.draft):
                    self.places.remove(state.slot, end)
            state.done = end  # last: from now on its caller may look at what was made


class _Member:
    """A sequence in a step: how many of its tokens, what is drafted behind them, and what is wanted
    of the last one and of the draft."""

    def __init__(self, state: State, n: int) -> None:
        self.state = state
        self.n = n
        self.draft: list[int] = []
        self.made: list[Made] = []


class _NoRows:
    states = False


_none: Any = _NoRows()

# A fork waits for steps to end: the child then finds every cache as it was between two of them.
_all: "weakref.WeakSet[Sequences]" = weakref.WeakSet()
_held: list[Sequences] = []


def _before_fork() -> None:
    _held[:] = list(_all)
    for owner in _held:
        owner.lock.acquire()
        owner._users.acquire()


def _after_fork() -> None:
    for owner in _held:
        owner._users.release()
        owner.lock.release()
    _held.clear()


def _after_fork_in_child() -> None:
    for owner in _held:
        owner.nobody_waits()
    _after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork_in_child
    )
