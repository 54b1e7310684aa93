"""From what a user names to a GGUF file: a file as it is, a checkpoint converted once and kept."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import platformdirs

from . import __version__
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
    folder = Path(source).expanduser()
    name = folder.resolve().name if folder.is_dir() else str(source).rpartition("/")[2]
    key = _folder_key(folder) if folder.is_dir() else _key(checkpoint_fingerprint(source, revision))
    path = cache_folder() / f"{name}-{type}-{key}.gguf"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        convert_checkpoint(source, path, type=type, revision=revision, progress=progress)
    return path


def _folder_key(folder: Path) -> str:
    """The key of a folder's content. Hashing gigabytes takes seconds, so the key is remembered
    under the sizes and times of the files."""
    files = [(entry.name, entry.stat()) for entry in os.scandir(folder)]
    state = [(n, s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino) for n, s in sorted(files)]
    memory = cache_folder() / f"{_key(f'{folder.resolve()} {state}')}.key"
    if memory.exists():
        return memory.read_text()
    key = _key(checkpoint_fingerprint(folder))
    memory.parent.mkdir(parents=True, exist_ok=True)
    memory.write_text(key)
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
        return path
    if model.endswith(".gguf"):
        raise ModelError(f"{model}: no such file")
    return converted(model, type or "q4_0", progress=progress)
