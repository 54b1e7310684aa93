"""A model that is loaded while Python still imports what runs it: commands know the file before
they import the engine, and the library that loads it needs no Python.

`begin` starts that, `model.py` asks `size_of` how much memory it has taken, and `llama_base.py`
takes it in the place of loading the file. What cannot be loaded is loaded again there, for the
error. Only what is small for this machine is loaded so, for nothing has been checked yet.
"""

import contextlib
import ctypes
import os
import sys
import threading
from typing import Any

from _mobilellm_cpp_library import FOLDER

from .memory import free_memory

_PART = 4  # what is loaded ahead takes at most this part of the free memory


class _Load(threading.Thread):
    """model is what was loaded, None where nothing could be."""

    def __init__(self, lib: Any, path: str) -> None:
        super().__init__()
        self.path = path
        self.model: int | None = None
        self._lib = lib

    def run(self) -> None:
        load = self._lib.mobilellm_load_ahead
        load.argtypes, load.restype = [ctypes.c_char_p], ctypes.c_void_p
        self.model = load(os.fsencode(self.path))

    def free(self) -> None:
        free = self._lib.llama_model_free
        free.argtypes, free.restype = [ctypes.c_void_p], None
        free(self.model)
        self.model = None


_begun: _Load | None = None


def begin(path: str | os.PathLike[str]) -> None:
    """Begins to load a file as MobileLLM does without arguments about that."""
    global _begun
    library = os.path.join(FOLDER, "libllama.so")
    if sys.platform != "linux" or "llama_cpp" in sys.modules or _begun is not None:
        return
    with contextlib.suppress(OSError):
        if os.path.isfile(path) and os.path.getsize(path) < free_memory() // _PART:
            _begun = _Load(ctypes.CDLL(library), os.fspath(path))
            _begun.start()


def wait() -> None:
    """Until nothing is being loaded: llama_cpp, once it is imported, would show what the loader
    logs."""
    if _begun is not None:
        _begun.join()


def size_of(path: str) -> int:
    """Bytes of memory that the weights of a file take already."""
    ready = _begun is not None and _begun.model is not None and _begun.path == path
    return os.path.getsize(path) if ready else 0


def take(path: str, params: Any, default: Any) -> int | None:
    """The llama_model of a file, if it was loaded ahead with these parameters. `default` are those
    that it was loaded with."""
    global _begun
    if _begun is None or _begun.path != path:
        return None
    load, _begun = _begun, None
    if load.model is not None and _values(params) != _values(default):
        load.free()
    return load.model


def _values(params: Any) -> list[Any]:
    """The fields of a struct; of pointers, whether they are set."""
    values = (getattr(params, name) for name, *_ in params._fields_)
    return [value if isinstance(value, int) else bool(value) for value in values]
