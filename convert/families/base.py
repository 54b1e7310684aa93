"""The base family, with and without layer sharing, and ParetoQ's checkpoints: a Llama."""

from __future__ import annotations

from ..config import Config
from .decoder import read_decoder, require
from .model import Decoder


def read(config: Config) -> Decoder:
    """The model that config.json describes."""
    decoder = read_decoder(config, theta=10000.0)
    require(config, {"sliding_window": (None,)})
    return decoder
