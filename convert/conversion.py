"""The way of a checkpoint into a GGUF file, a few rows at a time."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_VERSION, GGUFType, Keys

from mobilellm_cpp.errors import CheckpointError

from ..quant import qat
from ..quant.lattice import CODES, Deviation, LatticeRounder, float_holders
from ..quant.recipe import EMBEDDING, HEAD, exact_types, smallest, tensor_type
from ..quant.rounding import Rounder
from ..quant.types import EXACT, EXACT_TYPES, F32, OUTPUT_TYPES, Q4_0, TensorType
from ..quant.weight_type import WeightType
from . import keys
from .adapter import Adapter
from .adapter_conversion import adapted, open_adapter
from .checkpoint import Checkpoint, open_checkpoint
from .families import Model, Weight, build_model
from .gguf_file import GGUFFile, boolean, check_output, string, u32
from .portable import portable as for_stock
from .tokenizer import read_tokenizer
from .writing import Progress, block_scales, check, each_chunk, matrix, title, write


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
    head: str | None = None,
    schedule: str | Sequence[int] | None = None,
    settings: Mapping[str, Any] | None = None,
    portable: bool = False,
    chat_template: str | None = None,
    revision: str | None = None,
    adapter: str | Path | Adapter | None = None,
    progress: Progress | None = None,
) -> ConversionReport:
    """Write the checkpoint `source`, a folder, a hub id or an open one, as the GGUF file `out`.

    `type` is f32, f16, bf16, q8_0, q4_0 or exact. The last keeps checkpoints that were trained
    for few bits (ParetoQ, int4 in groups of 32) as they are: each matrix whose stored floats lie
    on a lattice goes into blocks of 1 to 4 bits that hold it, everything else stays the floats it
    is; where rounding in the checkpoint took a weight off its lattice, `lattice` of the report
    counts it. Where the checkpoint holds scales of quantization-aware training (torchao's
    `weight_fake_quantizer.scale`) they are the lattice, and weights that are not on it yet are
    rounded as the training rounded them. It is refused when no matrix is on a lattice.
    `head` is another type for the output head (the embedding, where they are one): q5_0, q4_0, or
    any other that `mobilellm quantize` writes.
    `schedule` overrides the order in which the stored blocks are executed: immediate,
    repeat-all-over, reverse, "0,0,1,..." or block numbers.
    `settings` override fields of config.json (of a source that is not open yet).
    The LoRA `adapter`, a PEFT folder, is merged into the weights in float32; the file gets its chat
    templates, if it has any.
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
    if type == EXACT and head is not None:
        raise CheckpointError(f"type {EXACT} keeps the head as it is: it cannot have another type.")
    try:
        checkpoint = source
        if not isinstance(checkpoint, Checkpoint):
            checkpoint = open_checkpoint(checkpoint, revision, settings)
        adapter = None if adapter is None else open_adapter(adapter)
        name = checkpoint.name if adapter is None else f"{adapter.name}-merged"
        file_name = f"{name}-{type}{'-portable' if portable else ''}.gguf"
        path = Path(file_name if out is None else out).expanduser()
        check_output(path, [*checkpoint.files, *(adapter.files if adapter else [])])
        model = build_model(checkpoint.config, checkpoint.tensors, schedule)
        if adapter is not None:
            model = _merged(model, adapter, type)
        if portable:
            model = for_stock(model)
        stock = model.architecture != "mobilellm"
        tokenizer, notes = read_tokenizer(
            checkpoint.folder,
            checkpoint.config,
            model.decoder.vocab,
            stock,
            chat_template,
            adapter.folder if adapter else None,
        )
        if unread := checkpoint.config.unread:
            raise CheckpointError(
                f"the setting {min(unread)} is not a field that this model reads."
            )
        if type == EXACT:
            types = _exact_types(checkpoint, model.weights, progress)
        else:
            types = {
                weight.name: tensor_type(type, weight.name, weight.tensor.shape, model.tied, head)
                for weight in model.weights
            }
    except OSError as error:
        raise CheckpointError(f"{error.filename or source}: {error.strerror or error}.") from error
    file_type = _main_type(model.weights, types) if type == EXACT else OUTPUT_TYPES[type][1]
    general = _general(name, model, file_type)
    if type == EXACT:
        general[keys.EXACT] = boolean(True)
    file = GGUFFile(
        path,
        {**general, **model.metadata, **tokenizer},
        [(w.name, w.tensor.shape, types[w.name]) for w in model.weights],
    )
    if scaled := [w for w in model.weights if w.scale is not None]:
        of_scales = sum(type == EXACT and types[w.name] is Q4_0 for w in scaled)
        if of_scales:
            notes.append(
                f"{of_scales} matrices are on the checkpoint's own scales (fake quantizer)"
            )
        if left := len(scaled) - of_scales:
            way = "" if type == EXACT else f": type {EXACT} takes them"
            notes.append(f"{left} scales of quantization-aware training are left out{way}")
    deviations: list[Deviation] = []
    rounder = LatticeRounder(deviations) if type == EXACT else Rounder()
    write(file, model.weights, types, rounder, progress)
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
        notes=[*checkpoint.notes, *model.notes, *notes],
        lattice=lattice,
    )


def _merged(model: Model, adapter: Adapter, type: str) -> Model:
    """The model with what an adapter adds to its matrices."""
    if type == EXACT:
        raise CheckpointError(
            f"an adapter moves weights off their lattice: merge it with a type other than {EXACT}."
        )
    found = adapted(adapter, model.decoder, model.schedule, model.tied)
    added = {name: part for name, (part, _) in found.items()}
    weights = [dataclasses.replace(w, added=added.get(w.name)) for w in model.weights]
    note = f"{len(added)} matrices have the adapter {adapter.name} merged into them"
    return dataclasses.replace(model, weights=weights, notes=[*model.notes, note])


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
        check(rounder, weight, bits, tensor.dtype, F32, first)
        if weight.scale is not None:
            found = float_holders(bits, tensor.dtype)
            scales = block_scales(weight, weight.scale, first, last)
            types = (tensor.dtype, weight.scale.dtype)
            if scales is not None and qat.fits(rounder.widen(bits, tensor.dtype), scales, types):
                found.add(Q4_0)
        else:
            found = exact_types(weight.name, bits, tensor.dtype)
        tensor.release(first, last)
        return found

    total = sum(weight.tensor.bits.size for weight in weights)
    done = 0
    with closing(each_chunk(weights, search)) as chunks:
        for weight, rows, found in chunks:
            able[weight.name] &= found
            done += rows * matrix(weight).shape[1]
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


def _general(name: str, model: Model, file_type: int) -> dict[str, bytes]:
    return {
        Keys.General.ARCHITECTURE: string(model.architecture),
        Keys.General.TYPE: string(GGUFType.MODEL),
        Keys.General.NAME: string(title(name)),
        Keys.General.FILE_TYPE: u32(file_type),
        Keys.General.QUANTIZATION_VERSION: u32(GGML_QUANT_VERSION),
    }
