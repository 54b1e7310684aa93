"""From what a user names to a GGUF file: a file as it is, a checkpoint converted once and kept."""

import os
from collections.abc import Callable
from pathlib import Path

import platformdirs

from .convert import checkpoint_fingerprint, convert_checkpoint
from .errors import ModelError

DEMO = Path(__file__).resolve().parent / "demo"

Progress = Callable[[int, int, str], None]


def cache_folder() -> Path:
    """Where converted checkpoints are kept: $MOBILELLM_CACHE, or the user's cache folder."""
    own = os.environ.get("MOBILELLM_CACHE")
    return Path(own) if own else Path(platformdirs.user_cache_dir("mobilellm-cpp"))


def converted(
    source: str | Path,
    type: str,
    *,
    revision: str | None = None,
    progress: Progress | None = None,
) -> Path:
    """The GGUF file of a checkpoint folder or hub id in `type`, converted unless the cache has it.

    The name holds a hash of the checkpoint's content, so a changed checkpoint is converted anew.
    """
    name = os.path.basename(os.path.normpath(source))
    key = checkpoint_fingerprint(source, revision=revision)[:20]
    path = cache_folder() / f"{name}-{type}-{key}.gguf"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        convert_checkpoint(source, path, type=type, revision=revision, progress=progress)
    return path


def resolve(model: str | None, type: str | None = None, progress: Progress | None = None) -> Path:
    """The GGUF file for a MODEL argument: None is the shipped demo model (kept in f16), a file is
    itself, a folder or hub id is converted (q4_0 unless type says otherwise)."""
    if model is None:
        return converted(DEMO, type or "f16", progress=progress)
    path = Path(model)
    if path.is_file():
        return path
    if model.endswith(".gguf"):
        raise ModelError(f"{model}: no such file")
    return converted(model, type or "q4_0", progress=progress)
