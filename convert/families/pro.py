"""Pro: R1's block with a sliding window in most layers.

The names of the published file's tensors are not known here: Llama 4's `feed_forward` and Llama's
`mlp` are both tried, and whatever else the file holds is refused by name. Nothing that changes the
computation is guessed: config.json (or the user's settings) must say it.
"""

from __future__ import annotations

import dataclasses

from ..config import Config
from .decoder import read_decoder
from .model import Decoder
from .r1 import refuse_temperature, rope_layers

FULL, SLIDING = "full_attention", "sliding_attention"


def read(config: Config) -> Decoder:
    """The model that config.json describes."""
    width = "intermediate_size_mlp"
    if config.get(width) is None:
        width = "intermediate_size"
    decoder = read_decoder(config, ffn_field=width)
    experts = config.get("num_local_experts")
    if experts not in (None, 0) and config.get("moe_layers") != []:
        raise config.refusal("num_local_experts", "must be 0", experts)
    layers = config.get("layer_types")
    if layers is None:
        raise config.missing("layer_types")
    if not isinstance(layers, list) or len(layers) != decoder.blocks:
        raise config.refusal("layer_types", f"must name {decoder.blocks} layers", layers)
    for layer in layers:
        if layer not in (FULL, SLIDING):
            raise config.refusal("layer_types", f"must each be {FULL} or {SLIDING}", layer)
    decoder = dataclasses.replace(
        decoder,
        qk_norm=config.flag("use_qk_norm", required=True),
        rope=rope_layers(config, decoder.blocks),
        sliding=tuple(layer == SLIDING for layer in layers),
        window=config.integer("sliding_window", 1 << 28) if SLIDING in layers else 0,
        split_halves=False,
        mlp=("feed_forward", "mlp"),
    )
    refuse_temperature(config, decoder.rope, absent=False)
    return decoder
