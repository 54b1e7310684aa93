"""Whether an adapter GGUF file is what a PEFT LoRA folder makes.

For every module the product that llama.cpp adds, alpha / rank * lora_b @ lora_a of the file, is
held against PEFT's scaling * B @ A of the folder. The names of matrices, the order of their rows
and the architecture come from the base's config.json by way of the reference, not of the converter.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..convert.adapter import Adapter
from ..convert.adapter_conversion import base_config
from ..convert.reference import Hyperparameters, read_hyperparameters, read_rows
from ..engine.gguf_file import GGUFFile, TensorInfo, open_gguf
from ..errors import ModelError
from ..quant.rounding import dequantize
from .merged_weights import scaled_pairs

Floats = npt.NDArray[np.float32]

# The matrices of a block: what the checkpoint's module ends in, and the name in the file.
MATRICES = {
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
}
# How far rounding a number to a type moves it: relatively, and absolutely for subnormal numbers.
ROUNDING = {"f32": (2.0**-22, 0.0), "f16": (2.0**-11, 2.0**-25), "bf16": (2.0**-8, 0.0)}


@dataclass(frozen=True)
class ModuleCheck:
    """One module: the largest error of the file's product, and that as a share of what rounding to
    its type allows."""

    name: str
    type: str
    rank: int
    max_error: float
    share: float


@dataclass(frozen=True)
class AdapterVerification:
    """The answers; `failures` has a sentence for each that is no, and `ok` says that none is."""

    model: str
    checkpoint: str
    modules: list[ModuleCheck]
    failures: list[str]

    @property
    def ok(self) -> bool:
        return not self.failures


def is_adapter_file(path: str | os.PathLike[str]) -> bool:
    """Whether a GGUF file is an adapter. Raises ModelError when it is no sound GGUF file."""
    with open_gguf(path) as file:
        return bool(file.get("general.type") == "adapter")


def verify_adapter(
    path: str | os.PathLike[str],
    adapter: Adapter,
    *,
    base: str | Path | None = None,
    schedule: str | Sequence[int] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> AdapterVerification:
    """Compare the adapter file `path` with the open `adapter` it was made from; `base`, `schedule`
    and `settings` are those of the conversion. Raises ModelError or CheckpointError where one of
    them cannot be read at all."""
    hyper = read_hyperparameters(base_config(adapter, base, settings), schedule)
    with open_gguf(path) as file:
        if file.get("general.type") != "adapter":
            raise ModelError(f"{os.fspath(path)} is not an adapter file")
        failures = _metadata(file, hyper)
        arch, alpha = file.get("general.architecture"), file.get("adapter.lora.alpha", 0.0)
        left = {tensor.name: tensor for tensor in file.tensors()}
    modules = []
    for module, (tensor_a, tensor_b, scaling) in scaled_pairs(adapter).items():
        a, b = (read_rows(tensor, 0, tensor.shape[0]) for tensor in (tensor_a, tensor_b))
        for name in _matrices(module, hyper, arch):
            pair = left.pop(f"{name}.lora_a", None), left.pop(f"{name}.lora_b", None)
            if pair[0] is None or pair[1] is None:
                failures.append(f"the file has no {name}.lora_a and lora_b")
                continue
            kind = pair[1].type
            if pair[0].shape != a.shape or pair[1].shape != b.shape or kind not in ROUNDING:
                failures.append(f"{name} has a pair of shape {pair[0].shape} and {pair[1].shape}")
                continue
            ours_a, ours_b = _read(path, pair[0]), _read(path, pair[1])
            if module.rsplit(".", 1)[-1] in ("q_proj", "k_proj"):
                ours_b = _checkpoint_order(ours_b, hyper, arch)
            rank = a.shape[0]
            ours = (alpha / rank if alpha else 1.0) * ours_b.astype(np.float64) @ ours_a
            error = np.abs(ours - scaling * b.astype(np.float64) @ a)
            allowed = _allowed(a, b, scaling, kind)
            share = float((error / np.maximum(allowed, 1e-300)).max()) if allowed.any() else 0.0
            modules.append(ModuleCheck(name, kind, rank, float(error.max()), share))
            if not (error <= allowed).all():
                failures.append(
                    f"{name} is not the adapter's: the product is further from it than rounding to "
                    f"{kind} moves it, by up to {error.max():.3g}"
                )
    failures += [f"the adapter has no {name}" for name in left]
    return AdapterVerification(os.fspath(path), str(adapter.folder), modules, failures)


def _metadata(file: GGUFFile, hyper: Hyperparameters) -> list[str]:
    """What the file says of itself that is not so."""
    windows, plain = any(hyper.windows), hyper.schedule == tuple(range(hyper.blocks))
    normed = hyper.qk_norm and any(hyper.rope)
    own = "llama" if plain and all(hyper.rope) and not windows and not normed else "mobilellm"
    stock = "qwen3" if normed else "granite_swa" if windows else "llama"
    failures = []
    if file.get("general.architecture") not in (own, stock):
        arch = file.get("general.architecture")
        failures.append(f"the architecture is {arch}, and the base's files are {own} or {stock}")
    if file.get("adapter.type") != "lora":
        failures.append(f"adapter.type is {file.get('adapter.type')}, and it must be lora")
    return failures


def _matrices(module: str, hyper: Hyperparameters, arch: Any) -> Iterator[str]:
    """The names in the file of a module's matrix: one, or in files whose blocks are written out one
    for each execution."""
    if module == "lm_head":
        yield "output.weight"
        return
    block, part = int(module.split(".")[2]), MATRICES[module.rsplit(".", 1)[-1]]
    plain = hyper.schedule == tuple(range(hyper.blocks))
    if arch == "mobilellm" or plain:
        yield f"blk.{block}.{part}.weight"
        return
    for layer, used in enumerate(hyper.schedule):
        if used == block:
            yield f"blk.{layer}.{part}.weight"


def _checkpoint_order(b: Floats, hyper: Hyperparameters, arch: Any) -> Floats:
    """The rows of q and k as the checkpoint has them: qwen3 turns halves, the others neighbours."""
    neighbours = arch != "qwen3"
    if hyper.interleaved == neighbours:
        return b
    half = hyper.head_dim // 2
    heads = b.reshape(-1, *((half, 2) if neighbours else (2, half)), b.shape[-1])
    return np.ascontiguousarray(heads.swapaxes(1, 2)).reshape(b.shape)


def _allowed(a: Floats, b: Floats, scaling: float, kind: str) -> npt.NDArray[np.float64]:
    """How far rounding of a and b may move each element of their product."""
    relative, absolute = ROUNDING[kind]
    a64, b64 = np.abs(a.astype(np.float64)), np.abs(b.astype(np.float64))
    # what is multiplied into b is rounded once more
    moved = b64 @ a64 * (2 * relative + relative**2 + 2.0**-22)
    moved += absolute * (b64.sum(1)[:, None] + a64.sum(0)[None, :])
    return scaling * moved


def _read(path: str | os.PathLike[str], info: TensorInfo) -> Floats:
    data = np.fromfile(path, np.uint8, info.n_bytes, offset=info.start)
    return dequantize(data, info.type_id, info.shape[-1])
