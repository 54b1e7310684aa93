"""The way of a LoRA adapter into an adapter GGUF file, or into the weights of its base.

llama.cpp adds (alpha / rank) * b @ a to a matrix, with one alpha for the whole file; where PEFT's
factor is another one (rslora, alpha_pattern) the rest of it is multiplied into b.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGUFType, Keys

from mobilellm_cpp.errors import CheckpointError

from ..quant.rounding import Rounder
from ..quant.types import OUTPUT_TYPES
from .adapter import CONFIG, Adapter, LowRank
from .checkpoint import Checkpoint, is_hub_id, open_checkpoint, open_source
from .config import Config
from .families import Decoder, Weight, read_family
from .families.decoder import decide_tying, decoder_metadata, execution_order, tensor_names
from .gguf_file import GGUFFile, check_output, f32, string
from .portable import stock_architecture, written_out
from .tensor import Tensor
from .writing import title, write

TYPES = ("f32", "f16", "bf16")  # a rank is no multiple of a quantized block


@dataclass(frozen=True)
class AdapterReport:
    """What was written: `n_modules` matrices are adapted, with ranks from the least to the largest
    of `ranks`; `architecture` is that of the models it is for."""

    path: Path
    architecture: str
    type: str
    size_bytes: int
    n_params: int
    n_modules: int
    ranks: tuple[int, int]


def convert_adapter(
    source: str | Path | Adapter,
    out: str | Path | None = None,
    *,
    base: str | Path | None = None,
    type: str = "f32",
    schedule: str | Sequence[int] | None = None,
    settings: Mapping[str, Any] | None = None,
    portable: bool = False,
) -> AdapterReport:
    """Write the LoRA adapter `source`, a PEFT folder, a hub id or an open one, as the adapter GGUF
    file `out`, which llama.cpp loads beside a model file of its base.

    `base` is the checkpoint that the adapter was trained on, a folder or a hub id; by default the
    one that adapter_config.json names, a hub id in the `revision` that stands there. Of a base
    whose weights are not needed only config.json is read. `type` is f32, f16 or bf16. `schedule`,
    `settings` and `portable` are those with which the base was converted. Without `out` the file
    goes to <name>-lora-<type>[-portable].gguf here.
    Raises CheckpointError for whatever cannot be converted; `out` is then as it was before.
    """
    if type not in TYPES:
        raise CheckpointError(f"the type of an adapter must be one of {', '.join(TYPES)}.")
    try:
        adapter = open_adapter(source)
        name = f"{adapter.name}-lora-{type}{'-portable' if portable else ''}.gguf"
        path = Path(name if out is None else out).expanduser()
        check_output(path, adapter.files)
        config = base_config(adapter, base, settings)
        decoder = read_family(config)
        order = execution_order(config, decoder.blocks, schedule)

        def tied() -> bool:
            return decide_tying(config, open_base(adapter, base, settings).tensors())[0]

        found = adapted(adapter, decoder, order, tied)
        if unread := config.unread - {"share_embedding", "tie_word_embeddings"}:
            raise CheckpointError(
                f"the setting {min(unread)} is not a field that this model reads."
            )
    except OSError as error:
        raise CheckpointError(f"{error.filename or source}: {error.strerror or error}.") from error
    architecture, _ = decoder_metadata(decoder, order)
    weights = [
        weight
        for matrix, (part, head_rows) in found.items()
        for weight in _pair(matrix, part, adapter.alpha, head_rows)
    ]
    if portable:
        architecture = stock_architecture(decoder)
        weights = written_out(weights, decoder, order)
    kind, _ = OUTPUT_TYPES[type]
    metadata = {
        Keys.General.ARCHITECTURE: string(architecture),
        Keys.General.TYPE: string(GGUFType.ADAPTER),
        Keys.General.NAME: string(title(adapter.name)),
        Keys.Adapter.TYPE: string("lora"),
        Keys.Adapter.LORA_ALPHA: f32(adapter.alpha),
    }
    file = GGUFFile(path, metadata, [(w.name, w.tensor.shape, kind) for w in weights])
    write(file, weights, {weight.name: kind for weight in weights}, Rounder(), None)
    ranks = [part.a.shape[0] for part, _ in found.values()]
    return AdapterReport(
        path=path,
        architecture=architecture,
        type=type,
        size_bytes=file.size,
        n_params=sum(weight.tensor.bits.size for weight in weights),
        n_modules=len(found),
        ranks=(min(ranks), max(ranks)),
    )


def open_adapter(source: str | Path | Adapter, revision: str | None = None) -> Adapter:
    """As open_source, but a checkpoint is refused."""
    opened = source if isinstance(source, Adapter) else open_source(source, revision)
    if not isinstance(opened, Adapter):
        raise CheckpointError(f"{source} is not a LoRA adapter: it holds a whole model.")
    return opened


def adapted(
    adapter: Adapter,
    decoder: Decoder,
    order: tuple[int, ...],
    tied: bool | Callable[[], bool],
) -> dict[str, tuple[LowRank, int]]:
    """GGUF name of each adapted matrix, in the order of the model, to what is added to it and the
    rows of a head where those are reordered. Whatever the graph cannot add is refused by name."""
    parts = adapter.parts()
    if "lm_head" in parts and (tied if isinstance(tied, bool) else tied()):
        raise CheckpointError(
            f"{parts['lm_head'].a} adapts the head, which is the embedding in this model: the "
            "graph has one matrix for both."
        )
    names: dict[str, tuple[str, tuple[int, ...], int]] = {}
    for mlp in decoder.mlp:
        names |= tensor_names(decoder, False, mlp)
    for module, part in parts.items():
        if block := re.match(r"model\.layers\.(\d{1,9})\.", module):
            _check_block(part.a, int(block[1]), decoder.blocks, len(order))
        name, shape, _ = names.get(f"{module}.weight", ("", (), 0))
        if len(shape) != 2 or name == "token_embd.weight":
            raise CheckpointError(
                f"{part.a} adapts {module}, a matrix that the graph cannot adapt."
            )
        theirs = (part.b.shape[0], part.a.shape[1])
        if theirs != shape:
            raise CheckpointError(
                f"{part.a} and its lora_B are for a matrix of shape {list(theirs)}, and the base's "
                f"config.json makes it {list(shape)}."
            )
    return {
        name: (parts[module], head_rows)
        for source, (name, _, head_rows) in names.items()
        if (module := source.removesuffix(".weight")) in parts
    }


def _check_block(tensor: Tensor, block: int, stored: int, executed: int) -> None:
    """Refuse an adapter of a block that no file of the base holds."""
    if block < stored:
        return
    reason = f"the base has blocks 0 to {stored - 1}"
    if block < executed:
        reason = (
            f"the base stores {stored} blocks and executes them as {executed} layers: an adapter "
            "of executed layers would need weights of its own for each of them, so train it on the "
            "stored blocks"
        )
    raise CheckpointError(f"{tensor} adapts block {block}, and {reason}.")


def _pair(matrix: str, part: LowRank, alpha: float, head_rows: int) -> list[Weight]:
    """The two tensors of a matrix in an adapter file whose alpha is that of adapter_config.json."""
    b, rank = part.b, part.a.shape[0]
    factor = np.float32(part.scale * rank / alpha)
    if factor != 1:
        values = Rounder().widen(b.bits, b.dtype)
        with np.errstate(over="ignore"):  # refused when it is checked
            bits = (values * factor).view(np.uint32)
        b = Tensor(b.name, "F32", b.shape, b.file, bits)
    return [
        Weight(f"{matrix}.lora_a", part.a),
        Weight(f"{matrix}.lora_b", b, head_rows),
    ]


def open_base(
    adapter: Adapter, base: str | Path | None, settings: Mapping[str, Any] | None = None
) -> Checkpoint:
    """The checkpoint that an adapter belongs to: `base`, or what adapter_config.json names."""
    source, revision = _base_of(adapter, base)
    return open_checkpoint(source, revision, settings)


def _base_of(adapter: Adapter, base: str | Path | None) -> tuple[str | Path, str | None]:
    """The base and its revision, which adapter_config.json has for a hub id of its own."""
    if base is not None:
        return base, None
    if not adapter.base:
        raise CheckpointError(f"{adapter.folder / CONFIG} names no base: give it with --base.")
    if not Path(adapter.base).is_dir() and not is_hub_id(adapter.base):
        raise CheckpointError(
            f"{adapter.folder / CONFIG} names the base {adapter.base}, which is neither a folder "
            "here nor a hub id: give it with --base."
        )
    return adapter.base, None if Path(adapter.base).is_dir() else adapter.revision


def base_config(
    adapter: Adapter, base: str | Path | None, settings: Mapping[str, Any] | None = None
) -> Config:
    """The base's config.json, without its weights."""
    checkpoint, revision = _base_of(adapter, base)
    folder = Path(checkpoint).expanduser()
    if not folder.exists() and is_hub_id(str(checkpoint)):
        from .hub import download

        folder = download(str(checkpoint), revision, config_only=True)
    elif folder.is_file():
        folder = folder.parent
    return Config(folder / "config.json", settings)
