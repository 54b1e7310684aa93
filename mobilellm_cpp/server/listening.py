"""Listens on a socket until it is told to stop: running answers end first."""

import contextlib
import errno
import ipaddress
import os
import signal
import socket
import sys
from collections.abc import Iterator
from typing import Any

import uvicorn

from ..errors import ModelError


def is_public(host: str) -> bool:
    """Whether others than this machine can reach what listens there."""
    if host == "localhost":
        return False
    with contextlib.suppress(ValueError):
        return not ipaddress.ip_address(host).is_loopback
    return True


def bind(host: str, port: int) -> socket.socket:
    """A listening socket. Raises ModelError where there can be none."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=256)
    except (OSError, OverflowError) as error:
        number = getattr(error, "errno", None)
        reason = os.strerror(number) if number and number > 0 else error
        hint = "; --port names another one" if number == errno.EADDRINUSE else ""
        raise ModelError(f"cannot listen on {host} port {port}: {reason}{hint}") from None


class _Server(uvicorn.Server):
    """uvicorn's raises the signal that stopped it once more: a traceback for Ctrl-C, and a failure
    for who sent SIGTERM."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        signals = (signal.SIGINT, signal.SIGTERM)
        before = {each: signal.signal(each, self.handle_exit) for each in signals}
        try:
            yield
        finally:
            for each, handler in before.items():
                signal.signal(each, handler)


def listen(app: Any, bound: socket.socket, name: str, seconds: float) -> None:
    """Serves app, a model under its name, on a bound socket until SIGTERM or Ctrl-C: then no more
    requests are taken, and those that run have so many seconds to end."""
    config = uvicorn.Config(
        app,
        lifespan="on",
        ws="none",
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=int(seconds) + 1,
    )
    host, port = bound.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    where = f"http://{shown}:{port}"
    print(f"listening on {where} with the model {name} (Ctrl-C stops)", file=sys.stderr, flush=True)
    _Server(config).run(sockets=[bound])
