"""A call that nobody waits for any more ends before its next step.

Whoever makes a thread for a call gives the thread an event (cancelled_by) and sets it later;
sequences.py asks before each step (check_cancelled)."""

import threading


class Cancelled(BaseException):
    """Ends a call on its way; like asyncio's, nobody's `except Exception` keeps it."""


_thread = threading.local()


def cancelled_by(event: threading.Event) -> None:
    """From now on what this thread computes ends when event is set."""
    _thread.event = event


def check_cancelled() -> None:
    """Raises Cancelled where this thread's event is set."""
    event = getattr(_thread, "event", None)
    if event is not None and event.is_set():
        raise Cancelled
