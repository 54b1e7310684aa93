"""Weights that are no plain floats: refused as what they are, with the way to get plain ones."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from mobilellm_cpp.errors import CheckpointError

from .config import Config
from .tensor import Tensor

DEQUANTIZE = "load it with transformers and save what its dequantize() gives with save_pretrained"
ORIGINAL = "convert the checkpoint that it was quantized from"
WIDEN = (
    "load it with transformers and quantization_config=FineGrainedFP8Config(dequantize=True), or "
    "multiply by the scales yourself, and save it with save_pretrained"
)
MERGE = "save what peft's merge_and_unload() gives with save_pretrained, or convert the adapter"

# `quant_method` in config.json's quantization_config: what it is called, and the way out.
METHODS: dict[object, tuple[str, str]] = {
    "bitsandbytes": ("bitsandbytes", DEQUANTIZE),
    "awq": ("AWQ", ORIGINAL),
    "gptq": ("GPTQ", ORIGINAL),
    "fp8": ("F8", WIDEN),
}

# The ends of names that a form has beside or in the place of `weight`.
ENDS: dict[tuple[str, ...], tuple[str, str]] = {
    (".SCB", ".absmax", ".quant_map", ".bitsandbytes__nf4", ".bitsandbytes__fp4"): (
        METHODS["bitsandbytes"]
    ),
    (".g_idx",): METHODS["gptq"],
    (".qweight", ".qzeros"): METHODS["awq"],  # GPTQ has an index beside them
    (".lora_A.weight", ".lora_B.weight", ".base_layer.weight"): ("unmerged LoRA", MERGE),
}


def refuse_quantized(config: Config) -> None:
    """Refuse a config that says that the weights are quantized."""
    settings = config.get("quantization_config")
    if settings is None:
        return
    method: Any = settings.get("quant_method") if isinstance(settings, dict) else None
    name, way = METHODS.get(method if isinstance(method, str) else None, (None, ORIGINAL))
    if name is None:
        raise config.refusal("quantization_config", f"must be absent ({way})", settings)
    raise CheckpointError(
        f"{config.path}: quantization_config says that the weights are in {name} form: {way}."
    )


def refuse_other_forms(tensors: Iterable[Tensor]) -> None:
    """Refuse tensors of which one shows that the weights are no plain floats."""
    tensors = list(tensors)
    for ends, (name, way) in ENDS.items():
        for tensor in tensors:
            if tensor.name.endswith(ends):
                raise CheckpointError(f"{tensor} is a part of weights in {name} form: {way}.")
    for tensor in tensors:
        if tensor.dtype.startswith("F8_"):
            raise CheckpointError(f"{tensor} is {tensor.dtype}, a weight in F8 form: {WIDEN}.")
