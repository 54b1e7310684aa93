"""A tensor as it lies in a checkpoint file."""

from __future__ import annotations

import mmap
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

# How the raw bits of each weight type are held; tensors of other types are never opened.
BITS: dict[str, type[np.uint16] | type[np.uint32]] = {
    "F32": np.uint32,
    "F16": np.uint16,
    "BF16": np.uint16,
}

# What training code puts before the names: DistributedDataParallel, PEFT, a module of one's own.
WRAPPERS = re.compile(
    r"(?:module\.|base_model\.model\.|model\.(?=(?:model|module|base_model|lm_head)\.))+"
)
COMPILED = "_orig_mod."  # torch.compile, which may wrap a part alone


@dataclass(frozen=True)
class Tensor:
    """`bits` has the tensor's shape if `dtype` is in BITS; it is a view of the mapped file.

    Where the map is ours, `mapped` is it and `start` the tensor's first byte in it.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    bits: npt.NDArray[Any]
    mapped: mmap.mmap | None = None
    start: int = 0

    def release(self, first: int, last: int) -> None:
        """Take rows first..last out of the process's memory; they are still there when read."""
        if self.mapped is None or self.bits.size == 0 or not hasattr(mmap, "MADV_DONTNEED"):
            return
        row = self.bits.nbytes // len(self.bits)
        start = (self.start + first * row) // mmap.PAGESIZE * mmap.PAGESIZE
        length = self.start + last * row - start
        self.mapped.madvise(mmap.MADV_DONTNEED, start, length)

    def __str__(self) -> str:
        return f"{self.file}: {shown(self.name)}"


def shown(name: object) -> str:
    """A name from a file, fit for a line of a terminal."""
    text = str(name)
    return text if text.isprintable() and len(text) <= 120 else f"{text[:120]!r}"


def plain_name(name: str) -> str:
    """A tensor's name without what training code wraps around it."""
    name = name.replace(COMPILED, "")
    match = WRAPPERS.match(name)
    return name[match.end() :] if match else name
