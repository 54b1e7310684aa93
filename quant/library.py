"""Where ggml's functions are; apart from rounding.py, which takes numpy to import."""

import sys
from pathlib import Path

from _mobilellm_cpp_library import FOLDER

from mobilellm_cpp.errors import MobileLLMError


def ggml_path() -> Path:
    """The libggml-base inside the package. Raises MobileLLMError where there is none."""
    name = {"darwin": "libggml-base.dylib", "win32": "ggml-base.dll"}.get(
        sys.platform, "libggml-base.so"
    )
    path = Path(FOLDER) / name
    if not path.exists():
        raise MobileLLMError(f"{path} is missing: install mobilellm-cpp again.")
    return path
