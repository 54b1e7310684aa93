"""Writes GGUF files that appear under their name only when whole.

Layout: "GGUF", version 3, counts of tensors and of metadata pairs; the pairs (key, value type,
value); for each tensor its name, its shape with columns first, type and offset; then the data of
each tensor at a multiple of 32 bytes. All little-endian.

Numbers, keys and the packing of metadata are those of the gguf package. Its writer is not used for
the tensors: it takes them whole and one after the other, knows no Q2_0, and its file is there under
its name from the first byte on.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import struct
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from gguf import GGUFWriter
from gguf.constants import GGUF_DEFAULT_ALIGNMENT, GGUF_MAGIC, GGUF_VERSION
from gguf.constants import GGUFValueType as Type

from mobilellm_cpp.errors import CheckpointError

from ..quant.types import TensorType

if sys.platform != "win32":  # where nothing is written: _check_system
    import fcntl


class OutputError(CheckpointError):
    """The file cannot be written where it was asked for."""


# Metadata values: the value type's number, then the value, as gguf packs them.

_PACKER = GGUFWriter(None, "")  # nothing is written through it


def _packed(value: Any, kind: Type, items: Type | None = None) -> bytes:
    return _PACKER._pack_val(value, kind, add_vtype=True, sub_type=items)


def u32(value: int) -> bytes:
    return _packed(value, Type.UINT32)


def f32(value: float) -> bytes:
    return _packed(value, Type.FLOAT32)


def boolean(value: bool) -> bytes:
    return _packed(value, Type.BOOL)


def string(value: str | bytes) -> bytes:
    return _packed(_raw(value), Type.STRING)


def array_u32(values: Sequence[int]) -> bytes:
    return _packed(values, Type.ARRAY, Type.UINT32)


def array_bool(values: Sequence[bool]) -> bytes:
    return _packed(values, Type.ARRAY, Type.BOOL)


# The items of a vocabulary are packed at once: one by one, as gguf does it, 128,000 tokens with
# their merges take 0.75 s. Nor does gguf pack an empty array (a vocabulary without merges).


def array_i32(values: Sequence[int]) -> bytes:
    return _array(Type.INT32, len(values)) + struct.pack(f"<{len(values)}i", *values)


def array_f32(values: Sequence[float]) -> bytes:
    return _array(Type.FLOAT32, len(values)) + struct.pack(f"<{len(values)}f", *values)


def array_string(values: Sequence[bytes]) -> bytes:
    return _array(Type.STRING, len(values)) + b"".join(map(_text, values))


def _array(items: Type, n: int) -> bytes:
    return struct.pack("<IIQ", Type.ARRAY, items, n)


def _text(value: str | bytes) -> bytes:
    raw = _raw(value)
    return struct.pack("<Q", len(raw)) + raw


def _raw(value: str | bytes) -> bytes:
    return value.encode(errors="replace") if isinstance(value, str) else value


class GGUFFile:
    """A GGUF file being written, as a context manager.

    Inside the block `write` may be called from several threads. If the block ends well, the file
    is flushed to disk and takes its name at once; otherwise nothing is left and whatever had the
    name stays as it was. A process that is killed leaves a hidden temporary file, which the next
    one to write the same name removes.
    """

    def __init__(
        self,
        path: Path,
        metadata: Mapping[str, bytes],
        tensors: Iterable[tuple[str, tuple[int, ...], TensorType]],
    ) -> None:
        """`tensors`: name, shape with rows first, and type."""
        _check_system(path)
        self.path = path
        self.sizes: dict[str, int] = {}
        self._offsets: dict[str, int] = {}
        infos = []
        offset = 0
        for name, shape, kind in tensors:
            columns = shape[-1]
            rows = shape[0] if len(shape) == 2 else 1
            infos.append(
                _text(name)
                + struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
                + struct.pack("<IQ", kind.id, offset)
            )
            self.sizes[name] = rows * kind.row_bytes(columns)
            self._offsets[name] = offset
            offset += _padded(self.sizes[name])
        header = struct.pack("<IIQQ", GGUF_MAGIC, GGUF_VERSION, len(infos), len(metadata))
        header += b"".join(_text(key) + value for key, value in metadata.items())
        header += b"".join(infos)
        self._header = header.ljust(_padded(len(header)), b"\0")
        self.size = len(self._header) + offset

    def __enter__(self) -> GGUFFile:
        with self._refusing():
            _remove_stale(self.path)
            self._temporary, self._file = _create_temporary(self.path)
        try:
            self._write_at(0, memoryview(self._header))
        except BaseException:
            self._discard()
            raise
        return self

    def write(self, name: str, at: int, data: memoryview) -> None:
        """Put `data` at byte `at` of the tensor."""
        self._write_at(len(self._header) + self._offsets[name] + at, data)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        if kind is not None:
            self._discard()
            return
        try:
            with self._refusing():
                os.ftruncate(self._file, self.size)
                os.fsync(self._file)
                os.replace(self._temporary, self.path)
        except BaseException:
            self._discard()
            raise
        os.close(self._file)
        _sync_folder(self.path.parent)

    def _write_at(self, position: int, data: memoryview) -> None:
        data = data.cast("B")
        while data:
            with self._refusing():
                written = os.pwrite(self._file, data, position)
            position += written
            data = data[written:]

    @contextlib.contextmanager
    def _refusing(self) -> Iterator[None]:
        """An error of the system becomes a sentence about the output."""
        try:
            yield
        except OSError as error:
            reason = error.strerror or error
            raise OutputError(f"{self.path} cannot be written: {reason}.") from error

    def _discard(self) -> None:
        self._temporary.unlink(missing_ok=True)
        os.close(self._file)


def check_output(path: Path, inputs: Iterable[Path]) -> None:
    """Refuse an output that cannot be a file of its own."""
    _check_system(path)
    if not path.parent.is_dir():
        raise OutputError(f"{path} cannot be written: {path.parent} is not a folder.")
    if path.exists() and not path.is_file():
        raise OutputError(f"{path} cannot be written: it exists and is not an ordinary file.")
    if path.exists() and any(path.samefile(file) for file in inputs):
        raise OutputError(f"{path} cannot be written: it is a file of the checkpoint.")


def _check_system(path: Path) -> None:
    if sys.platform == "win32":  # no pwrite, no flock, and a file in use cannot be renamed
        raise OutputError(
            f"{path} cannot be written: GGUF files are not written on Windows; convert in WSL, or "
            "on Linux or macOS."
        )


def _padded(size: int) -> int:
    return -(-size // GGUF_DEFAULT_ALIGNMENT) * GGUF_DEFAULT_ALIGNMENT


def _create_temporary(path: Path) -> tuple[Path, int]:
    """A new hidden file beside `path`, locked for as long as this process lives."""
    while True:
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
        file = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            locked = _lock(file)
        except OSError:  # a file system without locks; stale files then stay there
            locked = True
        if locked and temporary.exists():
            return temporary, file
        os.close(file)  # another process took it for a stale one in that moment


def _remove_stale(path: Path) -> None:
    """Remove temporary files for `path` whose process is gone: nobody holds their lock."""
    for temporary in _temporaries(path):
        with contextlib.suppress(OSError):
            file = os.open(temporary, os.O_RDWR)
            try:
                if _lock(file):
                    temporary.unlink()
            finally:
                os.close(file)


def _temporaries(path: Path) -> Iterator[Path]:
    for entry in path.parent.iterdir():
        middle = entry.name.removeprefix(f".{path.name}.").removesuffix(".part")
        if entry.name == f".{path.name}.{middle}.part" and len(middle) == 8:
            yield entry


def _lock(file: int) -> bool:
    """Lock the file; false if another process holds the lock."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _sync_folder(folder: Path) -> None:
    """Make the new name durable, where the system can."""
    with contextlib.suppress(OSError):
        file = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(file)
        finally:
            os.close(file)
