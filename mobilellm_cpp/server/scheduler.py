"""One thread that goes on with all answers of a server: a token of each in turn, and a piece of one
prompt in between.

Answers that are gone on with in turn by one thread are computed together (see engine/sequences.py)
without a thread for each to be woken at every token. They come in the order in which they were
asked for: those go on, from the first, that have a place and whose tokens the KV cache holds
together. Nothing here waits for a client."""

import asyncio
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Sequence
from typing import Protocol

from ..engine.answers import Usage
from ..engine.model import MobileLLM

BURST = 0.05  # seconds that an answer goes on where the model computes one at a time


class Work(Protocol):
    """What is gone on with: an engine.model.Stream, for one."""

    @property
    def reads(self) -> bool: ...  # whether its next step is one of many tokens

    @property
    def n_tokens(self) -> int: ...  # that it has in the KV cache

    @property
    def usage(self) -> Usage: ...

    def advance(self) -> str: ...  # a step at most; raises StopIteration at the end

    def close(self) -> None: ...


class Busy(Exception):
    """Too many wait already."""


# The number of a work and a piece of its text; None: it has ended.
News = AsyncIterator[tuple[int, str | None]]


class Job:
    """Several works that one client waits for."""

    def __init__(self, works: Sequence[Work]) -> None:
        self.works = works
        self.left = set(range(len(works)))  # those that have not ended
        self.started = False
        self.cancelled = False
        self.asked = time.monotonic()
        self.first: float | None = None  # when the first news came
        self._loop = asyncio.get_running_loop()
        self._news: deque[tuple[int, str | None | Exception]] = deque()
        self._woken = asyncio.Event()

    async def news(self) -> News:
        """The number of a work and a piece of its text; None when it has ended. Ends when all have.
        Raises what a work raised."""
        ended = 0
        while ended < len(self.works):
            while self._news:
                number, piece = self._news.popleft()
                if isinstance(piece, Exception):
                    raise piece
                ended += piece is None
                yield number, piece
            if ended < len(self.works):
                self._woken.clear()
                await self._woken.wait()

    def tell(self, number: int, piece: str | None | Exception) -> None:
        """In the event loop."""
        if self.first is None:
            self.first = time.monotonic()
        self._news.append((number, piece))
        self._woken.set()


_Told = list[tuple[Job, int, str | None | Exception]]


class Scheduler:
    """Goes on with jobs until it is closed. At most max_waiting of them wait for a place."""

    def __init__(self, llm: MobileLLM, max_waiting: int) -> None:
        self._llm = llm
        self._max_waiting = max_waiting
        self._jobs: list[Job] = []  # in the order in which they came
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="mobilellm-server", daemon=True)
        self._thread.start()

    def submit(self, works: Sequence[Work]) -> Job:
        """Starts to go on with works, in the running event loop. Raises Busy."""
        job = Job(works)
        with self._changed:
            self._check_room()
            self._jobs.append(job)
            self._changed.notify()
        return job

    def check_room(self) -> None:
        """Raises Busy where submit would."""
        with self._changed:
            self._check_room()

    def _check_room(self) -> None:
        if sum(not job.started for job in self._jobs) >= self._max_waiting:
            raise Busy

    def cancel(self, job: Job) -> None:
        """Nobody waits for a job any more; no harm is done if it has ended."""
        job.cancelled = True
        with self._changed:
            self._changed.notify()

    def count(self) -> tuple[int, int]:
        """How many works go on, and how many wait."""
        with self._changed:
            going = sum(len(job.left) for job in self._jobs if job.started)
            return going, sum(len(job.left) for job in self._jobs if not job.started)

    def alive(self) -> bool:
        """Whether jobs go on."""
        return self._thread.is_alive()

    def close(self) -> None:
        """Ends all jobs."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._jobs or self._closed)
                for job in [job for job in self._jobs if job.cancelled or self._closed]:
                    for number in job.left:
                        job.works[number].close()
                    self._jobs.remove(job)
                if self._closed:
                    return
                jobs = list(self._jobs)
            self._round(self._going(jobs))

    def _going(self, jobs: list[Job]) -> list[tuple[Job, int]]:
        """The works that may go on now."""
        going: list[tuple[Job, int]] = []
        room = self._llm.n_ctx()
        for job in jobs:
            for number in sorted(job.left):
                room -= job.works[number].n_tokens
                if going and (room < 0 or len(going) == self._llm.n_slots):
                    return going
                job.started = True
                going.append((job, number))
        return going

    def _round(self, going: list[tuple[Job, int]]) -> None:
        """A token of each answer; then a step for the first one whose prompt is being read."""
        reading = None
        news: _Told = []
        for job, number in going:
            if not job.works[number].reads:
                self._go_on(job, number, news)
            elif reading is None:
                reading = (job, number)
        self._send(news)
        if reading is not None:
            news = []
            self._go_on(*reading, news)
            self._send(news)

    def _go_on(self, job: Job, number: int, news: _Told) -> None:
        work = job.works[number]
        until = time.monotonic() + BURST
        while not job.cancelled:
            try:
                piece = work.advance()
            except StopIteration:
                job.left.discard(number)
                news.append((job, number, None))
                break
            except Exception as error:  # of one answer: the others go on
                work.close()
                job.left.discard(number)
                news.append((job, number, error))
                break
            if piece:
                news.append((job, number, piece))
            if self._llm.computes_together or work.reads or time.monotonic() > until:
                return
        if not job.left:
            with self._changed:
                if job in self._jobs:
                    self._jobs.remove(job)

    def _send(self, news: _Told) -> None:
        if news:
            loop = news[0][0]._loop
            try:
                loop.call_soon_threadsafe(_tell, news)
            except RuntimeError:  # the loop is closed: nobody listens
                for job, _, _ in news:
                    job.cancelled = True


def _tell(news: _Told) -> None:
    for job, number, piece in news:
        job.tell(number, piece)
