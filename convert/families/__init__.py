"""The model families, one module each: config and tensors in, GGUF metadata and tensors out."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..config import Config
from ..tensor import Tensor
from . import base, pro, r1
from .model import Model, Weight

__all__ = ["Model", "Weight", "build_model"]

Builder = Callable[[Config, dict[str, Tensor], "str | Sequence[int] | None"], Model]

# The class that config.json names in `architectures`, and who builds it.
FAMILIES: dict[str, Builder] = {
    "MobileLLMForCausalLM": base.build,
    "LlamaForCausalLM": base.build,
    "Llama4ForCausalLM": r1.build,
    "MobileLLMP1ForCausalLM": pro.build,
}


def build_model(
    config: Config, tensors: Callable[[], dict[str, Tensor]], schedule: str | Sequence[int] | None
) -> Model:
    """The GGUF form of a checkpoint; `tensors` is called once its class is known."""
    classes = config.get("architectures")
    if not isinstance(classes, list) or len(classes) != 1 or classes[0] not in list(FAMILIES):
        raise config.refusal("architectures", f"must name one of {', '.join(FAMILIES)}", classes)
    return FAMILIES[classes[0]](config, tensors(), schedule)
