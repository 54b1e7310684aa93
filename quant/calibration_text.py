"""The text that stands in where people give none: English prose that every Python has with it."""

from __future__ import annotations


def builtin_text() -> str:
    """The topics of Python's own help (pydoc), about 700,000 characters."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))
