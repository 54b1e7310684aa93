"""Writes a GGUF file again with other metadata or tensors, sound or not."""

from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter

U32, I32, F32 = GGUFValueType.UINT32, GGUFValueType.INT32, GGUFValueType.FLOAT32
STRING, ARRAY, BOOL = GGUFValueType.STRING, GGUFValueType.ARRAY, GGUFValueType.BOOL


def rewrite(
    source: Path,
    target: Path,
    fields: dict[str, tuple[Any, ...] | None] | None = None,
    tensors: dict[str, np.ndarray | tuple[np.ndarray, GGMLQuantizationType] | None] | None = None,
) -> Path:
    """fields: key to (value, type) or (value, ARRAY, item type); tensors: name to array (numpy's
    shape), or to raw bytes and their type. None leaves one out; new names are added."""
    reader = GGUFReader(source)
    writer = GGUFWriter(target, "")
    writer.kv_data[0].clear()
    edits = dict(fields or {})
    for field in reader.fields.values():
        if field.name.startswith("GGUF."):
            continue
        item = field.types[1] if len(field.types) > 1 else None
        edits.setdefault(field.name, (field.contents(), field.types[0], item))
    for key, edit in edits.items():
        if edit is not None:
            value, kind, *item = edit
            writer.add_key_value(key, value, kind, item[0] if item else None)
    arrays = dict(tensors or {})
    for tensor in reader.tensors:
        arrays.setdefault(tensor.name, (np.asarray(tensor.data), tensor.tensor_type))
    for name, array in arrays.items():
        if isinstance(array, tuple):
            writer.add_tensor(name, array[0], raw_dtype=array[1])
        elif array is not None:
            writer.add_tensor(name, np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target
