"""What is said on stderr: notes and complaints, broken between words where that is a terminal."""

import os
import re
import sys
import textwrap

from .errors import ContextError


def can_draw() -> bool:
    """Whether the terminal knows more than letters."""
    return os.environ.get("TERM", "dumb") not in ("dumb", "unknown", "")


def note(text: str) -> None:
    """Says something that is neither a result nor an error."""
    dim = sys.stderr.isatty() and can_draw()
    text = _broken(text)
    print(f"\x1b[2m{text}\x1b[0m" if dim else text, file=sys.stderr, flush=True)


def complain(error: BaseException) -> None:
    """Says an error as one sentence: on one line, for programs."""
    text = f"{error.said}: give a larger --ctx" if isinstance(error, ContextError) else str(error)
    if isinstance(error, OSError) and error.strerror:  # without its number
        text = ": ".join(str(part) for part in (error.filename, error.strerror) if part)
    sentence = " ".join(text.split()).rstrip(".") or type(error).__name__
    print(_broken(f"mobilellm: {sentence}"), file=sys.stderr)


def _broken(text: str) -> str:
    if not sys.stderr.isatty():
        return text
    try:
        width = os.get_terminal_size(sys.stderr.fileno()).columns
    except (OSError, ValueError):
        width = 80
    return "\n".join(wrapped(line, width or 80) for line in text.split("\n"))


def wrapped(line: str, width: int) -> str:
    """A line as several, none of them wider; in a table what goes on stands below its column."""
    if len(line) <= width:
        return line
    columns = [found.end() for found in re.finditer(r"\S {2,}(?=\S)", line)]
    indent = columns[-1] if columns and columns[-1] <= width // 2 else 0
    return textwrap.fill(line, width, subsequent_indent=" " * indent, break_on_hyphens=False)
