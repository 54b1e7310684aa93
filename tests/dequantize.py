"""The weights of a GGUF file as ggml sees them: its parser, its dequantizers.

gguf-py on PyPI does not know Q2_0 yet.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np

import mobilellm_cpp

Int, Size, Pointer, Text = ctypes.c_int, ctypes.c_size_t, ctypes.c_void_p, ctypes.c_char_p


class Parameters(ctypes.Structure):  # gguf_init_params
    _fields_ = [("no_alloc", ctypes.c_bool), ("ctx", Pointer)]


class Traits(ctypes.Structure):  # ggml_type_traits
    _fields_ = [
        ("type_name", Text),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", Size),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, Pointer, Pointer, ctypes.c_int64)),
        ("from_float_ref", Pointer),
    ]


def read_weights(path: Path) -> dict[str, tuple[str, np.ndarray]]:
    """Tensor name to ggml's name of its type and its float32 values."""
    (library,) = (Path(mobilellm_cpp.__path__[0]) / "lib").glob("*ggml-base.*")
    ggml = ctypes.CDLL(str(library))
    for name, result, arguments in [
        ("gguf_init_from_file", Pointer, [Text, Parameters]),
        ("gguf_free", None, [Pointer]),
        ("gguf_get_n_tensors", ctypes.c_int64, [Pointer]),
        ("gguf_get_data_offset", Size, [Pointer]),
        ("gguf_get_tensor_offset", Size, [Pointer, ctypes.c_int64]),
        ("gguf_get_tensor_name", Text, [Pointer, ctypes.c_int64]),
        ("gguf_get_tensor_type", Int, [Pointer, ctypes.c_int64]),
        ("gguf_get_tensor_size", Size, [Pointer, ctypes.c_int64]),
        ("gguf_get_tensor_ne", ctypes.POINTER(ctypes.c_int64), [Pointer, ctypes.c_int64]),
        ("ggml_get_type_traits", ctypes.POINTER(Traits), [Int]),
    ]:
        function = getattr(ggml, name)
        function.restype, function.argtypes = result, arguments
    file = ggml.gguf_init_from_file(bytes(path), Parameters(True, None))
    assert file, path
    data = np.memmap(path, np.uint8, "r")
    weights = {}
    for i in range(ggml.gguf_get_n_tensors(file)):
        traits = ggml.ggml_get_type_traits(ggml.gguf_get_tensor_type(file, i)).contents
        columns, rows = ggml.gguf_get_tensor_ne(file, i)[:2]
        start = ggml.gguf_get_data_offset(file) + ggml.gguf_get_tensor_offset(file, i)
        raw = np.array(data[start : start + ggml.gguf_get_tensor_size(file, i)])
        values = np.empty((rows, columns), np.float32)
        if traits.is_quantized or traits.type_name != b"f32":
            traits.to_float(raw.ctypes.data, values.ctypes.data, values.size)
        else:
            values[:] = raw.view(np.float32).reshape(values.shape)
        weights[ggml.gguf_get_tensor_name(file, i).decode()] = (traits.type_name.decode(), values)
    ggml.gguf_free(file)
    return weights
