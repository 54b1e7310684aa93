"""The way of a checkpoint into a GGUF file, a few rows at a time."""

from __future__ import annotations

import os
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from mobilellm_cpp.errors import CheckpointError

from ..quant.lattice import CODES, Deviation, LatticeRounder
from ..quant.recipe import EMBEDDING, HEAD, exact_types, smallest, tensor_type
from ..quant.rounding import Array, NotRepresentable, Rounder
from ..quant.types import EXACT, EXACT_TYPES, F32, OUTPUT_TYPES, TensorType, WeightType
from .checkpoint import Checkpoint, open_checkpoint
from .families import Model, Weight, build_model
from .gguf_file import GGUFFile, boolean, check_output, string, u32
from .portable import portable as for_stock
from .tokenizer import read_tokenizer

CHUNK = 1 << 18  # weights that one thread works on at a time: they stay in its cache
QUANTIZATION_VERSION = 2  # ggml's GGML_QNT_VERSION

Progress = Callable[[int, int, str], None]
T = TypeVar("T")


@dataclass(frozen=True)
class LatticeReport:
    """What type `exact` made of the matrices of the blocks: `n_weights` were on a lattice, of
    which `n_different` differ from the checkpoint's, by at most `deviation` of the weight;
    `off_lattice` are the GGUF names of those on none, written as the floats they are."""

    n_weights: int
    n_different: int
    deviation: float
    off_lattice: tuple[str, ...]


@dataclass(frozen=True)
class ConversionReport:
    """What was written: `n_stored` blocks, `n_executed` layers, `schedule` the block of each
    layer; `bits_per_weight` counts tensor data only; `notes` are remarks for people; `lattice`
    is there for type `exact`."""

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
    lattice: LatticeReport | None = None


def convert_checkpoint(
    source: str | Path | Checkpoint,
    out: str | Path | None = None,
    *,
    type: WeightType = "f16",
    schedule: str | Sequence[int] | None = None,
    settings: Mapping[str, Any] | None = None,
    portable: bool = False,
    chat_template: str | None = None,
    revision: str | None = None,
    progress: Progress | None = None,
) -> ConversionReport:
    """Write the checkpoint `source`, a folder, a hub id or an open one, as the GGUF file `out`.

    `type` is f32, f16, bf16, q8_0, q4_0 or exact. The last keeps checkpoints that were trained
    for few bits (ParetoQ, int4 in groups of 32) as they are: each matrix whose stored floats lie
    on a lattice goes into blocks of 1 to 4 bits that hold it, everything else stays the floats it
    is; where rounding in the checkpoint took a weight off its lattice, `lattice` of the report
    counts it. It is refused when no matrix is on a lattice.
    `schedule` overrides the order in which the stored blocks are executed: immediate,
    repeat-all-over, reverse, "0,0,1,..." or block numbers.
    `settings` override fields of config.json (of a source that is not open yet).
    A `portable` file is one for stock, unpatched llama.cpp, with shared blocks written out.
    `chat_template` is the name of one of the checkpoint's chat templates, or a file with one, that
    becomes the file's own.
    Without `out` the file goes to <name>-<type>[-portable].gguf in the current folder.
    `progress` gets the bytes done, the bytes in all and the tensor's name, in the calling thread;
    with `exact` first the weights that are searched, then the bytes that are written.
    Raises CheckpointError for whatever cannot be converted; `out` is then as it was before.
    """
    if type not in (*OUTPUT_TYPES, EXACT):
        names = ", ".join((*OUTPUT_TYPES, EXACT))
        raise CheckpointError(f"type must be one of {names}, not {type!r}.")
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
        stock = model.architecture != "mobilellm"
        tokenizer, notes = read_tokenizer(
            checkpoint.folder, checkpoint.config, model.decoder.vocab, stock, chat_template
        )
        if unread := checkpoint.config.unread:
            raise CheckpointError(f"the setting {min(unread)} is no field that this model reads.")
        if type == EXACT:
            types = _exact_types(checkpoint, model.weights, progress)
        else:
            types = {
                weight.name: tensor_type(type, weight.name, weight.tensor.shape, model.tied)
                for weight in model.weights
            }
    except OSError as error:
        raise CheckpointError(f"{error.filename or source}: {error.strerror or error}.") from error
    file_type = _main_type(model.weights, types) if type == EXACT else OUTPUT_TYPES[type][1]
    general = _general(checkpoint, model, file_type)
    if type == EXACT:
        general["mobilellm.exact"] = boolean(True)
    file = GGUFFile(
        path,
        {**general, **model.metadata, **tokenizer},
        [(w.name, w.tensor.shape, types[w.name]) for w in model.weights],
    )
    deviations: list[Deviation] = []
    rounder = LatticeRounder(deviations) if type == EXACT else Rounder()
    _write(file, model.weights, types, rounder, progress)
    lattice = _lattice_report(model.weights, types, deviations) if type == EXACT else None
    if lattice is not None and (off := lattice.off_lattice):
        shown = ", ".join(off[:4]) + (f" and {len(off) - 4} more" if len(off) > 4 else "")
        notes.append(f"on no lattice, written as the floats they are: {shown}")

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
        lattice=lattice,
    )


def _exact_types(
    checkpoint: Checkpoint, weights: list[Weight], progress: Progress | None
) -> dict[str, TensorType]:
    """The smallest type that holds each tensor as it is; refused when no lattice is among them."""
    able = {weight.name: set(EXACT_TYPES) for weight in weights}
    rounder = Rounder()

    def search(weight: Weight, first: int, last: int) -> set[TensorType]:
        tensor = weight.tensor
        if len(tensor.shape) < 2:
            return {F32}
        if len(able[weight.name]) == 1:  # the rows before need the tensor's own type
            return able[weight.name]
        bits = np.require(tensor.bits[first:last], requirements="A")
        _check(rounder, weight, bits, F32, first)
        found = exact_types(weight.name, bits, tensor.dtype)
        tensor.release(first, last)
        return found

    total = sum(weight.tensor.bits.size for weight in weights)
    done = 0
    with closing(_each_chunk(weights, search)) as chunks:
        for weight, rows, found in chunks:
            able[weight.name] &= found
            done += rows * _matrix(weight).shape[1]
            if progress is not None:
                progress(done, total, weight.name)
    types = {name: smallest(kinds) for name, kinds in able.items()}
    if not any(kind in CODES for kind in types.values()):
        raise CheckpointError(
            f"{checkpoint.folder}: no matrix is on a lattice of 1 to 4 bits, so there is nothing "
            f"for type {EXACT} to keep: use type f16."
        )
    return types


def _main_type(weights: list[Weight], types: dict[str, TensorType]) -> int:
    """general.file_type for the block type that holds the most weights."""
    sizes: Counter[TensorType] = Counter()
    for weight in weights:
        if types[weight.name] in CODES:
            sizes[types[weight.name]] += weight.tensor.bits.size
    return EXACT_TYPES[sizes.most_common(1)[0][0]]


def _lattice_report(
    weights: list[Weight], types: dict[str, TensorType], deviations: list[Deviation]
) -> LatticeReport:
    return LatticeReport(
        n_weights=sum(deviation.weights for deviation in deviations),
        n_different=sum(deviation.different for deviation in deviations),
        deviation=max(deviation.largest for deviation in deviations),
        off_lattice=tuple(
            weight.name
            for weight in weights
            if len(weight.tensor.shape) == 2
            and weight.name not in (EMBEDDING, HEAD)
            and types[weight.name] not in CODES
        ),
    )


def _general(checkpoint: Checkpoint, model: Model, file_type: int) -> dict[str, bytes]:
    return {
        "general.architecture": string(model.architecture),
        "general.type": string("model"),
        "general.name": string(_title(checkpoint.name)),
        "general.file_type": u32(file_type),
        "general.quantization_version": u32(QUANTIZATION_VERSION),
    }


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
    rounder: Rounder,
    progress: Progress | None,
) -> None:
    """Convert all weights into the file."""

    def convert(weight: Weight, first: int, last: int) -> int:
        return _convert_rows(file, rounder, weight, types[weight.name], first, last)

    total = sum(file.sizes.values())
    done = 0
    with file, closing(_each_chunk(weights, convert)) as chunks:
        for weight, _, written in chunks:
            done += written
            if progress is not None:
                progress(done, total, weight.name)


def _each_chunk(
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
    _check(rounder, weight, bits, kind, first)
    if weight.head_rows:
        bits = reorder(bits, weight.head_rows, weight.to_halves)
    data = rounder.round(bits, tensor.dtype, kind)
    file.write(weight.name, first * kind.row_bytes(bits.shape[1]), data.data)
    if len(tensor.shape) == 2:
        tensor.release(first, last)
    return data.nbytes


def _check(rounder: Rounder, weight: Weight, bits: Array, kind: TensorType, first: int) -> None:
    """Refuse rows `bits`, from row `first` on, if `kind` cannot hold a value of theirs."""
    tensor = weight.tensor
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


def reorder(bits: Array, head_rows: int, to_halves: bool) -> Array:
    """Rows (heads * head_rows, columns) with row i of a head and row i + head_rows/2 made
    neighbours, or `to_halves` back again: transformers' Llama rotates split halves, ggml's
    neighbouring pairs."""
    rows, columns = bits.shape
    inner = (head_rows // 2, 2) if to_halves else (2, head_rows // 2)
    heads = bits.reshape(rows // head_rows, *inner, columns)
    ordered: Array = heads.swapaxes(1, 2).reshape(rows, columns)
    return ordered
