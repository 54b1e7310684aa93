"""Conversations as JSON lines: a line is added for whatever happens, so a crash loses nothing.

    {"model": "demo"}                            who answers from here on
    {"role": "system", "content": "Be brief."}   instructions, in the place of earlier ones
    {"role": "user", "content": "Hello"}
    {"role": "assistant", "content": "Hi!"}      comes whole, with "thinking" where there was any
    {"keep": 0}                                  of all questions and answers the first so many

Other keys are passed over, so a file of plain messages is a conversation, too.
"""

import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import platformdirs

from ..errors import MobileLLMError

if sys.platform != "win32":  # where two chats that go on with a conversation mix it
    import fcntl


class ChatError(MobileLLMError):
    """What a person asked of the chat and cannot be done."""


def folder() -> Path:
    """Where conversations and the history of what was typed are kept."""
    return Path(platformdirs.user_data_dir("mobilellm-cpp"))


def recorded(model: str | None) -> str:
    """A MODEL argument as it is kept: a file or folder with all of its path."""
    if model is None:
        return "demo"
    return os.path.abspath(model) if os.path.exists(model) else model


@dataclass
class Saved:
    """A conversation as a file has it. unanswered: a question whose answer is missing."""

    path: Path
    model: str | None = None
    system: str = ""
    turns: list[dict[str, Any]] = field(default_factory=list)
    unanswered: str = ""

    @property
    def title(self) -> str:
        """The first words of the first question."""
        words = (self.turns[0]["content"] if self.turns else self.unanswered).split()
        title = " ".join(words[:12])
        return title if len(title) <= 60 else f"{title[:59]}…"


def read(path: Path) -> Saved:
    """The conversation of a file. A line that a crash has cut off is passed over. Raises ChatError
    where there is none."""
    saved = Saved(path)
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise ChatError(f"{path} cannot be read: {error.strerror}") from None
    for line in text.splitlines():
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(entry, dict):
            _take(saved, entry)
    if len(saved.turns) % 2:
        saved.unanswered = saved.turns.pop()["content"]
    if not saved.turns and not saved.unanswered and not saved.system:
        raise ChatError(f"{path} holds no conversation: JSON lines with role and content")
    return saved


def _take(saved: Saved, entry: dict[str, Any]) -> None:
    role, content = entry.get("role"), entry.get("content")
    if isinstance(entry.get("keep"), int):
        del saved.turns[max(0, entry["keep"]) :]
    elif isinstance(entry.get("model"), str):
        saved.model = entry["model"]
    elif isinstance(content, str) and role == "system":
        saved.system = content
    elif isinstance(content, str) and role == ("user", "assistant")[len(saved.turns) % 2]:
        saved.turns.append({"role": role, "content": content})
    elif isinstance(content, str) and role == "user":  # the one before was never answered
        saved.turns[-1] = {"role": role, "content": content}


def kept() -> Iterator[Saved]:
    """The conversations that are kept and in which something was said, newest first."""
    try:
        paths = list((folder() / "chats").glob("*.jsonl"))
        paths.sort(key=lambda path: path.stat().st_mtime, reverse=True)
    except OSError:
        return
    for path in paths:
        try:
            saved = read(path)
        except ChatError:
            continue
        if saved.turns or saved.unanswered:
            yield saved


class Store:
    """Where a conversation is written to, line by line; made with the first question. `path` None:
    nowhere. It holds n_turns questions and answers. `trouble` says why it cannot be kept, once that
    is known; `copied` that it began as a copy of one that another chat goes on with."""

    def __init__(self, path: Path | None, n_turns: int = 0) -> None:
        self.path = path
        self.n_turns = n_turns
        self.trouble = ""
        self.copied = False
        self._held: IO[bytes] | None = None
        self._pending: list[dict[str, Any]] = []

    @classmethod
    def new(cls) -> "Store":
        """A file of its own among those that are kept."""
        name = f"{time.strftime('%Y-%m-%d-%H%M%S')}-{os.getpid()}"
        path = folder() / "chats" / f"{name}.jsonl"
        n = 1
        while path.exists():
            n += 1
            path = path.with_name(f"{name}-{n}.jsonl")
        return cls(path)

    def add(self, *entries: dict[str, Any], later: bool = False) -> None:
        """Writes entries; with `later` together with the next ones."""
        self._pending += entries
        for entry in entries:
            self.n_turns = entry.get("keep", self.n_turns)
            self.n_turns += entry.get("role") in ("user", "assistant")
        if self.path is None or self.trouble or later:
            return
        try:
            write(self.path, self._pending)
            self.hold()
        except (NotADirectoryError, FileExistsError):
            self.trouble = f"{self.path}: a file stands where a folder should"
        except OSError as error:
            self.trouble = f"{self.path}: {error.strerror}"
        self._pending.clear()

    def hold(self) -> bool:
        """Whether no other chat goes on with this file; none does until release() then, or until
        this process ends."""
        if self.path is None or self._held is not None or sys.platform == "win32":
            return True
        try:
            file = open(self.path, "rb")  # noqa: SIM115
        except OSError:
            return True  # there is nothing yet to go on with
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            return False
        except OSError:  # a file system without locks
            file.close()
            return True
        self._held = file
        return True

    def release(self) -> None:
        """Lets other chats go on with the file."""
        if self._held is not None:
            self._held.close()
            self._held = None

    def take_back(self, later: bool = False) -> None:
        """The last question, and its answer if it has one, did not take place."""
        n = self.n_turns
        self.add({"keep": n - (1 if n % 2 else 2)}, later=later)


def write(path: Path, entries: list[dict[str, Any]]) -> None:
    """Adds entries as lines to a file that only its owner reads. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600), "r+b") as file:
        size = file.seek(0, os.SEEK_END)
        lines = [json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries]
        text = "".join(lines).encode("utf-8", "replace")
        if size:
            file.seek(size - 1)
            if file.read(1) != b"\n":  # a line that was cut off
                text = b"\n" + text
        file.write(text)
