"""From what a user names to a GGUF file: a file as it is, a checkpoint converted once and kept.

What is kept is found by the checkpoint's content and by the code that converts it, and is used only
while it is as the conversion left it. Where nothing can be kept, a temporary folder does.
"""

import atexit
import contextlib
import errno
import functools
import hashlib
import json
import logging
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from .errors import CheckpointError, ModelError
from .quant.weight_type import DEFAULT_TYPE

if TYPE_CHECKING:
    from .convert import Checkpoint
    from .quant.weight_type import FileType

DEMO = Path(__file__).resolve().parent / "demo"

Progress = Callable[[int, int, str], None]

log = logging.getLogger(__name__)


def cache_folder() -> Path:
    """Where converted checkpoints are kept: $MOBILELLM_CACHE, or the user's cache folder."""
    own = os.environ.get("MOBILELLM_CACHE")
    if not own:
        import platformdirs

        own = platformdirs.user_cache_dir("mobilellm-cpp")
    return Path(os.path.expanduser(own))


def converted(
    source: str | Path,
    type: "FileType",
    *,
    head: str | None = None,
    revision: str | None = None,
    progress: Progress | None = None,
) -> Path:
    """The GGUF file of a checkpoint folder or hub id in `type`, its output head in another if
    `head` names one, converted unless the cache has it.

    Where the cache cannot be written the file goes to a temporary folder, which is removed when
    this process ends, and a warning is logged. Raises CheckpointError.
    """
    from .convert import open_checkpoint  # not needed to run a file
    from .convert.gguf_file import OutputError
    from .quant.mixes import type_of_head

    try:
        checkpoint = open_checkpoint(source, revision)
        key = _key(f"{converter_key()} {_content(checkpoint)}")
    except OSError as error:
        raise CheckpointError(f"{error.filename or source}: {error.strerror or error}.") from error
    origin = str(Path(source).resolve()) if Path(source).exists() else f"{source}"
    origin += f"@{revision}" if revision else ""
    if head is not None:
        type_of_head(head, 1, CheckpointError)
    # with what else it holds at most 255 bytes
    name = f"{checkpoint.name[:48]}-{_kind(type, head)}-{key}.gguf"
    try:
        return _kept(cache_folder() / name, checkpoint, origin, type, head, progress)
    except OutputError as error:
        reason = str(error).rstrip(".")
    advice = "set MOBILELLM_CACHE to a folder that can be written"
    try:
        path = _temporary_folder() / name
        if not _is_whole(path):
            log.warning("%s, so it will be converted anew each time: %s", reason, advice)
        return _kept(path, checkpoint, origin, type, head, progress)
    except OutputError as error:
        raise CheckpointError(f"{reason}, and {str(error).rstrip('.')}: {advice}.") from error


def _kind(type: str, head: str | None) -> str:
    return type if head is None else f"{type}+{head.lower()}"


def _kept(
    path: Path,
    checkpoint: "Checkpoint",
    source: str,
    type: "FileType",
    head: str | None,
    progress: Progress | None,
) -> Path:
    """The file, converted if it is not there as a conversion left it. Raises OutputError where it
    cannot be written."""
    from .convert.gguf_file import OutputError
    from .kept import forget_older

    if not _is_whole(path):
        try:
            _make(path.parent)
        except OSError as error:
            raise OutputError(f"{path} cannot be written: {error.strerror}.") from error
        log.info("%s is converted to %s", source, path)
        _convert(checkpoint, path, type, head, progress)
        with contextlib.suppress(OSError):  # somebody empties the cache
            _remember(path, _digest(path), {"source": source, "code": converter_key()})
            forget_older(source, _kind(type, head))
    with contextlib.suppress(OSError):
        os.utime(record_of(path))  # when it was last used
    return path


def _convert(
    checkpoint: "Checkpoint",
    path: Path,
    type: "FileType",
    head: str | None,
    progress: Progress | None,
) -> None:
    """The file in a type, or by a recipe without calibration, which takes seconds."""
    from .convert import convert_checkpoint
    from .quant.weight_type import RECIPE_NAMES, FileType

    if type not in (names := get_args(FileType)):
        raise CheckpointError(f"type must be one of {', '.join(names)}, not {type!r}.")
    if type in RECIPE_NAMES:
        from .quantization.checkpoint import convert_to  # reads the file with libllama

        convert_to(checkpoint, path, type, head=head, progress=progress)
    else:
        convert_checkpoint(checkpoint, path, type=type, head=head, progress=progress)  # type: ignore[arg-type]


def _is_whole(path: Path) -> bool:
    """Whether a file is what the conversion wrote. Its size and time say so; where the time is
    another one, as in a cache that was copied, its content does."""
    try:
        size, time, digest = record_of(path).read_text().split("\n")[0].split()
        state = path.stat()
        if state.st_size != int(size) or not os.access(path, os.R_OK):
            return False
        if state.st_mtime_ns == int(time):
            return True
        whole = _digest(path) == digest
    except (OSError, ValueError):
        return False
    if whole:
        _remember(path, digest, about(path))
    return whole


def _remember(path: Path, digest: str, about: dict[str, str]) -> None:
    state = path.stat()
    line = f"{state.st_size} {state.st_mtime_ns} {digest}"
    _write(record_of(path), f"{line}\n{json.dumps(about)}\n")


def record_of(path: Path) -> Path:
    """What stands beside a file of the cache: its size, time and hash, and what about() gives. Its
    own time is that of the file's last use."""
    return path.with_suffix(".whole")


def about(path: Path) -> dict[str, str]:
    """The source of a file of the cache, and the key of the code that converted it; empty where
    nobody has written it down."""
    try:
        found = json.loads(record_of(path).read_text().split("\n")[1])
    except (OSError, ValueError, IndexError):
        return {}
    return found if isinstance(found, dict) else {}


def _digest(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _content(checkpoint: "Checkpoint") -> str:
    """A key of the checkpoint's content. Hashing gigabytes takes seconds, so the key is remembered
    under the sizes and times of the files."""
    states = [(str(path), path.stat()) for path in checkpoint.files]
    state = [(p, s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino) for p, s in states]
    memory = cache_folder() / f"{_key(f'{checkpoint.folder.resolve()} {state}')}.key"
    try:
        key = memory.read_text()
    except (OSError, ValueError):
        key = ""
    if not re.fullmatch("[0-9a-f]{32}", key):
        key = checkpoint.fingerprint()
        _write(memory, key)
    return key


@functools.cache
def converter_key() -> str:
    """A key of the code that makes the bytes of a file, with that of ggml, which rounds."""
    from importlib.util import find_spec

    from .quant.library import ggml_path

    digest = hashlib.blake2b(digest_size=16)
    for name in ("convert", "quant", "quantization"):
        spec = find_spec(f"{__package__}.{name}")  # imported they take longer than all else here
        folder = Path(str(spec and spec.origin)).parent
        for path in sorted(folder.rglob("*.py")):
            digest.update(f"{path.relative_to(folder)}\0".encode() + path.read_bytes())
    digest.update(ggml_path().read_bytes())
    return digest.hexdigest()


def _key(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=10).hexdigest()


def _write(path: Path, text: str) -> None:
    """Writes a small file, whole or not at all, for whom the umask says (tempfile's are for the
    user alone). Where it cannot be written it is found out again the next time."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        _make(path.parent)
        temporary.write_text(text)
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()


def _make(folder: Path) -> None:
    if str(folder).startswith("~"):  # expanduser found no home
        raise OSError(errno.ENOENT, "this user has no home folder")
    folder.mkdir(parents=True, exist_ok=True)


@functools.cache
def _temporary_folder() -> Path:
    """A folder of this process, removed when it ends. Raises OutputError."""
    from .convert.gguf_file import OutputError

    try:
        folder = Path(tempfile.mkdtemp(prefix="mobilellm-"))
    except OSError as error:
        raise OutputError(f"{error.strerror}.") from error
    owner = os.getpid()

    def remove() -> None:
        if os.getpid() == owner:  # not at the end of a forked child
            shutil.rmtree(folder, ignore_errors=True)

    atexit.register(remove)
    return folder


def resolve(
    model: str | None, type: "FileType | None" = None, progress: Progress | None = None
) -> Path:
    """The GGUF file for a MODEL argument: None is the shipped demo model (kept in f16), a file is
    itself, a folder or hub id is converted (to DEFAULT_TYPE unless type says otherwise)."""
    if model is None:
        return converted(DEMO, type or "f16", progress=progress)
    path = Path(model)
    if path.is_file() and path.suffix not in (".safetensors", ".bin"):  # those have a folder
        if type:
            raise ModelError(
                f"{model} is a file, and only a checkpoint can be converted to another type"
            )
        with open(path, "rb") as file:
            if file.read(4) != b"GGUF":
                raise ModelError(
                    f"{model} is not a GGUF file; name a checkpoint by its folder or hub id"
                )
        return path
    if not model or (model.endswith(".gguf") and not path.exists()):
        raise ModelError(f"{model or 'an empty name'}: no such file")
    return converted(model, type or DEFAULT_TYPE, progress=progress)
