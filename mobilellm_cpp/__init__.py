"""MobileLLM on your own machine: convert checkpoints to GGUF, run them through llama.cpp.

    from mobilellm_cpp import MobileLLM, convert_checkpoint

Names are imported when they are first used, so that `import mobilellm_cpp` costs nothing.
"""

import os
from typing import TYPE_CHECKING, Any

try:
    import _mobilellm_cpp_library
except ImportError:
    raise ImportError("mobilellm-cpp is not installed: run `make` or `pip install .`") from None

if not any(os.path.isdir(os.path.join(folder, "lib")) for folder in __path__):
    # Python was started in the source folder: the rest comes from the installed package
    __path__ = [os.path.dirname(_mobilellm_cpp_library.FOLDER)]

from .errors import CheckpointError, MobileLLMError, ModelError

if TYPE_CHECKING:
    from .convert import convert_checkpoint
    from .engine.model import MobileLLM
    from .inspection.verification import verify

__version__ = "0.1.0"
__all__ = [
    "CheckpointError",
    "MobileLLM",
    "MobileLLMError",
    "ModelError",
    "convert_checkpoint",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name == "MobileLLM":
        from .engine.model import MobileLLM

        return MobileLLM
    if name == "convert_checkpoint":
        from .convert import convert_checkpoint

        return convert_checkpoint
    if name == "verify":
        from .inspection.verification import verify

        return verify
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
