"""The way of a checkpoint into a GGUF file, a few rows at a time."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mobilellm_cpp.errors import CheckpointError

from ..quant.recipe import tensor_type
from ..quant.rounding import Array, NotRepresentable, Rounder
from ..quant.types import OUTPUT_TYPES, TensorType
from .checkpoint import Checkpoint, open_checkpoint
from .families import Model, Weight, build_model
from .gguf_file import GGUFFile, check_output, string, u32
from .portable import portable as for_stock
from .tokenizer import read_tokenizer

CHUNK = 1 << 18  # weights that one thread works on at a time: they stay in its cache
QUANTIZATION_VERSION = 2  # ggml's GGML_QNT_VERSION

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class ConversionReport:
    """What was written: `n_stored` blocks, `n_executed` layers, `schedule` the block of each
    layer; `bits_per_weight` counts tensor data only; `notes` are remarks for people."""

    path: Path
    architecture: str
    type: str
    size_bytes: int
    n_params: int
    bits_per_weight: float
    n_stored: int
    n_executed: int
    schedule: tuple[int, ...]
    tied: bool
    notes: list[str]


def convert_checkpoint(
    source: str | Path | Checkpoint,
    out: str | Path | None = None,
    *,
    type: str = "f16",
    schedule: str | Sequence[int] | None = None,
    settings: Mapping[str, Any] | None = None,
    portable: bool = False,
    revision: str | None = None,
    progress: Progress | None = None,
) -> ConversionReport:
    """Write the checkpoint `source`, a folder, a hub id or an open one, as the GGUF file `out`.

    `type` is f32, f16, bf16, q8_0 or q4_0. `schedule` overrides the order in which the stored
    blocks are executed: immediate, repeat-all-over, reverse, "0,0,1,..." or block numbers.
    `settings` override fields of config.json (of a source that is not open yet).
    A `portable` file is one for stock, unpatched llama.cpp, with shared blocks written out.
    Without `out` the file goes to <name>-<type>[-portable].gguf in the current folder.
    `progress` gets the bytes done, the bytes in all and the tensor's name, in the calling thread.
    Raises CheckpointError for whatever cannot be converted; `out` is then as it was before.
    """
    if type not in OUTPUT_TYPES:
        raise CheckpointError(f"type must be one of {', '.join(OUTPUT_TYPES)}, not {type!r}.")
    try:
        checkpoint = source
        if not isinstance(checkpoint, Checkpoint):
            checkpoint = open_checkpoint(checkpoint, revision, settings)
        name = f"{checkpoint.name}-{type}{'-portable' if portable else ''}.gguf"
        path = Path(name if out is None else out).expanduser()
        check_output(path, checkpoint.files)
        model = build_model(checkpoint.config, checkpoint.tensors, schedule)
        if portable:
            model = for_stock(model)
        metadata, notes = _metadata(checkpoint, model, type)
        if unread := checkpoint.config.unread:
            raise CheckpointError(f"the setting {min(unread)} is no field that this model reads.")
        types = {
            weight.name: tensor_type(type, weight.name, weight.tensor.shape, model.tied)
            for weight in model.weights
        }
    except OSError as error:
        raise CheckpointError(f"{error.filename or source}: {error.strerror or error}.") from error
    file = GGUFFile(
        path, metadata, [(w.name, w.tensor.shape, types[w.name]) for w in model.weights]
    )
    _write(file, model.weights, types, progress)

    n_params = sum(weight.tensor.bits.size for weight in model.weights)
    return ConversionReport(
        path=path,
        architecture=model.architecture,
        type=type,
        size_bytes=file.size,
        n_params=n_params,
        bits_per_weight=8 * sum(file.sizes.values()) / n_params,
        n_stored=model.decoder.blocks,
        n_executed=len(model.schedule),
        schedule=model.schedule,
        tied=model.tied,
        notes=[*model.notes, *notes],
    )


def _metadata(
    checkpoint: Checkpoint, model: Model, type: str
) -> tuple[dict[str, bytes], list[str]]:
    tokenizer, notes = read_tokenizer(checkpoint.folder, checkpoint.config, model.decoder.vocab)
    general = {
        "general.architecture": string(model.architecture),
        "general.type": string("model"),
        "general.name": string(_title(checkpoint.name)),
        "general.file_type": u32(OUTPUT_TYPES[type][1]),
        "general.quantization_version": u32(QUANTIZATION_VERSION),
    }
    return {**general, **model.metadata, **tokenizer}, notes


def _title(name: str) -> str:
    """A folder's name as llama.cpp's converter writes it: tiny-model-v1 is "Tiny Model v1"."""
    words = name.replace("-", " ").split()

    def is_version(word: str) -> bool:
        return word[0].isdigit() or word.removeprefix("v").replace(".", "").isdigit()

    return " ".join(w.title() if w.islower() and not is_version(w) else w for w in words)


def _write(
    file: GGUFFile,
    weights: list[Weight],
    types: dict[str, TensorType],
    progress: Progress | None,
) -> None:
    """Convert all chunks on a few threads; errors are those of the first chunk that has one."""
    rounder = Rounder()
    threads = min(4, os.cpu_count() or 1)
    total = sum(file.sizes.values())
    done = 0
    running: deque[tuple[str, Future[int]]] = deque()

    def finish() -> None:
        nonlocal done
        name, future = running.popleft()
        done += future.result()
        if progress is not None:
            progress(done, total, name)

    with file, ThreadPoolExecutor(threads) as pool:
        for weight in weights:
            for first, last in _chunks(weight):
                job = pool.submit(
                    _convert_rows, file, rounder, weight, types[weight.name], first, last
                )
                running.append((weight.name, job))
                if len(running) > 2 * threads:
                    finish()
        while running:
            finish()


def _chunks(weight: Weight) -> Iterator[tuple[int, int]]:
    """Row ranges of about CHUNK weights; those of q and k hold whole heads."""
    rows, columns = _matrix(weight).shape
    unit = weight.head_rows or 1
    step = max(1, CHUNK // (unit * columns)) * unit
    return ((first, min(first + step, rows)) for first in range(0, rows, step))


def _matrix(weight: Weight) -> Array:
    bits = weight.tensor.bits
    return bits if bits.ndim == 2 else bits.reshape(1, -1)


def _convert_rows(
    file: GGUFFile, rounder: Rounder, weight: Weight, kind: TensorType, first: int, last: int
) -> int:
    """Check, reorder, round and write rows first..last; returns the bytes written."""
    tensor = weight.tensor
    bits = _matrix(weight)[first:last]
    try:
        rounder.check(bits, tensor.dtype, kind)
    except NotRepresentable as problem:
        row, column = problem.index
        position = [first + row, column][-len(tensor.shape) :]
        if np.isfinite(problem.value):
            raise CheckpointError(
                f"{tensor} holds {problem.value:g} at {position}, beyond what {kind.name} can "
                "hold: use type bf16 or f32."
            ) from None
        raise CheckpointError(f"{tensor} holds {problem.value} at {position}.") from None
    if weight.head_rows:
        bits = reorder(bits, weight.head_rows, weight.to_halves)
    data = rounder.round(bits, tensor.dtype, kind)
    file.write(weight.name, first * kind.row_bytes(bits.shape[1]), data.data)
    if len(tensor.shape) == 2:
        tensor.release(first, last)
    return data.nbytes


def reorder(bits: Array, head_rows: int, to_halves: bool) -> Array:
    """Rows (heads * head_rows, columns) with row i of a head and row i + head_rows/2 made
    neighbours, or `to_halves` back again: transformers' Llama rotates split halves, ggml's
    neighbouring pairs."""
    rows, columns = bits.shape
    inner = (head_rows // 2, 2) if to_halves else (2, head_rows // 2)
    heads = bits.reshape(rows // head_rows, *inner, columns)
    ordered: Array = heads.swapaxes(1, 2).reshape(rows, columns)
    return ordered
