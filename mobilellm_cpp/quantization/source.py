"""The GGUF file that is quantized: its tensors as floats, its metadata as the bytes they are.

llama.cpp's own parser says whether the file is sound (engine/gguf_file.py); metadata is copied and
never interpreted, since a key that is unknown here may be what the model needs.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ..engine.gguf_file import TensorInfo, block_schedule, open_gguf
from ..errors import ModelError
from ..quant.rounding import dequantize

Floats = npt.NDArray[np.float32]

_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # of gguf_type
_STRING, _ARRAY = 8, 9


class Source:
    """An open file: `tensors` by name in the file's order, `metadata` as bytes with their type."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        with open_gguf(path) as file:
            self.tensors: dict[str, TensorInfo] = {info.name: info for info in file.tensors()}
            self.arch = str(file.get("general.architecture"))
            self.numbers = {
                key.removeprefix(f"{self.arch}."): file.get(key)
                for key in file.keys
                if key.startswith(f"{self.arch}.")
            }
            self.schedule = block_schedule(file)
            self.name = str(file.get("general.name", self.path.stem))
        self.metadata = _raw_metadata(self.path)
        for info in self.tensors.values():
            if len(info.shape) > 2:
                raise ModelError(
                    f"{self.path}: {info.name} has {len(info.shape)} dimensions; only vectors and "
                    "matrices can be quantized"
                )

    @property
    def blocks(self) -> int:
        """How many blocks the file stores."""
        return int(self.numbers["block_count"])

    @property
    def tied(self) -> bool:
        """Whether the embedding is the head as well."""
        return "output.weight" not in self.tensors

    def raw(self, name: str) -> npt.NDArray[np.uint8]:
        """A tensor's bytes."""
        info = self.tensors[name]
        data = np.fromfile(self.path, np.uint8, info.n_bytes, offset=info.start)
        if data.nbytes != info.n_bytes:
            raise ModelError(f"{self.path} is cut off within {name}")
        return data

    def values(self, name: str) -> Floats:
        """A tensor as float32, in its shape. Raises ModelError for what is no finite number."""
        info = self.tensors[name]
        values = dequantize(self.raw(name), info.type_id, info.shape[-1]).reshape(info.shape)
        if not np.isfinite(values).all():
            raise ModelError(f"{self.path}: {name} holds a number that is not finite")
        return values


def _raw_metadata(path: Path) -> dict[str, bytes]:
    """Type and value of each key, as they are in a file that ggml's parser has read."""
    found: dict[str, bytes] = {}
    with open(path, "rb") as file:

        def unpack(form: str) -> int:
            return int(struct.unpack(form, file.read(struct.calcsize(form)))[0])

        def skip(kind: int) -> None:
            if kind == _STRING:
                file.seek(unpack("<Q"), os.SEEK_CUR)
            elif kind == _ARRAY:
                items, count = unpack("<I"), unpack("<Q")
                if items in _SIZES:
                    file.seek(count * _SIZES[items], os.SEEK_CUR)
                else:
                    for _ in range(count):
                        skip(items)
            else:
                file.seek(_SIZES[kind], os.SEEK_CUR)

        file.seek(16)  # "GGUF", version, number of tensors
        for _ in range(unpack("<Q")):
            key = file.read(unpack("<Q")).decode("utf-8", "replace")
            start = file.tell()
            skip(unpack("<I"))
            end = file.tell()
            file.seek(start)
            found[key] = file.read(end - start)
    found.pop("general.alignment", None)
    return found
