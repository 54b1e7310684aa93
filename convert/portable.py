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

from . import keys
from .families import Model, Weight
from .families.decoder import for_architecture, sizes
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
    weights = written_out(model.weights, decoder, order)
    inside = max(i for i, weight in enumerate(weights) if weight.name.startswith("blk."))
    constants = [
        constant(f"blk.{layer}.{part}", values)
        for layer in range(len(order))
        for part, values in per_layer.items()
    ]
    weights[inside + 1 : inside + 1] = constants

    metadata = sizes(decoder, len(order))
    if architecture == "granite_swa":
        metadata |= {
            keys.SLIDING_WINDOW: u32(decoder.window),
            keys.SLIDING_PATTERN: array_bool([decoder.sliding[b] for b in order]),
            keys.LOGIT_SCALE: f32(1.0),
        }
        if not all(decoder.rope):
            metadata[keys.ROPE_PATTERN] = array_u32([int(decoder.rope[b]) for b in order])
    return dataclasses.replace(
        model,
        architecture=architecture,
        metadata=for_architecture(architecture, metadata),
        weights=weights,
        decoder=dataclasses.replace(decoder, blocks=len(order)),
        schedule=tuple(range(len(order))),
    )


def written_out(weights: list[Weight], decoder: Decoder, order: tuple[int, ...]) -> list[Weight]:
    """The weights with those of each block once for each of its executions, as `portable` has
    them."""
    turned = ("attn_q.weight", "attn_k.weight", "attn_q.weight.lora_b", "attn_k.weight.lora_b")
    to_halves = stock_architecture(decoder) == "qwen3"
    layers = []
    for layer, block in enumerate(order):
        prefix = f"blk.{block}."
        for weight in weights:
            if weight.name.startswith(prefix):
                part = weight.name.removeprefix(prefix)
                if to_halves and part in turned:
                    weight = dataclasses.replace(weight, head_rows=decoder.head_dim, to_halves=True)
                layers.append(dataclasses.replace(weight, name=f"blk.{layer}.{part}"))
    inside = [i for i, weight in enumerate(weights) if weight.name.startswith("blk.")] or [0, -1]
    return [*weights[: inside[0]], *layers, *weights[inside[-1] + 1 :]]


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
