"""MobileLLM on your own machine: convert checkpoints to GGUF, run them through llama.cpp.

    from mobilellm_cpp import MobileLLM, convert_checkpoint

Names are imported when they are first used, so that `import mobilellm_cpp` costs nothing.
"""

from typing import TYPE_CHECKING, Any

from .errors import CheckpointError, MobileLLMError, ModelError

if TYPE_CHECKING:
    from .convert import convert_checkpoint
    from .model import MobileLLM

__version__ = "0.1.0"
__all__ = [
    "CheckpointError",
    "MobileLLM",
    "MobileLLMError",
    "ModelError",
    "convert_checkpoint",
]


def __getattr__(name: str) -> Any:
    if name == "MobileLLM":
        from .model import MobileLLM

        return MobileLLM
    if name == "convert_checkpoint":
        from .convert import convert_checkpoint

        return convert_checkpoint
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
