"""An answer on its way to a client: whole or in parts, given up as soon as the client leaves."""

import asyncio
import json
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from .errors import ApiError, as_api_error


def to_json(value: Any) -> bytes:
    """In one line of ASCII, so that whatever a text holds can be sent."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).encode()


class Answer(Response, ABC):
    """What an endpoint returns for work that takes a while. `end` is called once nothing more is
    wanted: the client has all, or is gone. It may take `seconds`."""

    def __init__(self, end: Callable[[], None], seconds: float, media_type: str) -> None:
        self._end, self._seconds = end, seconds
        self._begun = False
        self.background = None
        self.status_code, self.media_type = 200, media_type
        self.init_headers({"Cache-Control": "no-cache"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sending = asyncio.ensure_future(self._send(send))
        leaving = asyncio.ensure_future(_left(receive))
        try:
            await asyncio.wait(
                {sending, leaving}, timeout=self._seconds, return_when=asyncio.FIRST_COMPLETED
            )
            if not sending.done() and not leaving.done():
                sending.cancel()
                await self._fail(TimeoutError(), send)
            elif sending.done() and (error := sending.exception()) is not None:
                await self._fail(error, send)
        finally:
            sending.cancel()
            leaving.cancel()
            self._end()

    @abstractmethod
    async def _send(self, send: Send) -> None: ...

    async def _fail(self, error: BaseException, send: Send) -> None:
        raise error

    async def _begin(self, send: Send) -> None:
        if not self._begun:
            self._begun = True
            headers = self.raw_headers
            await send({"type": "http.response.start", "status": 200, "headers": headers})


class Whole(Answer):
    """One JSON value, when it is there."""

    def __init__(
        self, make: Callable[[], Awaitable[Any]], end: Callable[[], None], seconds: float
    ) -> None:
        super().__init__(end, seconds, "application/json")
        self._make = make

    async def _send(self, send: Send) -> None:
        body = to_json(await self._make())
        self.headers["content-length"] = str(len(body))
        await self._begin(send)
        await send({"type": "http.response.body", "body": body})


class Parts(Answer):
    """Parts as they come. Nothing is sent before the first one is there, so that an error has its
    status; a later one is said by on_error."""

    def __init__(
        self,
        parts: AsyncIterator[bytes],
        end: Callable[[], None],
        seconds: float,
        on_error: Callable[[ApiError], bytes],
        media_type: str = "text/event-stream",
    ) -> None:
        super().__init__(end, seconds, media_type)
        self._parts, self._on_error = parts, on_error

    async def _send(self, send: Send) -> None:
        async for part in self._parts:
            await self._begin(send)
            await send({"type": "http.response.body", "body": part, "more_body": True})
        await self._begin(send)
        await send({"type": "http.response.body", "body": b""})

    async def _fail(self, error: BaseException, send: Send) -> None:
        if not self._begun or not isinstance(error, Exception):
            raise error
        last = self._on_error(as_api_error(error))
        await send({"type": "http.response.body", "body": last})


async def _left(receive: Receive) -> None:
    """Returns when the client is gone."""
    while (await receive())["type"] != "http.disconnect":
        pass


def event(value: Any) -> bytes:
    """A server-sent event."""
    return b"data: " + to_json(value) + b"\n\n"


DONE = b"data: [DONE]\n\n"


def event_error(error: ApiError) -> bytes:
    return event(error.body("/v1/"))
