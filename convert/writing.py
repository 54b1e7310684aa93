"""Checks, reorders, rounds and writes the weights of a file, a few rows at a time."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from typing import TypeVar

import numpy as np

from mobilellm_cpp.errors import CheckpointError

from ..quant.lattice import LatticeRounder
from ..quant.qat import pack, scales_per_block
from ..quant.rounding import Array, NotRepresentable, Rounder
from ..quant.types import Q4_0, TensorType
from .adapter import LowRank
from .families import Weight
from .gguf_file import GGUFFile
from .tensor import BITS, Tensor

CHUNK = 1 << 18  # weights that one thread works on at a time: they stay in its cache

Progress = Callable[[int, int, str], None]
T = TypeVar("T")


def title(name: str) -> str:
    """A folder's name as llama.cpp's converter writes it: tiny-model-v1 is "Tiny Model v1"."""
    words = name.replace("-", " ").split()

    def is_version(word: str) -> bool:
        return word[0].isdigit() or word.removeprefix("v").replace(".", "").isdigit()

    return " ".join(w.title() if w.islower() and not is_version(w) else w for w in words)


def write(
    file: GGUFFile,
    weights: list[Weight],
    types: dict[str, TensorType],
    rounder: Rounder,
    progress: Progress | None,
) -> None:
    """Convert all weights into the file."""

    def convert(weight: Weight, first: int, last: int) -> int:
        return _convert_rows(file, rounder, weight, types[weight.name], first, last)

    total = sum(file.sizes.values())
    done = 0
    with file, closing(each_chunk(weights, convert)) as chunks:
        for weight, _, written in chunks:
            done += written
            if progress is not None:
                progress(done, total, weight.name)


def each_chunk(
    weights: list[Weight], work: Callable[[Weight, int, int], T]
) -> Generator[tuple[Weight, int, T], None, None]:
    """work(weight, first row, last row) for all chunks, on a few threads: yields the weight, the
    number of rows and the result, in order. An error is that of the first chunk that has one."""
    threads = min(4, os.cpu_count() or 1)
    running: deque[tuple[Weight, int, Future[T]]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        for weight in weights:
            for first, last in _chunks(weight):
                running.append((weight, last - first, pool.submit(work, weight, first, last)))
                if len(running) > 2 * threads:
                    weight_done, rows, job = running.popleft()
                    yield weight_done, rows, job.result()
        for weight, rows, job in running:
            yield weight, rows, job.result()


def _chunks(weight: Weight) -> Iterator[tuple[int, int]]:
    """Row ranges of about CHUNK weights; those of q and k hold whole heads."""
    rows, columns = matrix(weight).shape
    unit = weight.head_rows or 1
    step = max(1, CHUNK // (unit * columns)) * unit
    return ((first, min(first + step, rows)) for first in range(0, rows, step))


def matrix(weight: Weight) -> Array:
    bits = weight.tensor.bits
    return bits if bits.ndim == 2 else bits.reshape(1, -1)


def _convert_rows(
    file: GGUFFile, rounder: Rounder, weight: Weight, kind: TensorType, first: int, last: int
) -> int:
    """Check, reorder, round and write rows first..last; returns the bytes written."""
    tensor = weight.tensor
    bits, source = matrix(weight)[first:last], tensor.dtype
    if weight.added is not None:
        bits, source = _merged(rounder, weight, weight.added, first, last), "F32"
    check(rounder, weight, bits, source, kind, first)
    if weight.scale is not None and isinstance(rounder, LatticeRounder) and kind is Q4_0:
        scales = block_scales(weight, weight.scale, first, last)
        assert scales is not None  # or the type would be another one
        values = in_order(weight, rounder.widen(bits, source))
        types = (source, weight.scale.dtype)
        data, deviation = pack(values, in_order(weight, scales), types)
        rounder.deviations.append(deviation)
    else:
        data = rounder.round(in_order(weight, bits), source, kind)
    file.write(weight.name, first * kind.row_bytes(bits.shape[1]), data.data)
    if len(tensor.shape) == 2:
        tensor.release(first, last)
    return data.nbytes


def _merged(rounder: Rounder, weight: Weight, added: LowRank, first: int, last: int) -> Array:
    """Rows first..last with what an adapter adds to them, as the bits of float32."""
    values = np.array(rounder.widen(matrix(weight)[first:last], weight.tensor.dtype))
    b = np.array(rounder.widen(added.b.bits[first:last], added.b.dtype))
    with np.errstate(all="ignore"):  # what is no number is refused when it is checked
        values += (b * np.float32(added.scale)) @ rounder.widen(added.a.bits, added.a.dtype)
    return values.view(np.uint32)


def block_scales(weight: Weight, scale: Tensor, first: int, last: int) -> Array | None:
    """float32 [rows, blocks of Q4_0]: the checkpoint's own scales for rows first..last, as they are
    stored; None where they are not for whole blocks of rows."""
    rows, columns = matrix(weight).shape
    if scale.dtype not in BITS or scale.shape[:1] != (rows,) or len(scale.shape) > 2:
        return None
    bits = scale.bits.reshape(rows, -1)[first:last]
    values = np.array(Rounder().widen(bits, scale.dtype))
    return scales_per_block(values, last - first, columns)


def check(
    rounder: Rounder, weight: Weight, bits: Array, source: str, kind: TensorType, first: int
) -> None:
    """Refuse rows `bits` of type `source`, from row `first` on, if `kind` cannot hold a value of
    theirs."""
    tensor = weight.tensor
    try:
        rounder.check(bits, source, kind)
    except NotRepresentable as problem:
        row, column = problem.index
        position = [first + row, column][-len(tensor.shape) :]
        merged = "" if weight.added is None else ", with the adapter merged,"
        if np.isfinite(problem.value):
            raise CheckpointError(
                f"{tensor}{merged} holds {problem.value:g} at {position}, beyond what {kind.name} "
                "can hold: use type bf16 or f32."
            ) from None
        raise CheckpointError(f"{tensor}{merged} holds {problem.value} at {position}.") from None


def in_order(weight: Weight, rows: Array) -> Array:
    """Whole heads of rows (heads * head_rows, columns) with row i of a head and row i + head_rows/2
    made neighbours, or with `to_halves` back again: transformers' Llama rotates split halves,
    ggml's neighbouring pairs. Rows of other weights stay as they are."""
    if not weight.head_rows:
        return rows
    count, columns = rows.shape
    half = weight.head_rows // 2
    inner = (half, 2) if weight.to_halves else (2, half)
    heads = rows.reshape(count // weight.head_rows, *inner, columns)
    ordered: Array = heads.swapaxes(1, 2).reshape(count, columns)
    return ordered
