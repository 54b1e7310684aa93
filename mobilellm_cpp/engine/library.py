"""Loads our libllama for llama-cpp-python, and keeps a bad file from taking the process down.

Import `llama_cpp` from here and nowhere else in the package.
"""

import codecs
import ctypes
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import _mobilellm_cpp_library
import numpy as np

from ..errors import ContextError, ModelError
from . import ahead

FOLDER = Path(_mobilellm_cpp_library.FOLDER)


def _foreign_libraries() -> list[str]:
    """Paths of ggml or llama libraries in this process that are not ours (Linux; else empty)."""
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return []
    loaded = set(
        re.findall(r" (/.*/lib(?:llama|ggml)[\w.-]*\.so[\w.]*)(?: \(deleted\))?$", maps, re.M)
    )
    return sorted(path for path in loaded if Path(path).parent != FOLDER)


def _load() -> Any:
    """llama_cpp over our library. Raises ModelError when another libllama is in the way."""
    foreign = _foreign_libraries()
    earlier = getattr(sys.modules.get("llama_cpp.llama_cpp"), "_base_path", FOLDER)
    if foreign or Path(earlier) != FOLDER:
        pin = _mobilellm_cpp_library.LLAMA_CPP_PYTHON
        raise ModelError(
            f"another libllama is already loaded ({foreign[0] if foreign else earlier}): "
            f"import MobileLLM from mobilellm_cpp before llama_cpp is imported, or install "
            f"llama-cpp-python without a library of its own (`CMAKE_ARGS=-DLLAMA_BUILD=OFF pip "
            f"install --force-reinstall --no-deps --no-cache-dir llama-cpp-python=={pin}`)"
        )
    if not (FOLDER.exists() and any(FOLDER.glob("*llama.*"))):
        raise ModelError(f"libllama is missing from {FOLDER}: install mobilellm-cpp again")
    _mobilellm_cpp_library.finder.always = True
    ahead.wait()
    import llama_cpp

    return llama_cpp


llama_cpp = _load()
lib = llama_cpp.llama_cpp._lib
lib.mobilellm_guard_begin.argtypes = [ctypes.c_bool]
lib.mobilellm_guard_begin.restype = None
lib.mobilellm_guard_end.argtypes = []
lib.mobilellm_guard_end.restype = None
lib.mobilellm_guard_reason.argtypes = []
lib.mobilellm_guard_reason.restype = ctypes.c_char_p
lib.mobilellm_tokenize.argtypes = llama_cpp.llama_cpp.llama_tokenize.argtypes
lib.mobilellm_tokenize.restype = ctypes.c_int32
lib.mobilellm_decode.argtypes = llama_cpp.llama_cpp.llama_decode.argtypes
lib.mobilellm_decode.restype = ctypes.c_int32
lib.mobilellm_run_step.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
lib.mobilellm_run_step.restype = ctypes.c_int32
lib.mobilellm_choose.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int32, ctypes.c_int32]
lib.mobilellm_choose.restype = ctypes.c_int32

# What upstream puts before the reason itself.
_PREFIX = re.compile(
    r"^(?:\w+: |error loading model(?: \w+)?: "
    r"|failed to (?:initialize the context|apply lora adapter): )+"
)


def reason() -> str:
    """The first thing that went wrong under guard, without upstream's function names."""
    text = lib.mobilellm_guard_reason().decode("utf-8", "replace")
    first = next((line for line in text.splitlines() if line.strip()), "")
    first = " ".join(first.split())
    first = re.sub(r"\S*/(?=[\w.-]+:\d+: )", "", first)  # the folder in which ggml was built
    return _PREFIX.sub("", first, count=1).strip()


@contextmanager
def guard(what: str, verbose: bool = False) -> Iterator[None]:
    """Turns an abort or a failed load inside llama.cpp on this thread into a ModelError that says
    what: reason. Unless verbose, nothing is logged meanwhile."""
    lib.mobilellm_guard_begin(not verbose)
    try:
        yield
    except ModelError:
        raise
    except Exception as error:  # whatever llama-cpp-python makes of it
        raise ModelError(f"{what}: {reason() or error}") from error
    finally:
        lib.mobilellm_guard_end()


def decode(context: Any, batch: Any) -> None:
    """llama_decode that raises ModelError, with the reason, for what cannot be computed."""
    result = lib.mobilellm_decode(context, batch)
    if result == 1:
        raise ContextError("the context is full")
    if result != 0:
        raise ModelError(f"the model cannot be run: {reason() or f'llama_decode says {result}'}")


class _Step(ctypes.Structure):
    """mobilellm_step of native/api/api.h."""

    _fields_ = [
        ("n_tokens", ctypes.c_int32),
        ("tokens", ctypes.c_void_p),
        ("positions", ctypes.c_void_p),
        ("sequences", ctypes.c_void_p),
        ("outputs", ctypes.c_void_p),
        ("samplers", ctypes.c_void_p),
        ("n_best", ctypes.c_void_p),
        ("chosen", ctypes.c_void_p),
        ("logits", ctypes.c_void_p),
        ("states", ctypes.c_void_p),
        ("fused", ctypes.c_bool),
    ]


class Step:
    """Tokens of several sequences to compute at once, and what is wanted of them."""

    def __init__(self, capacity: int) -> None:
        kinds = {
            "outputs": np.int8,
            "samplers": np.uint64,
            "logits": np.uint64,
            "states": np.uint64,
        }
        names = ("tokens", "positions", "sequences", "outputs", "samplers", "n_best", "chosen")
        self._arrays = {
            name: np.zeros(capacity, kinds.get(name, np.int32))
            for name in (*names, "logits", "states")
        }
        self._tokens, self._positions, self._sequences, self._outputs = (
            self._arrays[name] for name in names[:4]
        )
        self._samplers, self._n_best, self._chosen = (self._arrays[name] for name in names[4:])
        self._logits, self._states = self._arrays["logits"], self._arrays["states"]
        self._wanted = 0
        self.native = _Step(**{name: a.ctypes.data for name, a in self._arrays.items()})

    def clear(self, states: bool) -> None:
        """Empties it; with states, hidden states are wanted, of every token something."""
        self.native.n_tokens = self._wanted = 0
        self.native.states = self._arrays["states"].ctypes.data if states else None

    def add(self, token: int, position: int, sequence: int) -> None:
        """A token of a sequence of the cache."""
        n = self.native.n_tokens
        self._tokens[n] = token
        self._positions[n] = position
        self._sequences[n] = sequence
        self._outputs[n] = 0
        self.native.n_tokens = n + 1

    def want(self, chain: int = 0, n_best: int = 0, rows: int = 0) -> None:
        """After the token that was added last: the token that the samplers of a chain choose, or a
        row of logits or states, copied to the address `rows`; 0: none."""
        at = self._wanted
        states = self.native.states is not None
        self._outputs[self.native.n_tokens - 1] = 1
        self._samplers[at] = chain
        self._n_best[at] = n_best
        self._logits[at] = 0 if states else rows
        self._states[at] = rows if states else 0
        self._wanted = at + 1

    def chosen(self, at: int) -> int:
        """The token that was chosen where something was wanted for the at-th time; see
        sampled()."""
        return int(self._chosen[at])

    @property
    def fused(self) -> bool:
        """Whether it was computed in one node."""
        return bool(self.native.fused)


_trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None


def give_memory_back() -> None:
    """What was freed goes back to the system: glibc keeps the pages between what is still in use,
    and a process that loads model after model would hold twice what it needs."""
    if _trim is not None:
        _trim(0)


def run_step(context: Any, step: Step) -> int:
    """mobilellm_run_step: 0 when done; see api.h for the others."""
    return int(lib.mobilellm_run_step(context, ctypes.byref(step.native)))


def not_computed(result: int) -> ModelError:
    """The error for a step that cannot be computed."""
    return ModelError(f"the model cannot be run: {reason() or f'llama_decode says {result}'}")


def sampled(token: int, path: str) -> int:
    """A token that llama.cpp's samplers chose. Raises ModelError where they could not; path names
    the model in it."""
    if token == -1:
        raise ModelError(f"{path} is damaged: its results are not numbers")
    if token < 0:
        raise ModelError(f"no token can be chosen: {reason()}")
    return token


def choose(chain: int, logits: Any, n_best: int) -> int:
    """The token that a chain of samplers chooses from float32 logits [n_vocab], see sampled()."""
    return int(lib.mobilellm_choose(chain, logits.ctypes.data, len(logits), n_best))


class Pieces:
    """The bytes of a vocabulary's tokens inside a text, each asked for once."""

    def __init__(self, vocab: Any) -> None:
        self._vocab = vocab
        self._known: dict[tuple[int, bool], bytes] = {}

    def __call__(self, token: int, special: bool = False) -> bytes:
        """The bytes of one token; nothing for control tokens unless special. Raises ModelError for
        an id outside the vocabulary."""
        piece = self._known.get((token, special))
        if piece is None:
            n_vocab = llama_cpp.llama_vocab_n_tokens(self._vocab)
            if not 0 <= token < n_vocab:
                raise ModelError(f"token {token} is outside the vocabulary of {n_vocab}")
            piece = self._known[token, special] = self._ask(token, special)
        return piece

    def _ask(self, token: int, special: bool) -> bytes:
        size = 64
        while True:
            buffer = ctypes.create_string_buffer(size)
            n = llama_cpp.llama_token_to_piece(self._vocab, token, buffer, size, 0, special)
            if n >= 0:
                return buffer.raw[:n]
            size = -n

    def text(self, tokens: Sequence[int], special: bool = False) -> bytes:
        """The text of tokens. As in llama-cpp-python, a space that follows a leading bos goes."""
        text = b"".join([self(token, special) for token in tokens])
        bos = llama_cpp.llama_vocab_bos(self._vocab)
        return text[1:] if text[:1] == b" " and tokens[0] == bos else text


def _replaced(error: UnicodeError) -> tuple[str, int]:
    """U+FFFD for every byte that is no UTF-8, as SentencePiece does (Python: for every run)."""
    assert isinstance(error, UnicodeDecodeError)
    return "\ufffd" * (error.end - error.start), error.end


codecs.register_error("mobilellm-replace", _replaced)


def tokenize(vocab: Any, text: bytes, add_special: bool, parse_special: bool) -> list[int]:
    """llama_tokenize with SentencePiece's view of bytes that are no UTF-8. Raises ModelError where
    the vocabulary cannot spell the text."""
    text = text.decode("utf-8", "mobilellm-replace").encode()
    capacity = len(text) + 2
    while True:
        tokens = (ctypes.c_int32 * capacity)()
        n = lib.mobilellm_tokenize(
            vocab, text, len(text), tokens, capacity, add_special, parse_special
        )
        if n == -(2**31):
            raise ModelError(f"the vocabulary of this file cannot spell the text ({reason()})")
        if n >= 0:
            return tokens[:n]
        capacity = -n
