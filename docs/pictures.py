"""Makes docs/chat.svg: a real chat with the model that comes along, as a terminal shows it.

.venv/bin/python docs/pictures.py
"""

import io
import itertools
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.style import Style
from rich.terminal_theme import DIMMED_MONOKAI
from rich.text import Text

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))
from terminal import Terminal  # noqa: E402

ROWS, COLUMNS = 17, 84
QUESTIONS = ("hi, who are you?", "who bakes the bread here?", "and where does she live?")


def main() -> None:
    with tempfile.TemporaryDirectory() as home:
        env = {**os.environ, "XDG_DATA_HOME": home}
        command = [str(Path(sys.executable).with_name("mobilellm")), "chat"]
        chat = Terminal(command, env=env, rows=ROWS, columns=COLUMNS)
        chat.wait("^>")
        for question in QUESTIONS:
            for key in question:
                chat.type(key)
            chat.type("\r")
            chat.wait(r"\w.*\n>$", after=question)
        chat.type("/s")
        chat.wait("/stats")
        until = time.monotonic() + 1
        while time.monotonic() < until:
            chat.read()
        console = Console(
            record=True, width=COLUMNS, height=ROWS, file=io.StringIO(), force_terminal=True
        )
        for row in range(ROWS):
            console.print(
                _line(chat.screen, row), end="\n" if row < ROWS - 1 else "", soft_wrap=True
            )
        chat.child.close(force=True)
    svg = console.export_svg(title="mobilellm chat", theme=DIMMED_MONOKAI, unique_id="chat")
    (ROOT / "docs" / "chat.svg").write_text(svg, encoding="utf-8")


def _line(screen: Any, row: int) -> Text:
    text = Text()
    chars = [screen.buffer[row][column] for column in range(screen.columns)]
    for style, run in itertools.groupby(chars, _style):
        text.append("".join(char.data for char in run), style)
    return text


def _style(char: Any) -> Style:
    return Style(
        color=_colour(char.fg),
        bgcolor=_colour(char.bg),
        bold=char.bold,
        italic=char.italics,
        underline=char.underscore,
        reverse=char.reverse,
    )


def _colour(name: str) -> str | None:
    """A colour of pyte as one of rich."""
    if name == "default":
        return None
    if len(name) == 6 and all(digit in "0123456789abcdef" for digit in name):
        return f"#{name}"
    name = {"brown": "yellow", "brightbrown": "brightyellow"}.get(name, name)
    return name.replace("bright", "bright_")


if __name__ == "__main__":
    main()
