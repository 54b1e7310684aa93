"""A model in the terms of stock llama.cpp, whatever it costs.

Shared blocks are written out, one for each executed layer. Stock llama.cpp norms q and k before
RoPE, with weights and with RoPE on split halves (`qwen3`): the same as R1 for unit weights, since a
rotation keeps lengths. It has sliding windows and layers without RoPE, but no such norm with them
(`granite_swa`, whose attention sinks are put out of reach).
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from mobilellm_cpp.errors import CheckpointError

from .families import Model, Weight
from .families.decoder import sizes
from .families.model import Decoder
from .gguf_file import array_bool, array_u32, f32, u32
from .tensor import Tensor

NO_SINK = -1e30  # e^x of it is 0 in any float


def portable(model: Model) -> Model:
    """The same model for an unpatched llama.cpp. Raises CheckpointError, with the reason, where
    none of its architectures computes this."""
    decoder, order = model.decoder, model.schedule
    architecture = stock_architecture(decoder)
    if architecture == "qwen3":
        per_layer = {
            "attn_q_norm.weight": np.ones(decoder.head_dim, np.float32),
            "attn_k_norm.weight": np.ones(decoder.head_dim, np.float32),
        }
    elif architecture == "granite_swa":
        per_layer = {"attn_sinks.weight": np.full(decoder.heads, NO_SINK, np.float32)}
    else:
        per_layer = {}
    layers = []
    for layer, block in enumerate(order):
        prefix = f"blk.{block}."
        for weight in model.weights:
            if weight.name.startswith(prefix):
                part = weight.name.removeprefix(prefix)
                if architecture == "qwen3" and part in ("attn_q.weight", "attn_k.weight"):
                    weight = dataclasses.replace(weight, head_rows=decoder.head_dim, to_halves=True)
                layers.append(dataclasses.replace(weight, name=f"blk.{layer}.{part}"))
        layers += [constant(f"blk.{layer}.{part}", values) for part, values in per_layer.items()]
    inside = [i for i, weight in enumerate(model.weights) if weight.name.startswith("blk.")]
    weights = [*model.weights[: inside[0]], *layers, *model.weights[inside[-1] + 1 :]]

    metadata = sizes(decoder, len(order))
    if architecture == "granite_swa":
        metadata |= {
            "attention.sliding_window": u32(decoder.window),
            "attention.sliding_window_pattern": array_bool([decoder.sliding[b] for b in order]),
            "logit_scale": f32(1.0),
        }
        if not all(decoder.rope):
            metadata["attention.rope_pattern"] = array_u32([int(decoder.rope[b]) for b in order])
    return dataclasses.replace(
        model,
        architecture=architecture,
        metadata={f"{architecture}.{key}": value for key, value in metadata.items()},
        weights=weights,
        decoder=dataclasses.replace(decoder, blocks=len(order)),
        schedule=tuple(range(len(order))),
    )


def stock_architecture(decoder: Decoder) -> str:
    """The architecture of stock llama.cpp that computes what a decoder does."""
    every_rope, sliding = all(decoder.rope), any(decoder.sliding)
    normed = decoder.normed
    if every_rope and not sliding:
        return "qwen3" if normed else "llama"
    if sliding and not normed and (every_rope or any(decoder.rope)):
        return "granite_swa"
    if sliding and not normed:
        reason = "has no layer with RoPE"
    elif not sliding:
        reason = "has layers without RoPE" + (" beside a norm of q and k" if normed else "")
    else:
        reason = "has a norm of q and k beside sliding windows"
    raise CheckpointError(f"no architecture of stock llama.cpp runs this model: it {reason}.")


def constant(name: str, values: np.ndarray[tuple[int], np.dtype[np.float32]]) -> Weight:
    """A tensor that no checkpoint holds."""
    bits = values.view(np.uint32)
    return Weight(name, Tensor(name, "F32", bits.shape, Path(), bits))
