"""Reads .safetensors files: a strict header parser over a memory map; nothing is copied.

Layout: 8 bytes of header length, little-endian; a JSON header that gives each tensor's dtype,
shape and byte range; then the bytes of all tensors, without holes.
"""

from __future__ import annotations

import json
import math
import mmap
from pathlib import Path
from typing import Any

import numpy as np

from mobilellm_cpp.errors import CheckpointError

from .tensor import BITS, Tensor, shown

MAX_HEADER = 100_000_000
WIDTHS = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "BOOL": 1,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U64": 8,
    "U32": 4,
    "U16": 2,
    "U8": 1,
}  # bytes of one value


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of the file, as views of the mapped file."""
    try:
        with open(path, "rb") as file:
            size = file.seek(0, 2)
            if size < 8:
                raise CheckpointError(f"{path} is truncated: it has {size} bytes.")
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from None

    length = int.from_bytes(mapped[:8], "little")
    if length > MAX_HEADER:
        raise CheckpointError(
            f"{path} is not a safetensors file: its header would be {length} bytes."
        )
    start = 8 + length
    if start > size:
        raise CheckpointError(
            f"{path} is truncated: its header ends at byte {start} and the file has {size} bytes."
        )
    header = _parse_header(path, mapped[8:start])

    end = 0
    tensors: dict[str, Tensor] = {}
    for name, (dtype, shape, first, last) in sorted(header.items(), key=lambda item: item[1][2:]):
        if first != end:
            raise CheckpointError(
                f"{path}: {shown(name)} starts at byte {first} of the data, not at byte {end}."
            )
        end = last
        if start + end > size:
            continue  # the whole extent is needed for the message below
        count = math.prod(shape)
        raw = np.frombuffer(mapped, np.uint8, last - first, start + first)
        bits = raw.view(BITS[dtype]).reshape(shape) if dtype in BITS and count else raw
        tensors[name] = Tensor(name, dtype, shape, path, bits, mapped, start + first)
    if start + end != size:
        problem = "truncated" if start + end > size else "longer than its header says"
        raise CheckpointError(
            f"{path} is {problem}: its header describes {start + end} bytes "
            f"and the file has {size} bytes."
        )
    return tensors


def _parse_header(path: Path, text: bytes) -> dict[str, tuple[str, tuple[int, ...], int, int]]:
    """Tensor name to dtype, shape, first byte and byte after the last one."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        fields = dict(pairs)
        if len(fields) != len(pairs):
            raise ValueError("a name occurs twice")
        return fields

    try:
        header = json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} has a broken safetensors header: {error}.") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{path} has a broken safetensors header: it is not a JSON object.")
    header.pop("__metadata__", None)
    return {name: _parse_entry(f"{path}: {shown(name)}", entry) for name, entry in header.items()}


def _parse_entry(place: str, entry: Any) -> tuple[str, tuple[int, ...], int, int]:
    def whole_numbers(values: Any) -> bool:
        return isinstance(values, list) and all(type(v) is int and v >= 0 for v in values)

    if not isinstance(entry, dict):
        raise CheckpointError(f"{place} has a header entry that is not a JSON object.")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in WIDTHS:
        raise CheckpointError(f"{place} has the unknown dtype {shown(dtype)}.")
    if not isinstance(shape, list) or not whole_numbers(shape) or len(shape) > 8:
        raise CheckpointError(f"{place} has the impossible shape {shown(shape)}.")
    if not isinstance(offsets, list) or not whole_numbers(offsets) or len(offsets) != 2:
        raise CheckpointError(f"{place} has the impossible data_offsets {shown(offsets)}.")
    need = math.prod(shape) * WIDTHS[dtype]
    first, last = offsets
    if last - first != need:
        raise CheckpointError(
            f"{place} has {last - first} bytes, but its shape {shown(shape)} in {dtype} "
            f"needs {need}."
        )
    return dtype, tuple(shape), first, last
