"""What stands before the server: who may ask, from which page, and how much at once."""

import asyncio
import secrets
import time
from collections.abc import Callable, Sequence
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import ApiError

SLOW = 60  # seconds in which a body must have come
LOOPBACK = ("localhost", "127.0.0.1", "::1")
OPEN = ("/", "/health", "/static/")  # needs no key: the page, and whether the server is there


class Gate:
    """An ASGI app in front of another one.

    key: what `Authorization: Bearer` must hold; None: nothing. hosts: names by which the server may
    be called; a page elsewhere whose name leads here (DNS rebinding) is turned away; None: any.
    origins: pages of other servers that may ask, "*": all of them. max_bytes: of a body. seen is
    told of each request its path, the status and the seconds that it took."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        key: str | None,
        hosts: Sequence[str] | None,
        origins: Sequence[str],
        max_bytes: int,
        seen: Callable[[str, int, float], None],
    ) -> None:
        self._seen = seen
        self._app, self._hosts, self._origins, self._max = app, hosts, origins, max_bytes
        self._key = None if key is None else key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, status = time.monotonic(), 499  # as nginx says it: the client left before an answer
        scope = dict(scope)  # the router writes into it

        async def sent(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            await self._pass(scope, receive, sent)
        finally:
            path = getattr(scope.get("route"), "path", "other")
            self._seen(path, status, time.monotonic() - start)

    async def _pass(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = dict(scope["headers"])
        try:
            self._check(scope, headers)
            body = await asyncio.wait_for(self._read(receive), SLOW)
        except ApiError as error:
            await error.response(scope["path"])(scope, receive, send)
            return
        except asyncio.TimeoutError:
            late = ApiError(408, f"the body did not come within {SLOW} seconds")
            await late.response(scope["path"])(scope, receive, send)
            return
        if scope["method"] == "POST":
            # what curl -d sends is called a form; bodies are JSON here, whatever they are called
            others = [item for item in scope["headers"] if item[0] != b"content-type"]
            scope["headers"] = [*others, (b"content-type", b"application/json")]
        await self._app(scope, _after(body, receive), send)

    def _check(self, scope: Scope, headers: dict[bytes, bytes]) -> None:
        host = _name(headers.get(b"host", b""))
        if self._hosts is not None and host not in self._hosts:
            raise ApiError(403, "this server is not called by that name", code="wrong_host")
        origin = headers.get(b"origin")
        if origin is not None and "*" not in self._origins:
            text = origin.decode("latin-1")
            own = urlsplit(text).netloc.encode("latin-1") == headers.get(b"host")
            if not own and text not in self._origins:
                raise ApiError(403, "pages of other sites may not ask here", code="wrong_origin")
        path = scope["path"]
        is_open = path in OPEN or path.startswith(OPEN[-1])
        if self._key is not None and not is_open and scope["method"] != "OPTIONS":
            kind, _, given = headers.get(b"authorization", b"").partition(b" ")
            if kind.lower() != b"bearer" or not secrets.compare_digest(given.strip(), self._key):
                raise ApiError(
                    401,
                    "the API key is missing or wrong",
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length[:20]) > self._max:
            raise self._too_large()

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the body has more than {self._max} bytes", code="request_too_large")

    async def _read(self, receive: Receive) -> bytes:
        body = bytearray()
        while True:
            message = await receive()
            body += message.get("body", b"")
            if len(body) > self._max:
                raise self._too_large()
            if not message.get("more_body"):  # or the client is gone
                return bytes(body)


def _after(body: bytes, receive: Receive) -> Receive:
    """What gives a body that was read, and then what comes."""
    first: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replayed() -> Message:
        return first.pop() if first else await receive()

    return replayed


def _name(host: bytes) -> str:
    """The name in a Host header, without its port."""
    try:
        return urlsplit(f"//{host.decode('latin-1')}").hostname or ""
    except ValueError:
        return ""
