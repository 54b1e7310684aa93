"""`mobilellm quantize`: one GGUF file becomes a smaller one.

The plan (which type each tensor gets) is made before any work; what is rounded is kept in a folder
beside the output until the output is whole, so that an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
from gguf.constants import GGML_QUANT_VERSION, Keys

from .. import __version__
from ..convert.gguf_file import GGUFFile, check_output, u32
from ..convert.keys import IMATRIX_ENTRIES
from ..errors import ModelError
from ..quant.budget import RECIPES, best_mix
from ..quant.mixes import (
    EMBEDDING,
    FILE_TYPES,
    HEAD,
    MIXES,
    Choice,
    is_matrix,
    mix_types,
    type_of_head,
)
from ..quant.rounding import Array, Rounder
from ..quant.types import F32, TensorType
from . import sensitivity
from .sensitivity import Costs
from .source import Source

Bytes = npt.NDArray[np.uint8]
Progress = Callable[[int, int, str], None]

SEQUENCE = 512  # tokens of a text that run through the model at once
SEQUENCES = 24


@dataclass(frozen=True)
class Plan:
    """The type of each tensor, what its matrices come to in bits a weight (all tensors counted),
    and the tensors whose rows do not divide by the block of the type that was wanted."""

    type: str
    kinds: dict[str, TensorType]
    file_type: int
    bits_per_weight: float
    substitutions: dict[str, tuple[TensorType, TensorType]] = field(default_factory=dict)
    largest: bool = False  # more bits would be of no use

    def counts(self) -> Counter[str]:
        """How many matrices have each type."""
        return Counter(kind.name for kind in self.kinds.values() if kind is not F32)


@dataclass(frozen=True)
class Quantized:
    """What was written."""

    path: Path
    size: int
    bits_per_weight: float
    calibrated: bool


def make_plan(
    source: Source,
    type: str,
    *,
    head: str | None = None,
    fallback: bool = True,
    imatrix: bool = False,
) -> Plan:
    """The plan for a type of llama-quantize; `head`: a type for the output head (the embedding,
    where they are one) in place of its own. Raises ModelError for an unknown type, and without
    `fallback` where a tensor cannot have the type that it is to have."""
    if type not in MIXES:
        raise ModelError(f"{type} is not a type; choose one of {', '.join((*MIXES, *RECIPES))}")
    shapes = {name: info.shape for name, info in source.tensors.items()}
    grouping = _grouping(source)
    choices = mix_types(type, shapes, source.blocks, grouping, imatrix)
    if head is not None:
        name = EMBEDDING if source.tied else HEAD
        choices[name] = type_of_head(head, shapes[name][-1], ModelError)
    return plan_of(source, type, choices, MIXES[type][1], fallback)


def plan_mix(source: Source, name: str, bits_per_weight: float, costs: Costs) -> Plan:
    """The mix of types of the least cost whose matrices have at most `bits_per_weight` on the
    average, and 2 % less only where no more bits would help or fit. Raises ModelError where no mix
    of types is as small."""
    sizes = {tensor: source.tensors[tensor].n_elements for tensor in costs}
    wanted = bits_per_weight * sum(sizes.values())
    kinds = best_mix(costs, sizes, wanted)
    made = sum(8 * kind.block_bytes / kind.block * sizes[t] for t, kind in kinds.items())
    if made / wanted > 1.02:
        raise ModelError(
            f"no mix of types has {bits_per_weight:.2f} bits a weight in {source.path.name}: "
            f"the smallest one has {made / sum(sizes.values()):.2f}"
        )
    held = Counter[TensorType]()
    for tensor, kind in kinds.items():
        held[kind] += sizes[tensor]
    file_type = FILE_TYPES[held.most_common(1)[0][0]]
    plan = plan_of(source, name, {t: Choice(kind) for t, kind in kinds.items()}, file_type, True)
    return replace(plan, largest=kinds == best_mix(costs, sizes, float("inf")))


def best_plan(
    source: Source,
    name: str,
    bits_per_weight: float,
    text: str | None,
    progress: Progress | None = None,
) -> Plan:
    """plan_mix for what each tensor costs: as measured on a text, which needs torch, or guessed."""
    if text is None:
        return plan_mix(source, name, bits_per_weight, sensitivity.guessed(source))
    tokens = text_tokens(source, text, sensitivity.SEQUENCES)
    tokens = [sequence[: sensitivity.TOKENS] for sequence in tokens]
    costs = sensitivity.measured(source, tokens, progress)
    return plan_mix(source, name, bits_per_weight, costs)


def bits_for_size(source: Source, size: int) -> float:
    """The bits a weight of the matrices with which the file has `size` bytes. Raises ModelError
    where metadata and vectors alone are larger."""
    infos = source.tensors.values()
    matrices = sum(info.n_elements for info in infos if is_matrix(info.name, info.shape))
    vectors = sum(4 * info.n_elements for info in infos if not is_matrix(info.name, info.shape))
    head = min(info.start for info in infos) + 32 * len(source.tensors)
    bits = 8 * (size - head - vectors) / matrices
    if bits <= 0:
        raise ModelError(
            f"{source.path.name} cannot be made as small as {size} bytes: "
            f"its metadata alone takes {head}"
        )
    return bits


def plan_of(
    source: Source, type: str, choices: Mapping[str, Choice], file_type: int, fallback: bool
) -> Plan:
    substitutions = {
        name: (choice.wanted, choice.kind)
        for name, choice in choices.items()
        if choice.wanted is not None
    }
    if substitutions and not fallback:
        name, (wanted, _) = next(iter(substitutions.items()))
        columns = source.tensors[name].shape[-1]
        raise ModelError(
            f"{name} has rows of {columns}, not a multiple of {wanted.name}'s block of "
            f"{wanted.block}, as have {len(substitutions) - 1} other tensors: without "
            "--no-fallback they get another type"
        )
    kinds = {name: choices[name].kind if name in choices else F32 for name in source.tensors}
    bits = sum(
        8 * kind.row_bytes(shape[-1]) * (int(np.prod(shape)) // shape[-1])
        for kind, shape in ((kinds[name], info.shape) for name, info in source.tensors.items())
    )
    weights = sum(info.n_elements for info in source.tensors.values())
    return Plan(type, kinds, file_type, bits / weights, substitutions)


def _grouping(source: Source) -> int:
    heads = source.numbers.get("attention.head_count")
    kv_heads = source.numbers.get("attention.head_count_kv", heads)
    if isinstance(heads, int) and isinstance(kv_heads, int) and kv_heads > 0:
        return heads // kv_heads
    return 1


def quantize_file(
    source: Source,
    out: str | os.PathLike[str],
    plan: Plan,
    *,
    text: str | None = None,
    imatrix: Mapping[str, Array] | None = None,
    sequences: int = SEQUENCES,
    tune: int = 0,
    progress: Progress | None = None,
) -> Quantized:
    """Writes `out`. With `text` the rounding is calibrated on it, which needs torch, and scales and
    norms of each block are tuned in `tune` steps; with `imatrix` it is ggml's under these weights
    of columns; else ggml's own.

    Raises ModelError for what cannot be calibrated and OutputError where `out` cannot be written.
    """
    path = Path(out).expanduser()
    check_output(path, [source.path])
    metadata = dict(source.metadata)
    metadata[Keys.General.FILE_TYPE] = u32(plan.file_type)
    metadata[Keys.General.QUANTIZATION_VERSION] = u32(GGML_QUANT_VERSION)
    matrices = [name for name, info in source.tensors.items() if is_matrix(name, info.shape)]
    weighted = len(matrices if text is not None else imatrix or {})
    if weighted:
        metadata[IMATRIX_ENTRIES] = u32(weighted)
    infos = [(name, info.shape, plan.kinds[name]) for name, info in source.tensors.items()]
    file = GGUFFile(path, metadata, infos)
    done = 0
    with Kept(path, source, plan, text, sequences, tune) as kept:
        if text is None:
            made = _plain(source, plan, matrices, imatrix or {})
        else:
            made = _calibrated(source, plan, text, sequences, tune, kept)
        for name, data in made:
            if text is not None:
                kept.put(name, data)
            done += source.tensors[name].n_elements if name in matrices else 0
            if progress is not None:
                total = sum(source.tensors[name].n_elements for name in matrices)
                progress(done, total, name)
            if text is None:
                kept.memory[name] = data
        with file:
            for name in source.tensors:
                rounded = kept.get(name)
                rounded = _vector(source, name) if rounded is None else rounded
                file.write(name, 0, np.ascontiguousarray(rounded).data)
        kept.forget()
    return Quantized(path, file.size, plan.bits_per_weight, text is not None)


def _plain(
    source: Source, plan: Plan, names: list[str], imatrix: Mapping[str, Array]
) -> Iterator[tuple[str, Bytes]]:
    """Rounded by ggml; a tensor that has its type already is copied."""
    rounder = Rounder()

    def rounded(rows: Array, kind: TensorType, weights: Array | None) -> Bytes:
        return np.array(rounder.round(rows, "F32", kind, weights)).reshape(-1).view(np.uint8)

    threads = os.cpu_count() or 1
    with ThreadPoolExecutor(threads) as pool:
        for name in names:
            info, kind = source.tensors[name], plan.kinds[name]
            if info.type_id == kind.id:
                yield name, source.raw(name)
                continue
            bits = source.values(name).view(np.uint32)
            parts = [part for part in np.array_split(bits, 4 * threads) if len(part)]
            made = [pool.submit(rounded, part, kind, imatrix.get(name)) for part in parts]
            yield name, np.concatenate([part.result() for part in made])


def _vector(source: Source, name: str) -> Bytes:
    return source.values(name).reshape(-1).view(np.uint8)


def _calibrated(
    source: Source, plan: Plan, text: str, sequences: int, tune: int, kept: Kept
) -> Iterator[tuple[str, Bytes]]:
    try:
        import torch
    except ImportError:
        raise ModelError(sensitivity.NEEDS_TORCH) from None
    from .calibration import Calibration
    from .network import Network

    network = Network(source)
    tokens = torch.tensor(text_tokens(source, text, sequences))
    yield from Calibration(network, plan.kinds, tokens, kept.get, tune=tune).run()


def text_tokens(source: Source, text: str, sequences: int) -> list[list[int]]:
    """Up to so many sequences from all over a text. Raises ModelError for a text that is too
    short."""
    from ..engine.model import MobileLLM
    from ..inspection.perplexity import text_chunks

    context = min(SEQUENCE, int(source.numbers.get("context_length", SEQUENCE)))
    with MobileLLM(source.path, n_ctx=context, n_threads=1, vocab_only=True) as llm:
        count = len(llm.tokenize(text.encode()))
        if count < 2 * context:
            raise ModelError(f"the calibration text has {count} tokens, {2 * context} are needed")
        chunks = text_chunks(llm, text, context, None)
    step = max(1, len(chunks) // sequences)
    return chunks[::step][:sequences]


class Kept:
    """What an unfinished run has rounded: a folder beside the output, for the same source, plan,
    text and code only; it goes when the output is whole."""

    def __init__(
        self,
        path: Path,
        source: Source,
        plan: Plan,
        text: str | None,
        sequences: int,
        tune: int,
    ) -> None:
        state = source.path.stat()
        kinds = sorted((name, kind.name) for name, kind in plan.kinds.items())
        what = (__version__, state.st_size, state.st_mtime_ns, kinds, text, sequences, tune)
        key = hashlib.blake2b(repr(what).encode(), digest_size=8).hexdigest()
        self.folder = path.with_name(f".{path.name}.{key}.rounded")
        self.memory: dict[str, Bytes] = {}

    def __enter__(self) -> Kept:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def get(self, name: str) -> Bytes | None:
        if name in self.memory:
            return self.memory[name]
        file = self.folder / f"{name}.npy"
        return np.load(file) if file.exists() else None

    def put(self, name: str, data: Bytes) -> None:
        self.folder.mkdir(exist_ok=True)
        file = self.folder / f"{name}.npy"
        if not file.exists():
            with open(file.with_suffix(".part"), "wb") as out:
                np.save(out, data)
            os.replace(file.with_suffix(".part"), file)

    def forget(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
