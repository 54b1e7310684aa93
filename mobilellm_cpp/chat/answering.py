"""An answer that is made by a thread of its own, so that the terminal can draw and be interrupted.

Ctrl-C only sets a flag, which is looked at before each step of computing. So an answer ends between
two steps, whatever it is at, and nothing is left half done.
"""

import queue
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from ..engine.cancelling import cancelled_by, check_cancelled
from ..engine.conversation import Conversation

TICK = 0.1  # seconds after which a view is asked to draw although nothing happened


@dataclass
class Stats:
    """What the last answer took. Seconds are those of reading its prompt and of making it."""

    prompt: int = 0  # tokens
    reused: int = 0  # of these were known from before
    made: int = 0
    reading: float = 0.0
    making: float = 0.0

    @property
    def speed(self) -> float:
        """Tokens a second, the first one apart, which reading has paid for."""
        return (self.made - 1) / self.making if self.made > 1 and self.making > 0 else 0.0


class Answering:
    """One answer. Iterate: a piece of text, or "" where only time or reading went on. Afterwards
    the conversation has the answer; where an error or Cancelled comes it is as it was."""

    def __init__(self, conversation: Conversation, text: str) -> None:
        self.stats = Stats()
        self.read = 0  # tokens of the prompt
        self.finish_reason: str | None = None
        self._conversation = conversation
        self._text = text
        self._error: BaseException | None = None
        self._stop = threading.Event()
        self._pieces: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._make, daemon=True)

    def stop(self) -> None:
        """Ends it soon."""
        self._stop.set()

    @property
    def stopping(self) -> bool:
        return self._stop.is_set()

    def __iter__(self) -> Iterator[str]:
        with _interrupts(self):
            self._thread.start()
            try:
                while (piece := self._next()) is not None:
                    yield piece
            finally:
                self.stop()  # who iterates may have had enough
                self._thread.join()
        if self._error is not None:
            raise self._error

    def _next(self) -> str | None:
        try:
            return self._pieces.get(timeout=TICK)
        except queue.Empty:
            return ""

    def _make(self) -> None:
        cancelled_by(self._stop)
        start = first = time.monotonic()
        talk = self._conversation
        turns = talk.turns
        pieces = talk.answer(self._text, self._watch)
        try:
            for piece in pieces:
                self._count(talk)
                if self.stats.made == 1 or not self.stats.reading:
                    first = time.monotonic()
                    self.stats.reading = first - start
                self.stats.making = time.monotonic() - first
                self._pieces.put(piece)
                check_cancelled()
            self._count(talk)
            if talk.stream is not None:
                self.finish_reason = talk.stream.finish_reason
        except BaseException as error:
            pieces.close()
            talk.turns = turns
            self._error = error
        self._pieces.put(None)

    def _count(self, talk: Conversation) -> None:
        if talk.stream is not None:
            self.stats.prompt = talk.stream.usage["prompt_tokens"]
            self.stats.made = talk.stream.usage["completion_tokens"]
            self.stats.reused = talk.reused

    def _watch(self, read: int) -> None:
        self._count(self._conversation)
        self.read = min(read, self.stats.prompt)


@contextmanager
def _interrupts(answering: Answering) -> Iterator[None]:
    """Makes Ctrl-C stop the answer meanwhile, and nothing else."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, lambda *_: answering.stop())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
