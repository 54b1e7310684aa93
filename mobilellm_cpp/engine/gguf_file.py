"""Metadata and tensor list of a GGUF file through ggml's own parser.

gguf-py's reader takes seconds for a vocabulary of 100,000 tokens and trusts the counts in a file.
"""

import ctypes
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ..errors import ModelError
from ..quant.weight_type import CacheType
from .library import lib, reason

# gguf_type to the C type of its items
_NUMBERS: dict[int, Any] = {
    0: ctypes.c_uint8,
    1: ctypes.c_int8,
    2: ctypes.c_uint16,
    3: ctypes.c_int16,
    4: ctypes.c_uint32,
    5: ctypes.c_int32,
    6: ctypes.c_float,
    7: ctypes.c_bool,
    10: ctypes.c_uint64,
    11: ctypes.c_int64,
    12: ctypes.c_double,
}
_STRING, _ARRAY = 8, 9

MAX_LAYERS = 512  # of llama.cpp
_AGAIN = "download it or convert its checkpoint again"

# Numbers of a block, and its bytes.
_CACHE_BLOCKS: dict[CacheType, tuple[int, int]] = {
    "f32": (1, 4),
    "f16": (1, 2),
    "q8_0": (32, 34),
    "q4_0": (32, 18),
}


def _declare(name: str, result: Any, *arguments: Any) -> Any:
    function = getattr(lib, name)
    function.restype, function.argtypes = result, arguments
    return function


_File, _Id, _Int = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
_open = _declare("mobilellm_gguf_open", _File, ctypes.c_char_p)
_free = _declare("gguf_free", None, _File)
_find_key = _declare("gguf_find_key", _Id, _File, ctypes.c_char_p)
_n_keys = _declare("gguf_get_n_kv", _Id, _File)
_key = _declare("gguf_get_key", ctypes.c_char_p, _File, _Id)
_kv_type = _declare("gguf_get_kv_type", _Int, _File, _Id)
_array_type = _declare("gguf_get_arr_type", _Int, _File, _Id)
_array_size = _declare("gguf_get_arr_n", ctypes.c_size_t, _File, _Id)
_array_data = _declare("gguf_get_arr_data", ctypes.c_void_p, _File, _Id)
_array_string = _declare("gguf_get_arr_str", ctypes.c_char_p, _File, _Id, ctypes.c_size_t)
_value_data = _declare("gguf_get_val_data", ctypes.c_void_p, _File, _Id)
_value_string = _declare("gguf_get_val_str", ctypes.c_char_p, _File, _Id)
_n_tensors = _declare("gguf_get_n_tensors", _Id, _File)
_tensor_name = _declare("gguf_get_tensor_name", ctypes.c_char_p, _File, _Id)
_tensor_shape = _declare("gguf_get_tensor_ne", ctypes.POINTER(ctypes.c_int64), _File, _Id)
_tensor_type = _declare("gguf_get_tensor_type", _Int, _File, _Id)
_data_offset = _declare("gguf_get_data_offset", ctypes.c_size_t, _File)
_tensor_offset = _declare("gguf_get_tensor_offset", ctypes.c_size_t, _File, _Id)
_tensor_size = _declare("gguf_get_tensor_size", ctypes.c_size_t, _File, _Id)
_type_name = _declare("ggml_type_name", ctypes.c_char_p, _Int)
packs_floats = _declare("mobilellm_packs_floats", ctypes.c_bool, ctypes.c_char_p)


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a file: number of weights, ggml's name and number of its type, bytes, the
    shape with rows first, and the byte of the file at which it starts."""

    name: str
    n_elements: int
    type: str
    n_bytes: int
    shape: tuple[int, ...]
    type_id: int
    start: int


class GGUFFile:
    """An open file; see open_gguf."""

    def __init__(self, handle: int) -> None:
        self._handle = handle
        self._tensors: list[TensorInfo] | None = None  # asked for twice, and each time for 2 ms

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a key: number, bool, str, list of numbers; for a list of strings its
        length. default when the key is absent."""
        at = _find_key(self._handle, key.encode())
        if at < 0:
            return default
        kind = _kv_type(self._handle, at)
        if kind == _STRING:
            return _value_string(self._handle, at).decode("utf-8", "replace")
        if kind != _ARRAY:
            return _NUMBERS[kind].from_address(_value_data(self._handle, at)).value
        n = int(_array_size(self._handle, at))
        items = _array_type(self._handle, at)
        if items == _STRING:
            return n
        data = _array_data(self._handle, at)
        return list((_NUMBERS[items] * n).from_address(data)) if n else []

    @property
    def keys(self) -> list[str]:
        """All keys, in the order of the file."""
        n = int(_n_keys(self._handle))
        return [_key(self._handle, i).decode("utf-8", "replace") for i in range(n)]

    def strings(self, key: str) -> list[str]:
        """The texts of a list of strings; none where the key is absent or another kind."""
        at = _find_key(self._handle, key.encode())
        if at < 0 or _kv_type(self._handle, at) != _ARRAY:
            return []
        if _array_type(self._handle, at) != _STRING:
            return []
        texts = (_array_string(self._handle, at, i) for i in range(self.get(key)))
        return [text.decode("utf-8", "replace") for text in texts]

    def tensors(self) -> list[TensorInfo]:
        """All tensors, in the order of the file."""
        if self._tensors is not None:
            return self._tensors
        found = []
        data = int(_data_offset(self._handle))
        for i in range(_n_tensors(self._handle)):
            sizes = list(_tensor_shape(self._handle, i)[:4])  # columns first, padded with ones
            while len(sizes) > 1 and sizes[-1] == 1:
                sizes.pop()
            kind = _tensor_type(self._handle, i)
            found.append(
                TensorInfo(
                    _tensor_name(self._handle, i).decode("utf-8", "replace"),
                    math.prod(sizes),
                    _type_name(kind).decode(),
                    int(_tensor_size(self._handle, i)),
                    tuple(sizes[::-1]),
                    kind,
                    data + int(_tensor_offset(self._handle, i)),
                )
            )
        self._tensors = found
        return found


@contextmanager
def open_gguf(path: str | os.PathLike[str]) -> Iterator[GGUFFile]:
    """A file to read while the context lasts. Raises ModelError when it is no sound GGUF file."""
    if os.path.isdir(path):
        raise ModelError(
            f"{os.fspath(path)} is a folder and not a GGUF file: `mobilellm convert` makes one of "
            "a checkpoint or an adapter"
        )
    if not os.path.isfile(path):
        raise ModelError(f"{os.fspath(path)}: no such file")
    handle = _open(os.fsencode(path))
    if not handle:
        raise ModelError(f"{os.fspath(path)}{_why(reason(), os.path.getsize(path))}")
    try:
        file = GGUFFile(handle)
        _check_whole(path, file)
        yield file
    finally:
        _free(handle)


def _why(said: str, size: int) -> str:
    """What ggml's parser says, in words for those whose file is not whole."""
    if "failed to read" in said or "remaining file size" in said:
        return f" is cut short or damaged: its {size:,} bytes end within its head; {_AGAIN}"
    return f": {said or 'not a GGUF file'}"


def _check_whole(path: str | os.PathLike[str], file: GGUFFile) -> None:
    """Raises ModelError where tensors lie behind the end of the file."""
    whole = max((tensor.start + tensor.n_bytes for tensor in file.tensors()), default=0)
    size = os.path.getsize(path)
    if size < whole:
        raise ModelError(
            f"{os.fspath(path)} is cut short: {whole - size:,} of {whole:,} bytes are missing; "
            f"{_AGAIN}"
        )


def block_schedule(file: GGUFFile) -> list[int]:
    """The stored block of each executed layer. Raises ModelError for what no model can have."""
    arch = file.get("general.architecture")
    stored = file.get(f"{arch}.block_count", 0)
    if not is_count(stored) or stored > MAX_LAYERS:
        raise ModelError(f"{arch}.block_count is {stored}, outside 1 to {MAX_LAYERS}")
    schedule = file.get(f"{arch}.block_schedule", list(range(stored)))
    sound = isinstance(schedule, list) and 0 < len(schedule) <= MAX_LAYERS
    if not sound or not all(isinstance(b, int) and 0 <= b < stored for b in schedule):
        raise ModelError(f"{arch}.block_schedule is not an order of {stored} blocks")
    return list(schedule)


def context_length(file: GGUFFile) -> int:
    """The context in tokens that a model was trained for; 0 when its file does not say."""
    value = file.get(f"{file.get('general.architecture')}.context_length")
    return value if is_count(value) else 0


def sliding_layers(file: GGUFFile) -> list[bool]:
    """Whether each executed layer of a file that we write sees a window of tokens only."""
    schedule = block_schedule(file)
    arch = file.get("general.architecture")
    pattern = file.get(f"{arch}.attention.sliding_window_pattern")
    sound = isinstance(pattern, list) and len(pattern) > max(schedule)
    if arch not in ("mobilellm", "granite_swa") or not sound:
        return [False] * len(schedule)
    return [bool(pattern[block]) for block in schedule]


def default_cache(file: GGUFFile) -> CacheType:
    """The type of the KV cache where nobody chooses one: q8_0 where blocks are shared, which have
    twice the cache and lose less than 0.0001 nats by it (docs/measurements.md), if its blocks of 32
    divide the heads; else f16."""
    schedule = block_schedule(file)
    shared = len(schedule) > len(set(schedule))
    return "q8_0" if shared and (_heads(file) or (0, 1))[1] % 32 == 0 else "f16"


def kv_bytes(
    file: GGUFFile, n_ctx: int, n_ubatch: int = 512, cache_type: CacheType | None = None
) -> int:
    """Bytes of K and V for a context of n_ctx tokens, each executed layer with its own, in
    default_cache's type unless another is named; 0 for a file that is no plain transformer. A
    sliding layer keeps its window and one batch."""
    heads = _heads(file)
    if heads is None:
        return 0
    kv_heads, head_size = heads
    arch = file.get("general.architecture")
    window = file.get(f"{arch}.attention.sliding_window", 0)
    kept = min(n_ctx, -(-(window + n_ubatch) // 256) * 256) if is_count(window) else n_ctx
    cells = sum(kept if slides else n_ctx for slides in sliding_layers(file))
    block, block_bytes = _CACHE_BLOCKS[cache_type or default_cache(file)]
    return cells * kv_heads * 2 * -(-head_size // block) * block_bytes


def _heads(file: GGUFFile) -> tuple[int, int] | None:
    """KV heads and their size; None for a file that is no plain transformer."""
    arch = file.get("general.architecture")
    heads = file.get(f"{arch}.attention.head_count")
    kv_heads = file.get(f"{arch}.attention.head_count_kv", heads)
    width = file.get(f"{arch}.embedding_length")
    if not (is_count(heads) and is_count(kv_heads) and is_count(width)):
        return None
    head_size = file.get(f"{arch}.attention.key_length", width // heads)
    return (kv_heads, head_size) if is_count(head_size) else None


def is_count(value: Any) -> bool:
    """Whether a value of a file is a whole number above 0."""
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
