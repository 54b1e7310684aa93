"""asyncio variants of MobileLLM's calls: none blocks the loop, and a cancelled one ends at once.

Each call has a thread of its own, so calls that wait at the same time are computed together, as
those of any threads are. When its task is cancelled, the task goes on at once and the thread ends
before its next step, in the midst of a prompt, too."""

import contextvars
import threading
from collections import deque
from collections.abc import (
    AsyncIterator,
    Callable,
    Generator,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
from typing_extensions import Self, Unpack

from .cancelling import Cancelled, cancelled_by
from .sampling_types import Sampling

if TYPE_CHECKING:
    from .answers import Answer, Stream, Usage
    from .batches import Prompt
    from .messages import Message
    from .tools import ToolCall

T = TypeVar("T")

AHEAD = 16  # items that a thread makes before somebody takes them


class _Work(Generic[T]):
    """What a thread and the loop share of one call. make, which gives the iterator, and the
    iterator itself run on the thread."""

    def __init__(self, make: Callable[[], Iterator[T]]) -> None:
        import asyncio  # 7 MB that the caller of a coroutine has anyhow

        self.loop = asyncio.get_running_loop()
        self.cancelled = threading.Event()
        self.source: Iterator[T] | None = None
        self.items: deque[T] = deque()  # this and what follows is the loop's
        self.started = self.ended = False
        self.error: BaseException | None = None
        self.news = asyncio.Event()
        self._make = make
        self._room = threading.Semaphore(AHEAD)
        run = contextvars.copy_context().run
        threading.Thread(target=run, args=(self._run,), name="mobilellm").start()

    def cancel(self) -> None:
        self.cancelled.set()
        self._room.release()

    def take(self) -> T:
        self._room.release()
        return self.items.popleft()

    def _run(self) -> None:
        cancelled_by(self.cancelled)
        error: BaseException | None = None
        try:
            self.source = self._make()
            self._tell(self._start)
            for item in self.source:
                while not self._room.acquire(timeout=1) and not self.loop.is_closed():
                    pass
                if self.cancelled.is_set():
                    break
                self._tell(self._add, item)
        except Cancelled:
            pass
        except BaseException as caught:
            error = caught
        finally:
            close = getattr(self.source, "close", None)
            if close is not None:
                close()
            self._tell(self._end, error)

    def _tell(self, what: Callable[..., None], *arguments: Any) -> None:
        def told() -> None:
            what(*arguments)
            self.news.set()

        try:
            self.loop.call_soon_threadsafe(told)
        except RuntimeError:  # the loop is closed: nobody will hear it
            self.cancelled.set()

    def _start(self) -> None:
        self.started = True

    def _add(self, item: T) -> None:
        self.items.append(item)

    def _end(self, error: BaseException | None) -> None:
        self.ended, self.error = True, error


class AsyncItems(AsyncIterator[T]):
    """What a thread makes, item by item, at most 16 ahead of who takes them. It ends with the last
    item, with aclose(), `async with` or del, and with the task that waits for an item."""

    def __init__(self, make: Callable[[], Iterator[T]]) -> None:
        self._work = _Work(make)

    def __await__(self) -> Generator[Any, None, Self]:
        """Waits until the arguments are checked, raises what is wrong with them, and gives this
        object. Who does not wait gets the error in the place of the first item."""
        yield from self._until(lambda work: work.started or work.ended).__await__()
        if not self._work.started:
            self._raise()
        return self

    async def __anext__(self) -> T:
        await self._until(lambda work: bool(work.items) or work.ended)
        if self._work.items:
            return self._work.take()
        self._raise()
        raise StopAsyncIteration

    async def aclose(self) -> None:
        """Ends it: what is being computed stops before its next step."""
        self._work.cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    def __del__(self) -> None:
        if hasattr(self, "_work"):  # there was a loop
            self._work.cancel()

    async def _until(self, ready: Callable[[_Work[T]], bool]) -> None:
        try:
            while not ready(self._work):
                self._work.news.clear()
                await self._work.news.wait()
        except BaseException:  # asyncio's CancelledError
            self._work.cancel()
            raise

    def _raise(self) -> None:
        error, self._work.error = self._work.error, None
        if error is not None:
            raise error


class AsyncStream(AsyncItems[str]):
    """Stream for asyncio: `async for` gives the pieces of a text. finish_reason is set once all
    pieces were taken; usage counts the tokens that were made."""

    @property
    def finish_reason(self) -> str | None:
        """As of Stream: None, "stop" or "length"."""
        done = self._work.ended and not self._work.items
        return getattr(self._work.source, "finish_reason", None) if done else None

    @property
    def tool_calls(self) -> "list[ToolCall]":
        """As of Stream, once all pieces were taken."""
        done = self._work.ended and not self._work.items
        return getattr(self._work.source, "tool_calls", []) if done else []

    @property
    def usage(self) -> "Usage":
        """As of Stream; before the prompt was looked at there are no tokens."""
        none: Usage = {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}
        found: Usage | None = getattr(self._work.source, "usage", None)
        return found or none


async def in_thread(function: Callable[[], T]) -> T:
    """The result of a function that runs on a thread of its own. Where its task is cancelled, what
    it computes with a model ends before the next step."""
    return await AsyncItems(lambda: iter([function()])).__anext__()


class _Calls(Protocol):
    """What the calls below are made of."""

    @property
    def stream(self) -> "Callable[..., Stream]": ...
    @property
    def chat(self) -> "Callable[..., Answer]": ...
    @property
    def batch(self) -> "Callable[..., list[Answer]]": ...
    @property
    def embeddings(self) -> Callable[..., npt.NDArray[np.float32]]: ...
    @property
    def create_completion(self) -> Callable[..., Any]: ...
    @property
    def create_chat_completion(self) -> Callable[..., Any]: ...


class AsyncCalls:
    """The calls of MobileLLM for asyncio; arguments, results and errors are those of the calls
    without the `a`."""

    def astream(
        self: _Calls,
        prompt: "str | Sequence[Message]",
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        tool_choice: str = "auto",
        parallel_tool_calls: bool = False,
        **sampling: Unpack[Sampling],
    ) -> AsyncStream:
        """stream, as an asynchronous iterator. `await llm.astream(...)` gives it once the prompt
        and the arguments are known to be sound."""
        offered = _offered(tools, tool_choice, parallel_tool_calls)
        return AsyncStream(lambda: self.stream(prompt, **offered, **sampling))

    async def achat(
        self: _Calls,
        messages: "Sequence[Message]",
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        tool_choice: str = "auto",
        parallel_tool_calls: bool = False,
        **sampling: Unpack[Sampling],
    ) -> "Answer":
        """chat."""
        offered = _offered(tools, tool_choice, parallel_tool_calls)
        return await in_thread(lambda: self.chat(messages, **offered, **sampling))

    async def abatch(self: _Calls, prompts: "Iterable[Prompt]", **arguments: Any) -> "list[Answer]":
        """batch."""
        return await in_thread(lambda: self.batch(prompts, **arguments))

    async def aembeddings(
        self: _Calls, texts: Sequence[str], normalize: bool = True, truncate: bool = False
    ) -> npt.NDArray[np.float32]:
        """embeddings."""
        return await in_thread(lambda: self.embeddings(texts, normalize, truncate))

    async def acreate_completion(
        self: _Calls, prompt: str | list[int], *, stream: bool = False, **arguments: Any
    ) -> Any:
        """create_completion; with stream=True an asynchronous iterator of its pieces."""
        return await _openai(self.create_completion, prompt, stream, arguments)

    async def acreate_chat_completion(
        self: _Calls, messages: Sequence[Any], *, stream: bool = False, **arguments: Any
    ) -> Any:
        """create_chat_completion; with stream=True an asynchronous iterator of its pieces."""
        return await _openai(self.create_chat_completion, messages, stream, arguments)


def _offered(tools: Any, tool_choice: str, parallel_tool_calls: bool) -> dict[str, Any]:
    return {
        "tools": tools,
        "tool_choice": tool_choice,
        "parallel_tool_calls": parallel_tool_calls,
    }


async def _openai(call: Any, first: Any, stream: bool, arguments: dict[str, Any]) -> Any:
    if stream:
        return AsyncItems(lambda: call(first, stream=True, **arguments))
    return await in_thread(lambda: call(first, **arguments))
