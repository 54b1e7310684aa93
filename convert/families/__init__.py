"""The model families, one module each: config and tensors in, GGUF metadata and tensors out."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..config import Config
from ..stored_forms import refuse_quantized
from ..tensor import Tensor
from . import base, pro, r1
from .decoder import build_decoder
from .model import Decoder, Model, Weight

__all__ = ["Decoder", "Model", "Weight", "build_model", "read_family"]

# The class that config.json names in `architectures`, and who reads it.
FAMILIES: dict[str, Callable[[Config], Decoder]] = {
    "MobileLLMForCausalLM": base.read,
    "LlamaForCausalLM": base.read,
    "Llama4ForCausalLM": r1.read,
    "MobileLLMP1ForCausalLM": pro.read,
}


def read_family(config: Config) -> Decoder:
    """The model that config.json describes, whatever the weights hold."""
    classes = config.get("architectures")
    if not isinstance(classes, list) or len(classes) != 1 or classes[0] not in list(FAMILIES):
        raise config.refusal("architectures", f"must name one of {', '.join(FAMILIES)}", classes)
    return FAMILIES[classes[0]](config)


def build_model(
    config: Config, tensors: Callable[[], dict[str, Tensor]], schedule: str | Sequence[int] | None
) -> Model:
    """The GGUF form of a checkpoint; `tensors` is called once its config is read."""
    decoder = read_family(config)
    refuse_quantized(config)
    return build_decoder(config, decoder, tensors(), schedule)
