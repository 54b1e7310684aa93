"""Writes docs/cli.md, the help pages of all commands, from the program itself.

.venv/bin/python docs/cli.py
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from mobilellm_cpp.cli import app

PAGE = Path(__file__).with_name("cli.md")
HEAD = """# The commands

What `mobilellm COMMAND -h` prints. `docs/cli.py` writes this page from the program.
[In scripts](scripts.md) has examples, and says how to [change the defaults](scripts.md#defaults).
"""


def page() -> str:
    """The text of docs/cli.md."""
    parts = [HEAD]
    for name, text in _pages(typer.main.get_command(app), "mobilellm", None):
        parts.append(f"## {name}\n\n```\n{text}\n```\n")
    return "\n".join(parts)


def _pages(command: Any, name: str, parent: Any) -> Iterator[tuple[str, str]]:
    """The help of a command and of those below it."""
    context = command.context_class(
        command,
        info_name=name.rpartition(" ")[2],
        parent=parent,
        terminal_width=100,
        **command.context_settings,
    )
    text = "\n".join(line.rstrip() for line in command.get_help(context).strip().splitlines())
    yield name, re.sub(r"\n{3,}", "\n\n", text)
    for below, each in getattr(command, "commands", {}).items():
        yield from _pages(each, f"{name} {below}", context)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
