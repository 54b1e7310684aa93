"""MobileLLM on your own machine: convert checkpoints to GGUF, run them through llama.cpp.

    from mobilellm_cpp import MobileLLM, convert_checkpoint

Names are imported when they are first used, so that `import mobilellm_cpp` costs nothing. Not even
`typing` is imported here: until `__main__` runs, a Ctrl-C ends the command with a traceback.
"""

import os

try:
    import _mobilellm_cpp_library
except ImportError:
    raise ImportError("mobilellm-cpp is not installed: run `make` or `pip install .`") from None

if not any(os.path.isdir(os.path.join(folder, "lib")) for folder in __path__):
    # Python was started in the source folder: the rest comes from the installed package
    __path__ = [os.path.dirname(_mobilellm_cpp_library.FOLDER)]

from .errors import CheckpointError, MobileLLMError, ModelError

TYPE_CHECKING = False  # that of `typing`, to type checkers
if TYPE_CHECKING:
    from typing import Any

    from .convert import convert_adapter, convert_checkpoint
    from .engine.conversation import Conversation
    from .engine.model import MobileLLM
    from .engine.sampling_types import Sampling
    from .inspection.verification import verify
    from .quant.weight_type import WeightType

__version__ = "0.1.0"
__all__ = [
    "CheckpointError",
    "Conversation",
    "MobileLLM",
    "MobileLLMError",
    "ModelError",
    "Sampling",
    "WeightType",
    "convert_adapter",
    "convert_checkpoint",
    "verify",
]
_PLACES = {
    "Conversation": ".engine.conversation",
    "MobileLLM": ".engine.model",
    "Sampling": ".engine.sampling_types",
    "WeightType": ".quant.weight_type",
    "convert_adapter": ".convert",
    "convert_checkpoint": ".convert",
    "verify": ".inspection.verification",
}

if not TYPE_CHECKING:  # for whom any name would be right then

    def __getattr__(name: str) -> "Any":
        import importlib

        if name not in _PLACES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(_PLACES[name], __name__), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    import importlib.util

    names = {*__all__, *(name for name in globals() if name.startswith("__"))}
    if importlib.util.find_spec("torch") is None:
        names.discard("verify")  # which needs it, and help() asks for all that is here
    return sorted(names)
