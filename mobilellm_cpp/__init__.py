"""MobileLLM on your own machine: convert checkpoints to GGUF, run them through llama.cpp.

    from mobilellm_cpp import MobileLLM, convert_checkpoint

Names are imported when they are first used, so that `import mobilellm_cpp` costs nothing.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if not (Path(__file__).parent / "lib").is_dir():
    # Python was started in the source folder: the rest comes from the installed package
    from importlib import metadata

    try:
        __path__ = [str(metadata.distribution("mobilellm-cpp").locate_file("mobilellm_cpp"))]
    except metadata.PackageNotFoundError:
        raise ImportError("mobilellm-cpp is not installed: run `make` or `pip install .`") from None

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
