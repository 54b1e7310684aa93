"""The base family, with and without layer sharing, and ParetoQ's checkpoints: a Llama."""

from __future__ import annotations

from collections.abc import Sequence

from ..config import Config
from ..schedule import MAX_LAYERS
from ..tensor import Tensor
from .decoder import build_decoder, read_decoder, require
from .model import Model


def build(
    config: Config, tensors: dict[str, Tensor], schedule: str | Sequence[int] | None
) -> Model:
    """Check config and tensors against each other and give them their GGUF names.

    `schedule` overrides the config's `layer_sharing`, which means each block twice in a row.
    """
    decoder = read_decoder(config, theta=10000.0)
    require(config, {"sliding_window": (None,)})
    if schedule is None and config.flag("layer_sharing"):
        schedule = "immediate"
        if 2 * decoder.blocks > MAX_LAYERS:
            rule = f"must be at most {MAX_LAYERS // 2} with layer_sharing"
            raise config.refusal("num_hidden_layers", rule, decoder.blocks)
    return build_decoder(config, decoder, tensors, schedule)
