"""Texts that people name by a file or write out."""

from pathlib import Path

from .errors import ModelError


def read_text(name: str) -> str:
    """A file of UTF-8 text. Raises ModelError."""
    try:
        return Path(name).expanduser().read_text(encoding="utf-8", errors="surrogateescape")
    except OSError as error:
        raise ModelError(f"{name}: {error.strerror}") from error


def written_or_read(given: str) -> str:
    """A schema or grammar: the text itself, or where it cannot be one, that of the file it names.
    Raises ModelError."""
    if given.lstrip()[:1] in ("{", "") or any(sign in given for sign in "\n:="):
        return given
    if given.strip() in ("true", "false"):  # are JSON schemas
        return given
    return read_text(given)
