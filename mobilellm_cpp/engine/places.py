"""Who has a place in the KV cache: which sequences share it, who loses its place to whom, and what
of a sequence is copied out and back."""

import ctypes
import time
from typing import Any

from ..errors import ModelError
from .library import llama_cpp
from .sequence_state import FEW, State
from .states import put_state

TURN = 32  # steps that a sequence may make before it loses its place to another one that waits
PATIENCE = 0.05  # seconds after which the caller who has waited longest gets a place in any case
IDLE = 0.002  # seconds after its last step in which a sequence keeps its place


class Places:
    """n_slots sequences at most have a place in a context's cache at a time. Whoever calls holds
    the lock of the context."""

    def __init__(self, context: Any, n_slots: int, n_ubatch: int, window: int, causal: bool):
        self.context = context
        self.fused: bool | None = None  # whether steps are computed in one node, once it is known
        self.window = window
        self.placed: dict[int, State] = {}
        # where there are several, 0 is left to who calls llama.h directly
        self.free = list(range(1, n_slots + 1)) if n_slots > 1 else [0]
        self.waiting: dict[int, State] = {}  # for whom callers wait
        self.changes = 0  # of what the model computes
        self._memory = llama_cpp.llama_get_memory(context)
        self._n_ubatch = n_ubatch
        self.causal = causal and bool(self._memory)  # encoders have no cache

    def place(self, state: State) -> bool:
        """Sees to it that a sequence has a place with its done tokens. False: not now."""
        if state.slot is not None:
            self.trim(state)
            return True
        if state.changes != self.changes:
            state.changes, state.parked, state.done = self.changes, None, 0
        if not self.fused and self.placed and not self._leave_alone(state):
            return False
        if state.parked is None and state.done == 0 and self._start_from_another(state):
            return True
        if not self.free and not self.make_room(state, keep=[state]):
            return False
        slot = self.free.pop()
        self._give_slot(state, slot)
        while state.parked is not None:
            if put_state(self.context, state.parked, slot):
                state.parked = None
                self.remove(slot, state.done)
            elif self.make_room(state, keep=[state]):
                continue
            elif len(self.placed) > 1:  # others will go
                self._leave(state)
                return False
            else:
                state.parked, state.done = None, 0  # computed again
        return True

    def trim(self, state: State) -> None:
        """What a placed sequence has forgotten goes."""
        if state.trim:
            self.remove(state.slot, state.done)
            state.trim = False

    def _leave_alone(self, state: State) -> bool:
        """Where sequences have the cache one at a time: takes it from the one that has it, unless
        that is of use to the new one."""
        for other in list(self.placed.values()):
            if other.live and not self._may_go(other, state):
                return False
            if other.live or not self._shared(other, state):
                self._take_place(other)
        return True

    def _start_from_another(self, state: State) -> bool:
        """Gives a new sequence the beginning that another one has computed in the same way."""
        best = max(self.placed.values(), key=lambda s: self._shared(s, state), default=None)
        shared = self._shared(best, state) if best else 0
        if best is None or shared == 0 or not self.can_cut(best, shared):
            return False
        if not best.live:
            slot = best.slot
            del self.placed[slot]
            best.slot, best.done = None, 0
            self.remove(slot, shared)
        elif self.fused and (self.free or self.make_room(state, keep=[state, best])):
            slot = self.free.pop()
            llama_cpp.llama_memory_seq_cp(self._memory, best.slot, slot, 0, shared)
        else:
            return False
        state.done = state.found = shared
        self._give_slot(state, slot)
        return True

    def _shared(self, other: State, state: State) -> int:
        """How many tokens a new sequence may take over from another one: the rest must be computed
        in the way in which it would be, were nothing there."""
        many = state.runs[0][1]
        first = state.runs[0][0]
        if state.rows is not None or not self.causal:
            return 0  # something is wanted of each
        n = other.same(state.tokens[:first], many)
        if not self.fused:  # whole pieces
            return min(n, first - 1) // self._n_ubatch * self._n_ubatch
        n = min(n, first - FEW - 1 if many else first - 1)
        return n if n > FEW or not many else 0

    def make_room(self, state: State, keep: list[State]) -> bool:
        """Takes the place of the sequence that is least likely to need it."""
        others = [s for s in self.placed.values() if all(s is not k for k in keep)]
        others = [s for s in others if not s.live or self._may_go(s, state)]
        if not others:
            return False
        self._take_place(min(others, key=lambda s: (s.live, s.waits, s.last)))
        return True

    def _may_go(self, other: State, state: State) -> bool:
        now = time.monotonic()
        if other.thread == state.thread or other.turn >= TURN:
            return True
        if not other.waits and now - other.last > IDLE:
            return True
        first = min(list(self.waiting.values()), key=lambda s: s.since, default=state)
        return first is state and now - state.since > PATIENCE

    def _take_place(self, state: State) -> None:
        self.trim(state)
        if state.live and state.done > 0 and self.last_position(state) == state.done - 1:
            state.parked = self.copied(state)
            done = state.done
            self.drop(state)
            state.done = done
        else:
            self.drop(state)

    def drop(self, state: State) -> None:
        """The sequence has nothing in the cache any more."""
        if state.slot is not None:
            self._leave(state)
        state.done = 0

    def _leave(self, state: State) -> None:
        slot, state.slot = state.slot, None
        self.remove(slot, 0)
        del self.placed[slot]
        self.free.append(slot)

    def copied(self, state: State) -> Any:
        """K and V of a placed sequence."""
        size = llama_cpp.llama_state_seq_get_size(self.context, state.slot)
        data = (ctypes.c_uint8 * size)()
        n = llama_cpp.llama_state_seq_get_data(self.context, data, size, state.slot)
        if n == 0 or n > size:
            raise ModelError("the state of a sequence cannot be copied")
        return data

    def can_cut(self, state: State, length: int) -> bool:
        """Whether a sequence can go on after its first tokens: sliding layers may have dropped some
        that the next one would see."""
        if not self.window or length == 0 or length >= state.done or state.slot is None:
            return not (self.window and state.parked is not None and length < state.done)
        first = llama_cpp.llama_memory_seq_pos_min(self._memory, state.slot)
        return bool(first <= max(0, length - self.window + 1))

    def _give_slot(self, state: State, slot: int) -> None:
        state.slot, state.turn, state.trim = slot, 0, False
        self.placed[slot] = state

    def remove(self, slot: int, start: int) -> None:
        llama_cpp.llama_memory_seq_rm(self._memory, slot, start, -1)

    def last_position(self, state: State) -> int:
        return int(llama_cpp.llama_memory_seq_pos_max(self._memory, state.slot))
