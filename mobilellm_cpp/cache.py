"""From what a user names to a GGUF file: a file as it is, a checkpoint converted once and kept."""

import hashlib
import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import platformdirs

from . import __version__
from .errors import ModelError

if TYPE_CHECKING:
    from .convert import Checkpoint

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
    from .convert import convert_checkpoint, open_checkpoint  # not needed to run a file

    checkpoint = open_checkpoint(source, revision)
    path = cache_folder() / f"{checkpoint.name}-{type}-{_content_key(checkpoint)}.gguf"
    if not path.exists():
        convert_checkpoint(checkpoint, path, type=type, progress=progress)
    return path


def _content_key(checkpoint: "Checkpoint") -> str:
    """The key of a checkpoint's content. Hashing gigabytes takes seconds, so the key is remembered
    under the sizes and times of the files."""
    states = [(str(path), path.stat()) for path in checkpoint.files]
    state = [(p, s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino) for p, s in states]
    memory = cache_folder() / f"{_key(f'{checkpoint.folder.resolve()} {state}')}.key"
    memory.parent.mkdir(parents=True, exist_ok=True)
    key = memory.read_text() if memory.exists() else ""
    if not re.fullmatch("[0-9a-f]{20}", key):
        key = _key(checkpoint.fingerprint())
        with tempfile.NamedTemporaryFile("w", dir=memory.parent, delete=False) as file:
            file.write(key)
        os.replace(file.name, memory)
    return key


def _key(text: str) -> str:
    """A short hash, another one in every version of this program."""
    return hashlib.blake2b(f"{__version__} {text}".encode(), digest_size=10).hexdigest()


def resolve(model: str | None, type: str | None = None, progress: Progress | None = None) -> Path:
    """The GGUF file for a MODEL argument: None is the shipped demo model (kept in f16), a file is
    itself, a folder or hub id is converted (q4_0 unless type says otherwise)."""
    if model is None:
        return converted(DEMO, type or "f16", progress=progress)
    path = Path(model)
    if path.is_file():
        if type:
            raise ModelError(f"{model} is a file; a weight type is for checkpoints to convert")
        return path
    if not model or (model.endswith(".gguf") and not path.exists()):
        raise ModelError(f"{model or 'an empty name'}: no such file")
    return converted(model, type or "q4_0", progress=progress)
