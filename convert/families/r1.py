"""R1 and R1.5: a Llama 4 text model without experts.

Differs from a Llama in that RoPE turns neighbouring pairs as stored, q and k are normed per head
after it, without weights, and a layer may have neither (transformers `modeling_llama4.py`).
"""

from __future__ import annotations

import dataclasses

from ..config import Config
from .decoder import read_decoder
from .model import Decoder

FULL, CHUNKED = "full_attention", "chunked_attention"


def read(config: Config) -> Decoder:
    """The model that config.json describes."""
    experts = config.get("num_local_experts")
    if experts != 0 and config.get("moe_layers") != []:
        rule = "must be 0: MobileLLM-R1 is a Llama 4 without experts"
        raise config.refusal("num_local_experts", rule, experts)
    decoder = read_decoder(config, ffn_field="intermediate_size_mlp")
    decoder = dataclasses.replace(
        decoder,
        qk_norm=config.flag("use_qk_norm", required=True),
        rope=rope_layers(config, decoder.blocks),
        split_halves=False,
        mlp=("feed_forward",),
    )
    refuse_temperature(config, decoder.rope, absent=True)

    # a chunk that holds the whole context is no chunk; transformers' defaults where unsaid
    chunk = config.get("attention_chunk_size", 8192)
    chunked = chunk is not None and not (isinstance(chunk, int) and chunk >= decoder.context)
    layers = config.get("layer_types")
    if layers is None:
        layers = [CHUNKED] * decoder.blocks
    allowed = [FULL] if chunked else [FULL, CHUNKED]
    if not isinstance(layers, list) or len(layers) != decoder.blocks:
        raise config.refusal("layer_types", f"must name {decoder.blocks} layers", layers)
    for layer in layers:
        if layer not in allowed:
            raise config.refusal("layer_types", f"must all be {FULL}", layer)
    return decoder


def rope_layers(config: Config, blocks: int) -> tuple[bool, ...]:
    """Whether each block applies RoPE: `no_rope_layers`, in which 1 means that it does."""
    layers = config.get("no_rope_layers")
    if layers is None:
        raise config.missing("no_rope_layers")
    if not isinstance(layers, list) or len(layers) != blocks:
        rule = f"must be a list of {blocks}, one for each layer (1: RoPE is applied)"
        raise config.refusal("no_rope_layers", rule, layers)
    for layer in layers:
        if layer not in (0, 1):
            raise config.refusal("no_rope_layers", "must hold 0 and 1 only", layer)
    return tuple(bool(layer) for layer in layers)


def refuse_temperature(config: Config, rope: tuple[bool, ...], absent: bool) -> None:
    """Llama 4 scales q by position in layers without RoPE; no MobileLLM is known to do so.
    `absent` is what an unsaid `attn_temperature_tuning` means."""
    tuning = config.get("attn_temperature_tuning", absent)
    if not all(rope) and tuning not in (False, 0):
        rule = "must be false where a layer has no RoPE"
        raise config.refusal("attn_temperature_tuning", rule, config.get("attn_temperature_tuning"))
