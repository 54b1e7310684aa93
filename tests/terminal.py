"""A program in a terminal: a pseudo-terminal for it, and pyte as the screen that a person sees."""

import re
import time
from typing import Any

import pexpect
import pyte


class Terminal:
    """Types into a program, and reads its screen with all that has scrolled off."""

    def __init__(
        self, command: list[str], *, env: dict[str, str], rows: int = 24, columns: int = 80
    ) -> None:
        self.screen = pyte.HistoryScreen(columns, rows, history=100_000)
        self._stream = pyte.ByteStream(self.screen)
        self.child = pexpect.spawn(
            command[0],
            command[1:],
            env={**env, "TERM": "xterm-256color"},
            dimensions=(rows, columns),
            timeout=60,
        )
        self.child.delaybeforesend = None
        self.screen.write_process_input = lambda text: self.child.send(text)
        self.raw = b""

    def type(self, text: str) -> None:
        self.child.send(text)

    def paste(self, text: str) -> None:
        """As terminals do since bracketed paste."""
        self.type(f"\x1b[200~{text}\x1b[201~")

    def read(self, seconds: float = 0.05) -> bool:
        """Takes what the program has written; False where it has ended."""
        try:
            data = self.child.read_nonblocking(1 << 16, timeout=seconds)
        except pexpect.TIMEOUT:
            return True
        except pexpect.EOF:
            return False
        self.raw += data
        self._stream.feed(data)
        return True

    def text(self) -> str:
        """All lines from the first on."""
        lines: list[Any] = [*self.screen.history.top, *map(self._row, range(self.screen.lines))]
        return "\n".join(
            "".join(line[x].data for x in range(self.screen.columns)).rstrip() for line in lines
        ).rstrip()

    def _row(self, y: int) -> Any:
        return self.screen.buffer[y]

    def wait(self, pattern: str, *, after: str = "", seconds: float = 20) -> str:
        """Waits until the text, that behind the last `after`, holds a pattern. Gives the text.

        A space in the pattern matches the end of a line, too: where texts wrap depends on the
        length of a temporary folder's name.
        """
        wrapped = pattern.replace(" ", "[ \n]")
        until = time.monotonic() + seconds
        while True:
            alive = self.read()
            text = self.text()
            part = text[text.rfind(after) + len(after) :] if after else text
            part = part if after in text else ""
            if re.search(wrapped, part, re.M):
                return text
            assert alive and time.monotonic() < until, f"no {pattern!r} in:\n{text}"

    def resize(self, rows: int, columns: int) -> None:
        """As terminals do: lines that leave a lower window are history, and the cursor stays in its
        line. pyte forgets the one and moves the other. (Columns that leave are lost to it.)"""
        gone, row = max(0, self.screen.lines - rows), self.screen.cursor.y
        self.screen.history.top.extend(map(self._row, range(gone)))
        self.screen.resize(rows, columns)
        self.screen.cursor.y = max(0, row - gone)
        self.child.setwinsize(rows, columns)

    def end(self) -> int:
        """Reads to the end of the program. Its exit code."""
        until = time.monotonic() + 60
        while self.read():
            assert time.monotonic() < until, self.text()
        self.child.close()
        return int(self.child.exitstatus if self.child.exitstatus is not None else -1)
