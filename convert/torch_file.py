"""Reads .bin files, which torch.save wrote: memory-mapped, and never running what a pickle asks."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mobilellm_cpp.errors import CheckpointError

from .tensor import BITS, Tensor, shown


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
                f"{path}: {shown(name)} is a {type(value).__name__}, where a tensor is due."
            )
        dtype = names.get(value.dtype, str(value.dtype))
        if value.layout != torch.strided or value.device.type != "cpu":
            dtype = f"{value.layout} {dtype}"
        tensors[name] = Tensor(name, dtype, tuple(value.shape), path, _bits(value, dtype))
    return tensors


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
