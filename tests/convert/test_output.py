"""The output appears whole or not at all, whatever ends the process."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoints import make_checkpoint
from mobilellm_cpp.convert import convert_checkpoint

from mobilellm_cpp.errors import CheckpointError

OLD = b"what stood there before"

# Converts argv[1] to argv[2]; what happens at the first progress call is appended.
WORKER = """
import os, resource, signal, sys
from mobilellm_cpp.convert import convert_checkpoint
from mobilellm_cpp.errors import CheckpointError
def progress(done, total, name):
    {at_progress}
{before}
try:
    convert_checkpoint(sys.argv[1], sys.argv[2], type="f32", progress=progress)
except CheckpointError as error:
    print(error)
    sys.exit(1)
"""


@pytest.fixture
def place(tmp_path: Path) -> tuple[Path, Path]:
    """A checkpoint, and an output that has a file, alone in its folder."""
    folder = make_checkpoint(tmp_path / "m", dtype="f32")
    (tmp_path / "out").mkdir()
    out = tmp_path / "out" / "model.gguf"
    out.write_bytes(OLD)
    return folder, out


def convert_in_process(
    place: tuple[Path, Path], *, at_progress: str = "pass", before: str = ""
) -> subprocess.CompletedProcess[str]:
    code = WORKER.format(at_progress=at_progress, before=before)
    command = [sys.executable, "-c", code, *map(str, place)]
    return subprocess.run(command, capture_output=True, text=True, cwd=place[1].parent.parent)


def test_killed(place: tuple[Path, Path]) -> None:
    folder, out = place
    done = convert_in_process(place, at_progress="os.kill(os.getpid(), signal.SIGKILL)")
    assert done.returncode == -signal.SIGKILL
    assert out.read_bytes() == OLD
    left = [path for path in out.parent.iterdir() if path != out]
    assert len(left) == 1 and left[0].name.startswith(".model.gguf.")

    report = convert_checkpoint(folder, out)  # the next run removes what the dead one left
    assert os.listdir(out.parent) == [out.name]
    assert out.stat().st_size == report.size_bytes


def test_temporary_files_of_others_stay(place: tuple[Path, Path]) -> None:
    """Those of a running process, of other outputs, and whatever is not ours."""
    folder, out = place
    others = [".model.gguf.part", ".model.gguf.12345678", ".other.gguf.12345678.part"]
    for name in others:
        (out.parent / name).write_bytes(b"")
    seen: list[str] = []

    def progress(done: int, total: int, name: str) -> None:
        if not seen:
            convert_checkpoint(folder, out, type="q8_0")  # a second one, into the same output
            seen.extend(os.listdir(out.parent))

    report = convert_checkpoint(folder, out, progress=progress)
    running = set(seen) - {out.name, *others}
    assert len(running) == 1  # the first one's was there all the time
    assert sorted(os.listdir(out.parent)) == sorted([out.name, *others])
    assert out.stat().st_size == report.size_bytes  # the later to end wins


def test_full_disk(place: tuple[Path, Path]) -> None:
    """A limit on the size of files fails the write as a full disk does."""
    limit = "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))"
    done = convert_in_process(place, before=limit)
    assert done.returncode == 1, done.stderr
    assert str(place[1]) in done.stdout and os.strerror(errno.EFBIG) in done.stdout
    assert place[1].read_bytes() == OLD
    assert os.listdir(place[1].parent) == ["model.gguf"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_interrupted(error: type[BaseException], place: tuple[Path, Path]) -> None:
    def progress(done: int, total: int, name: str) -> None:
        raise error

    with pytest.raises(error):
        convert_checkpoint(*place, progress=progress)
    assert place[1].read_bytes() == OLD
    assert os.listdir(place[1].parent) == ["model.gguf"]


def test_replaced(place: tuple[Path, Path]) -> None:
    """A good conversion replaces the file, with the permissions of any new file."""
    folder, out = place
    mask = os.umask(0o027)
    try:
        convert_checkpoint(folder, out)
    finally:
        os.umask(mask)
    assert out.read_bytes()[:4] == b"GGUF"
    assert out.stat().st_mode & 0o777 == 0o640
    first = out.read_bytes()
    convert_checkpoint(folder, out)
    assert out.read_bytes() == first  # the same bytes every time


def test_impossible_outputs(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "m")
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    for out, needle in (
        (tmp_path / "no" / "such" / "m.gguf", "is not a folder"),
        (folder, "not an ordinary file"),
        (weights, "a file of the checkpoint"),
        (folder / "config.json", "a file of the checkpoint"),
        (tmp_path / ("x" * 250), os.strerror(errno.ENAMETOOLONG)),
    ):
        with pytest.raises(CheckpointError, match=needle) as caught:
            convert_checkpoint(folder, out)
        assert str(out) in str(caught.value)
    assert weights.read_bytes() == whole


def test_windows_is_told(monkeypatch: pytest.MonkeyPatch, place: tuple[Path, Path]) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(CheckpointError, match="not written on Windows; convert in WSL"):
        convert_checkpoint(*place)
    assert place[1].read_bytes() == OLD


def test_folder_without_permission(place: tuple[Path, Path]) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    place[1].parent.chmod(0o555)
    try:
        with pytest.raises(CheckpointError, match=os.strerror(errno.EACCES)):
            convert_checkpoint(*place)
    finally:
        place[1].parent.chmod(0o755)
