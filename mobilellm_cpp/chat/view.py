"""How an answer is shown: as plain text, or drawn on a terminal."""

import contextlib
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TextIO

from .answering import Answering
from .thinking import BEGIN, END, Thinking

if TYPE_CHECKING:  # drawing alone needs rich, which takes a while to import
    from rich.console import Console

    from .markdown import MarkdownStream

FRAME = 0.05  # seconds between two drawings
PATIENCE = 0.5  # seconds of reading before a bar is drawn


class PlainView:
    """Writes an answer as it comes, for pipes and files."""

    def __init__(self, out: TextIO) -> None:
        self._out = out

    def show(self, answering: Answering, thinking: Thinking | None, hide: bool) -> None:
        """Iterates the answer. Raises what that raises; a line that was begun is ended then."""
        thought = False
        begun = False
        try:
            for piece in answering:
                for thinks, text in thinking.feed(piece) if thinking else [(False, piece)]:
                    if thinks and hide:
                        continue
                    if thinks != thought:
                        self._out.write(BEGIN if thinks else END + "\n")
                        thought = thinks
                    self._out.write(text)
                    begun = begun or bool(text)
                self._out.flush()
            for thinks, text in thinking.finish() if thinking else ():
                if not (thinks and hide):
                    self._out.write(text)
            begun = True
        finally:
            if begun:
                self._out.write("\n")
            self._out.flush()


class TerminalView:
    """Draws an answer on a terminal: Markdown, thoughts dim, a bar while a long text is read."""

    def __init__(self, out: TextIO, markdown: bool = True) -> None:
        from rich.console import Console

        self._out = out
        self._console = Console(file=out, highlight=False)
        self._markdown = markdown

    def show(self, answering: Answering, thinking: Thinking | None, hide: bool) -> None:
        """Iterates the answer. Raises what that raises; all that came is on the screen then."""
        streams = _Streams(self._console, self._out, self._markdown)
        start = due = time.monotonic()
        try:
            for piece in answering:
                for part in thinking.feed(piece) if thinking else [(False, piece)]:
                    streams.feed(*part, hide=hide)
                now = time.monotonic()
                if now >= due:
                    streams.draw(_status(answering, now - start, thinking))
                    took = time.monotonic() - now  # drawing must not slow the model down
                    due = now + max(FRAME, 10 * took)
            for part in thinking.finish() if thinking else ():
                streams.feed(*part, hide=hide)
        finally:
            streams.finish()


class _Streams:
    """What is thought and what is said, one after the other."""

    def __init__(self, console: "Console", out: TextIO, markdown: bool) -> None:
        self._plain = "" if markdown else "none"
        self._console, self._out = console, out
        self._thought = False
        self._stream = self._make(self._plain)

    def _make(self, style: str) -> "MarkdownStream":
        from .markdown import MarkdownStream

        return MarkdownStream(self._console, self._out, style)

    def feed(self, thinks: bool, text: str, hide: bool) -> None:
        if thinks and hide:
            return
        if thinks != self._thought:
            self._stream.finish()
            self._stream = self._make("dim italic" if thinks else self._plain)
            self._thought = thinks
        self._stream.feed(visible(text))

    def draw(self, status: str) -> None:
        self._stream.draw(status)

    def finish(self) -> None:
        self._stream.finish()


def _status(answering: Answering, seconds: float, thinking: Thinking | None) -> str:
    """The line below an answer."""
    stats = answering.stats
    if answering.stopping:
        return "stopping …"
    if not stats.made:
        if seconds < PATIENCE or not stats.prompt:
            return ""
        new, read = stats.prompt - stats.reused, answering.read - stats.reused
        done = max(0, min(24, 24 * read // max(1, new)))
        return f"reading {'━' * done}{'─' * (24 - done)} {answering.read} of {stats.prompt} tokens"
    if seconds < PATIENCE:
        return ""
    doing = "thinking, " if thinking and thinking.thinks else ""
    return f"{doing}{stats.made} tokens, {stats.speed:.0f} tokens/s, Ctrl-C stops"


def visible(text: str) -> str:
    """A text without what would move a terminal's cursor."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)


@contextmanager
def unseen_typing() -> Iterator[None]:
    """Keeps what is typed between two prompts from the screen; the next one gets it as it is."""
    try:
        import termios
    except ImportError:  # Windows
        yield
        return
    try:
        terminal = sys.stdin.fileno()
        before: list[Any] = termios.tcgetattr(terminal)
    except (OSError, ValueError, termios.error):  # stdin is no terminal
        yield
        return
    quiet = before.copy()
    quiet[0] &= ~termios.ICRNL
    quiet[3] &= ~(termios.ECHO | termios.ICANON)
    try:
        termios.tcsetattr(terminal, termios.TCSANOW, quiet)
        yield
    finally:
        with contextlib.suppress(termios.error):
            termios.tcsetattr(terminal, termios.TCSANOW, before)
