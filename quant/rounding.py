"""Rounding of weights and back, by ggml's own functions: every byte is what llama.cpp would write.

Weights come as raw bits: uint16 for F16 and BF16, uint32 for F32.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from typing import Any

import numpy as np
import numpy.typing as npt

from mobilellm_cpp.errors import MobileLLMError

from .library import ggml_path
from .types import BF16, F16, F32, TensorType

Array = npt.NDArray[Any]

SOURCES = {"F32": F32, "F16": F16, "BF16": BF16}
INFINITY = {"F32": 0x7F800000, "F16": 0x7C00, "BF16": 0x7F80}  # bits; NaNs lie above


class NotRepresentable(Exception):
    """A weight that the target type cannot hold, or that is no number: its index and value."""

    def __init__(self, index: tuple[int, ...], value: float) -> None:
        super().__init__(index, value)
        self.index = index
        self.value = value


class Rounder(threading.local):
    """Rounds chunks of rows; every thread works in buffers of its own, which grow as needed."""

    def __init__(self) -> None:
        self._buffers: dict[str, npt.NDArray[np.uint8]] = {}

    def check(self, bits: Array, source: str, target: TensorType) -> None:
        """Raise NotRepresentable for the first NaN, infinity or value beyond the target's limit."""
        highest = INFINITY[source] - 1  # the largest finite magnitude
        if target.limit is not None:
            highest = min(highest, _limit_bits(target.limit, source))
        # bits order magnitudes, from 0 for positive numbers and from the sign bit for negative ones
        sign = 1 << (8 * bits.itemsize - 1)
        signed = bits.view(np.int16 if bits.itemsize == 2 else np.int32)
        if int(signed.max()) > highest or int(bits.max()) > sign + highest:
            magnitudes = bits & (sign - 1)
            index = tuple(int(i) for i in np.argwhere(magnitudes > highest)[0])
            value = np.ascontiguousarray(bits[index]).reshape(1, 1)
            raise NotRepresentable(index, float(self.widen(value, source)[0, 0]))

    def round(
        self, bits: Array, source: str, target: TensorType, imatrix: Array | None = None
    ) -> Array:
        """Rows `bits` (rows, columns) in the target type, as contiguous memory of any dtype; errors
        of a column weighted by `imatrix` (columns).

        It may be the input itself or a buffer that the thread's next call overwrites.
        """
        if SOURCES[source] is target:
            return np.ascontiguousarray(bits)
        values = self.widen(bits, source)
        if target is F32:
            return values
        rows, columns = values.shape
        out = self._buffer("out", rows * target.row_bytes(columns), np.dtype(np.uint8))
        weights = None if imatrix is None else np.require(imatrix, np.float32, ["C", "A"])
        at = None if weights is None else weights.ctypes.data
        ggml().ggml_quantize_chunk(
            target.id, values.ctypes.data, out.ctypes.data, 0, rows, columns, at
        )
        return out

    def widen(self, bits: Array, source: str) -> npt.NDArray[np.float32]:
        """The rows as aligned, contiguous float32; exact."""
        bits = np.require(bits, requirements=["C", "A"])
        if source == "F32":
            return bits.view(np.float32)
        values: npt.NDArray[np.float32]
        values = self._buffer("values", bits.size, np.dtype(np.float32)).reshape(bits.shape)
        widen = ggml().ggml_fp16_to_fp32_row if source == "F16" else ggml().ggml_bf16_to_fp32_row
        widen(bits.ctypes.data, values.ctypes.data, bits.size)
        return values

    def _buffer(self, name: str, size: int, dtype: np.dtype[Any]) -> Array:
        need = size * dtype.itemsize
        if name not in self._buffers or self._buffers[name].size < need:
            self._buffers[name] = np.empty(need, np.uint8)
        return self._buffers[name][:need].view(dtype)


def dequantize(data: Array, kind: int, columns: int) -> npt.NDArray[np.float32]:
    """Rows of ggml's type number `kind`, as the bytes of a file, in float32 [rows, columns].

    Raises MobileLLMError for a type that holds no weights.
    """
    traits = ggml().ggml_get_type_traits(kind).contents
    if kind == F32.id:
        return data.view(np.float32).reshape(-1, columns)
    if not traits.to_float:
        raise MobileLLMError(f"a tensor of type {traits.name.decode()} holds no weights.")
    count = data.nbytes // traits.block_bytes * traits.block
    values = np.empty(count, np.float32)
    traits.to_float(data.ctypes.data, values.ctypes.data, count)
    return values.reshape(-1, columns)


class _TypeTraits(ctypes.Structure):
    """ggml_type_traits of ggml.h."""

    _fields_ = [
        ("name", ctypes.c_char_p),
        ("block", ctypes.c_int64),
        ("interleaved", ctypes.c_int64),
        ("block_bytes", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
        ("from_float", ctypes.c_void_p),
    ]


@functools.cache
def _limit_bits(limit: float, source: str) -> int:
    """The bits of the largest magnitude of `source` that does not exceed `limit`."""
    if source == "F16":
        return INFINITY["F16"] - 1  # no limit is below 65504
    bits = int(np.float32(limit).view(np.uint32))
    return bits if source == "F32" else bits >> 16


@functools.cache
def ggml() -> ctypes.CDLL:
    """The library itself; its functions release Python's lock while they run."""
    library = ctypes.CDLL(str(ggml_path()))
    pointer, count = ctypes.c_void_p, ctypes.c_int64
    for name in ("ggml_fp16_to_fp32_row", "ggml_bf16_to_fp32_row"):
        getattr(library, name).argtypes = [pointer, pointer, count]
        getattr(library, name).restype = None
    library.ggml_quantize_chunk.argtypes = [
        ctypes.c_int,
        pointer,
        pointer,
        count,
        count,
        count,
        pointer,
    ]  # type, source, target, first weight, rows, columns, importance
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_get_type_traits.argtypes = [ctypes.c_int]
    library.ggml_get_type_traits.restype = ctypes.POINTER(_TypeTraits)
    return library
