"""The base family, with and without layer sharing, and ParetoQ's checkpoints: a Llama."""

from __future__ import annotations

from collections.abc import Sequence

from ..config import Config
from ..tensor import Tensor
from .decoder import build_decoder, read_decoder, require
from .model import Model


def build(
    config: Config, tensors: dict[str, Tensor], schedule: str | Sequence[int] | None
) -> Model:
    """Check config and tensors against each other and give them their GGUF names."""
    decoder = read_decoder(config, theta=10000.0)
    require(config, {"sliding_window": (None,)})
    return build_decoder(config, decoder, tensors, schedule)
