"""What was computed of prompts, in a folder that any number of processes share.

A file holds the tokens of a prompt and their K and V. It appears under its name whole, names its
own digest, and is of one model, one build and one kind of processor; so whoever is killed, and
whoever writes at the same time, spoils nothing, and a prompt that begins alike gets the same answer
as without, to the last bit. Files that were used last stay."""

import contextlib
import hashlib
import json
import logging
import os
import secrets
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from .library import FOLDER
from .sequence import Sequence
from .sequence_state import common_prefix
from .sequences import Sequences

MIN = 64  # tokens that are worth a file, or reading one
MAGIC = b"mobilellm prompt 1\n"

log = logging.getLogger(__name__)


class PromptCache:
    """The files in `folder` that fit one model, max_bytes of all models' together."""

    def __init__(self, folder: Path, model: Path, settings: str, max_bytes: int) -> None:
        self._folder = folder
        self._max_bytes = max_bytes
        folder.mkdir(parents=True, exist_ok=True)
        self._name = _digest(f"{_content(model, folder)} {_build()} {settings}".encode())
        self._tokens: dict[str, list[int]] = {}  # of the files that were looked at, by name
        self._writer: threading.Thread | None = None

    def prepare(self, sequences: Sequences, tokens: list[int]) -> None:
        """Brings what a file has of a prompt into the KV cache, where it is worth it."""
        if len(tokens) < MIN:
            return
        best, shared = None, sequences.known(tokens) + MIN
        for name, known in self._known():
            n = common_prefix(known, tokens)
            if n >= shared:
                best, shared = name, n + 1
        if best is None:
            return
        data = self._read(best)
        if data is not None:
            log.info("a prompt of %d tokens has %d of %s", len(tokens), shared - 1, best)
            sequences.preload(self._tokens[best], data)

    def keep(self, sequence: Sequence, n: int) -> None:
        """Writes what was computed of a prompt of n tokens, unless there is next to nothing new in
        it. The file is written by a thread."""
        tokens = sequence.tokens[:n]
        if n < MIN or any(n - common_prefix(k, tokens) < MIN for _, k in self._known()):
            return
        data, done = sequence.copy()
        if done != n or (self._writer is not None and self._writer.is_alive()):
            return
        self._writer = threading.Thread(target=self._write, args=(tokens, data))
        self._writer.start()

    def wait(self) -> None:
        """Until what keep() began is written."""
        if self._writer is not None:
            self._writer.join()

    def _known(self) -> Iterator[tuple[str, list[int]]]:
        names = set()
        with contextlib.suppress(OSError):
            names = {e.name for e in os.scandir(self._folder) if e.name.startswith(self._name)}
        for name in set(self._tokens) - names:
            self._tokens.pop(name, None)
        for name in names:
            if name not in self._tokens and name.endswith(".prompt"):
                with contextlib.suppress(OSError, ValueError), open(self._folder / name, "rb") as f:
                    self._tokens[name] = _head(f)
        yield from list(self._tokens.items())

    def _read(self, name: str) -> bytes | None:
        """K and V of a file; None where it is damaged."""
        path = self._folder / name
        try:
            with open(path, "rb") as file:
                tokens = _head(file)
                rest = file.read()
            os.utime(path)
        except (OSError, ValueError):
            return None
        data, digest = rest[:-16], rest[-16:]
        if hashlib.blake2b(_bytes(tokens) + data, digest_size=16).digest() == digest:
            return data
        log.warning("%s is damaged and is removed", path)
        path.unlink(missing_ok=True)
        return None

    def _write(self, tokens: list[int], data: bytes) -> None:
        numbers = _bytes(tokens)
        digest = hashlib.blake2b(numbers + data, digest_size=16).digest()
        path = self._folder / f"{self._name}-{_digest(numbers)}.prompt"
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
        try:
            with open(temporary, "wb") as file:
                head = json.dumps({"tokens": len(tokens)}).encode()
                file.write(MAGIC + head + b"\n" + numbers + data + digest)
            os.replace(temporary, path)
            self._make_room()
        except OSError as error:
            log.warning("the prompt is not kept: %s: %s", path, error.strerror)
            temporary.unlink(missing_ok=True)

    def _make_room(self) -> None:
        """Removes the files that nobody has used for the longest time, and what was killed."""
        files = []
        for path in self._folder.glob("*.prompt"):
            with contextlib.suppress(OSError):
                state = path.stat()
                files.append((state.st_mtime, state.st_size, path))
        size = sum(each[1] for each in files)
        for _, n, path in sorted(files)[:-1]:
            if size <= self._max_bytes:
                break
            path.unlink(missing_ok=True)
            size -= n
        for path in self._folder.glob(".*.part"):
            with contextlib.suppress(OSError):
                if time.time() - path.stat().st_mtime > 3600:
                    path.unlink()


def _head(file: Any) -> list[int]:
    """The tokens of an open file. Raises ValueError for what is none of ours."""
    if file.readline(100) != MAGIC:
        raise ValueError
    n = json.loads(file.readline(100))["tokens"]
    numbers = file.read(4 * n)
    if len(numbers) != 4 * n:
        raise ValueError
    tokens: list[int] = np.frombuffer(numbers, "<i4").tolist()
    return tokens


def _bytes(tokens: list[int]) -> bytes:
    return np.array(tokens, "<i4").tobytes()


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=10).hexdigest()


def _content(model: Path, folder: Path) -> str:
    """A digest of a model file, remembered in the folder under its size and time."""
    state = model.stat()
    known = f"{model.resolve()} {state.st_size} {state.st_mtime_ns} {state.st_ino}"
    memory = folder / f"{_digest(known.encode())}.model"
    with contextlib.suppress(OSError):
        if len(text := memory.read_text()) == 32:
            return text
    digest = hashlib.blake2b(digest_size=16)
    with open(model, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    temporary = memory.with_name(f".{memory.name}.{secrets.token_hex(4)}.part")
    with contextlib.suppress(OSError):
        temporary.write_text(digest.hexdigest())
        os.replace(temporary, memory)
    return digest.hexdigest()


def _build() -> str:
    """What the last bits depend on besides the model: libraries, kernels, the processor."""
    states = [(path.name, path.stat()) for path in sorted(Path(FOLDER).glob("*"))]
    files = [(name, state.st_size, state.st_mtime_ns) for name, state in states]
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
        flags = [line for line in file if line.startswith(("model name", "flags"))][:2]
        return f"{files} {os.environ.get('MOBILELLM_KERNELS')} {flags}"
    return f"{files} {os.environ.get('MOBILELLM_KERNELS')}"
