"""Reads .bin files, which torch.save wrote: memory-mapped, and never running what a pickle asks.

torch.load keeps a pickle from code that is not on its list, not from time and memory: `bytearray`
is on the list, a tuple of twice the same tuple takes 2^n steps to be a key, and a few megabytes of
a zip file can hold terabytes. So the pickle is looked through before torch reads it.
"""

from __future__ import annotations

import pickletools
import re
import zipfile
from pathlib import Path
from typing import Any

from mobilellm_cpp.errors import CheckpointError

from .tensor import BITS, Tensor, shown

MAX_PICKLE = 1 << 21  # bytes: about 100 a tensor

# What torch.save names in a state dict; the types of storages beside it.
_NAMED = re.compile(
    r"collections OrderedDict|torch\._utils _rebuild_(tensor_v[23]|parameter|sparse_tensor)|"
    r"torch Size|torch\.serialization _get_layout|torch(\.storage)? \w+Storage|"
    r"torch (\w+\d+|float8_\w+)"
)


def read_torch(path: Path) -> dict[str, Tensor]:
    """The tensors of a state dict, as views of the mapped file; needs torch."""
    try:
        with open(path, "rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from None
    if magic != b"PK\x03\x04":
        raise CheckpointError(
            f"{path} is not in torch's zip format: if you trust it, load it with torch.load and "
            "save it again with torch.save (torch 1.6 or later)."
        )
    try:
        import torch
    except ImportError:
        raise CheckpointError(
            f"{path} needs torch to be read: pip install 'mobilellm-cpp[torch]', "
            "or use a safetensors checkpoint."
        ) from None

    _look_through(path)
    try:
        state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # a hostile file can raise anything here
        raise CheckpointError(f"{path} {_reason(error)}.") from None
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} holds a {type(state).__name__}, not a dict of tensors.")

    names = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
    names |= {torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2"}
    tensors: dict[str, Tensor] = {}
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise CheckpointError(
                f"{path}: {shown(name)} is a {type(value).__name__} instead of a tensor."
            )
        dtype = names.get(value.dtype, str(value.dtype))
        if value.layout != torch.strided or value.device.type != "cpu":
            dtype = f"{value.layout} {dtype}"
        tensors[name] = Tensor(name, dtype, tuple(value.shape), path, _bits(value, dtype))
    return tensors


def _look_through(path: Path) -> None:
    """Refuses a file whose pickle is larger than any state dict's, is compressed, names what no
    state dict does, or refers to a tuple twice."""
    try:
        with zipfile.ZipFile(path) as archive:
            pickles = [info for info in archive.infolist() if info.filename.endswith("data.pkl")]
            if [info for info in archive.infolist() if info.compress_type != zipfile.ZIP_STORED]:
                raise CheckpointError(f"{path} is compressed, which no file of torch.save is.")
            if len(pickles) != 1:
                raise CheckpointError(f"{path} holds {len(pickles)} pickles instead of one.")
            if pickles[0].file_size > MAX_PICKLE:
                raise CheckpointError(
                    f"{path} describes its tensors in {pickles[0].file_size} bytes, "
                    f"more than {MAX_PICKLE}."
                )
            data = archive.read(pickles[0])
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, OSError):
        raise CheckpointError(
            f"{path} is truncated or corrupt: its zip directory is not found."
        ) from None

    tuples: set[Any] = set()
    last = ""
    try:
        for code, argument, _ in pickletools.genops(data):
            if code.name == "GLOBAL" and not _NAMED.fullmatch(str(argument)):
                called = str(argument).replace(" ", ".")
                raise CheckpointError(
                    f"{path} is refused: reading it would call {called}, "
                    "and a file of weights must not call anything."
                )
            if code.name.endswith("BINPUT"):
                (tuples.add if last.startswith("TUPLE") else tuples.discard)(argument)
            elif code.name.endswith("BINGET") and argument in tuples:
                raise CheckpointError(f"{path} refers to a tuple twice, which no state dict does.")
            else:
                last = code.name
    except (ValueError, IndexError) as error:
        raise CheckpointError(f"{path} cannot be read as a pickle: {error}.") from None


def _bits(value: Any, dtype: str) -> Any:
    """The tensor's memory as numpy; its strides stay."""
    import numpy as np
    import torch

    if dtype not in BITS:
        return np.empty(0, np.uint8)
    integers = value.detach().view(torch.int32 if dtype == "F32" else torch.int16)
    return integers.numpy().view(BITS[dtype])


def _reason(error: Exception) -> str:
    text = str(error)
    if match := re.search(r"GLOBAL ([\w.]+)", text):
        return f"is refused: to read it would call {match[1]}, and a file of weights calls nothing"
    if "central directory" in text:
        return "is truncated or corrupt: its zip directory is not found"
    first = text.strip().splitlines()[0] if text.strip() else type(error).__name__
    return f"cannot be read as a file of tensors: {first[:200].rstrip('.')}"
