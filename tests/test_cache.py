"""The cache of converted checkpoints: what finds a file again, and what becomes of it."""

import ctypes
import os
import shutil
import stat
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import pytest
from checkpoints import make_checkpoint
from mobilellm_cpp.quant import library

import mobilellm_cpp
from mobilellm_cpp import CheckpointError, cache

MOBILELLM = str(Path(sysconfig.get_path("scripts")) / "mobilellm")


def bound_by_modes():
    """Before a program starts: the superuser, too, may do only what modes of files say."""
    for capability in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
        ctypes.CDLL(None).prctl(24, capability)  # PR_CAPBSET_DROP


ORDINARY = {"preexec_fn": bound_by_modes}

# Prints the file of a checkpoint and its size, as another process finds them.
CONVERTED = (
    "import sys; from mobilellm_cpp.cache import converted\n"
    "path = converted(sys.argv[1], 'q8_0'); print(path, path.stat().st_size)"
)


@pytest.fixture
def place():
    """A folder that others can read, with a checkpoint `tiny` in it."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    make_checkpoint(folder / "tiny")
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def kept(place, monkeypatch):
    monkeypatch.setenv("MOBILELLM_CACHE", str(place / "cache"))
    monkeypatch.setattr(cache.log, "warning", None)  # nothing to warn of
    return place / "cache"


def converted(place):
    return cache.converted(place / "tiny", "q8_0")


def another(place, *command, **options):
    """The checkpoint's file as another process finds it, what it printed, and its exit code."""
    env = {**os.environ, **options.pop("env", {})}
    command = [*command] or [sys.executable, "-c", CONVERTED, str(place / "tiny")]
    return subprocess.run(
        command, capture_output=True, text=True, cwd="/", env=env, check=False, **options
    )


def test_a_checkpoint_is_converted_once(place, kept):
    path = converted(place)
    before = path.stat()
    assert path.parent == kept and path.name.startswith("tiny-q8_0-")
    assert converted(place) == path and path.stat() == before
    assert another(place).stdout.split() == [str(path), str(before.st_size)]
    assert path.stat() == before


def test_another_content_or_type_is_another_file(place, kept):
    paths = {converted(place), cache.converted(place / "tiny", "f16")}
    config = place / "tiny" / "config.json"
    config.write_text(config.read_text().replace("1e-05", "2e-05"))
    paths.add(converted(place))
    assert len(paths) == 3


def test_any_edit_of_the_converter_makes_another_key(tmp_path):
    copy = tmp_path / "mobilellm_cpp"
    ignored = shutil.ignore_patterns("__pycache__", "demo")
    shutil.copytree(Path(mobilellm_cpp.__file__).parent, copy, ignore=ignored)

    def key():
        command = [
            sys.executable,
            "-c",
            "from mobilellm_cpp.cache import converter_key; print(converter_key())",
        ]
        env = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
        return subprocess.check_output(command, env=env, cwd=tmp_path)

    keys = [key()]
    assert keys == [key()]
    for name in ("convert/bpe.py", "convert/families/r1.py", "quant/types.py"):
        with open(copy / name, "ab") as file:
            file.write(b"\n")
        keys.append(key())
    with open(copy / "cache.py", "a") as file:
        file.write("\n")
    assert len(set(keys)) == 4 and key() == keys[-1]


def test_another_ggml_makes_another_key(tmp_path, monkeypatch):
    before = cache.converter_key.__wrapped__()
    other = tmp_path / library.ggml_path().name
    other.write_bytes(library.ggml_path().read_bytes() + b"\0")
    monkeypatch.setattr(library, "ggml_path", lambda: other)
    assert cache.converter_key.__wrapped__() != before


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_files_are_for_whom_the_umask_says(umask, place):
    done = another(place, env={"MOBILELLM_CACHE": str(place / "cache")}, umask=umask)
    assert done.returncode == 0, done.stderr
    files = list((place / "cache").iterdir())
    assert {path.suffix for path in files} == {".gguf", ".key", ".whole"}
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o666 & ~umask}


def cut(path):
    os.truncate(path, path.stat().st_size // 2)


def overwrite(path):
    with open(path, "r+b") as file:
        file.seek(path.stat().st_size // 2)
        file.write(bytes(4096))


DAMAGE = {
    "cut": cut,
    "empty": lambda path: path.write_bytes(b""),
    "overwritten": overwrite,
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0" * 32),
    "gone": lambda path: path.unlink(),
    "no record": lambda path: path.with_suffix(".whole").unlink(),
    "half a record": lambda path: cut(path.with_suffix(".whole")),
    "another record": lambda path: path.with_suffix(".whole").write_bytes(b"\xff 1 2 3"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_converted_anew(damage, place, kept):
    path = converted(place)
    right = path.read_bytes()
    DAMAGE[damage](path)
    assert converted(place) == path and path.read_bytes() == right
    before = path.stat()
    assert converted(place) == path and path.stat() == before


def test_a_damaged_key_is_found_again(place, kept):
    path = converted(place)
    (key,) = kept.glob("*.key")
    right = key.read_text()
    for wrong in (b"", b"\xff\xfe", right[:5].encode(), b"../../x"):
        key.write_bytes(wrong)
        assert converted(place) == path and key.read_text() == right


def test_a_copied_cache_is_used(place, kept):
    """As in a container's image: other times, the same content."""
    path = converted(place)
    os.utime(path, (1, 1))
    before = path.stat()
    for _ in range(2):
        assert converted(place) == path and path.stat().st_ino == before.st_ino
        assert path.stat().st_mtime == 1


def test_processes_at_once_do_not_disturb_each_other(place):
    env = os.environ | {"MOBILELLM_CACHE": str(place / "cache")}
    command = [sys.executable, "-c", CONVERTED, str(place / "tiny")]
    started = [
        subprocess.Popen(command, env=env, stdout=-1, stderr=-1, text=True) for _ in range(4)
    ]
    ended = [process.communicate() for process in started]
    assert {stdout for stdout, _ in ended} == {ended[0][0]} and ended[0][0]
    assert {stderr for _, stderr in ended} == {""}
    names = sorted(path.suffix for path in (place / "cache").iterdir())
    assert names == [".gguf", ".key", ".whole"]


def test_a_shared_cache_serves_who_cannot_write_to_it(place, kept):
    path = converted(place)
    kept.chmod(0o555)
    done = another(place, **ORDINARY)
    assert done.stdout.split()[0] == str(path) and done.stderr == ""


@pytest.fixture(params=["no home", "a file", "read-only", "unknown user"])
def unwritable(request, place):
    """What makes another process fail to write its cache, and the folder that it names."""
    if request.param == "no home":
        env = {"HOME": "/proc/none", "MOBILELLM_CACHE": "", "XDG_CACHE_HOME": ""}
        return {"env": env}, "/proc/none"
    if request.param == "unknown user":
        return {"env": {"MOBILELLM_CACHE": "~nobody-at-all/cache"}}, "no home folder"
    if request.param == "a file":
        (place / "cache").write_text("")
        return {"env": {"MOBILELLM_CACHE": str(place / "cache")}}, str(place / "cache")
    (place / "cache").mkdir(mode=0o555)
    return {"env": {"MOBILELLM_CACHE": str(place / "cache")}, **ORDINARY}, str(place / "cache")


def test_where_nothing_can_be_kept_a_temporary_folder_does(unwritable, place):
    options, named = unwritable
    (place / "tmp").mkdir()
    (place / "tmp").chmod(0o777)
    options["env"] |= {"TMPDIR": str(place / "tmp")}
    done = another(place, **options)
    assert done.returncode == 0 and int(done.stdout.split()[1]) > 100_000
    assert done.stdout.startswith(str(place / "tmp"))
    assert named in done.stderr and "set MOBILELLM_CACHE to a folder" in done.stderr
    assert done.stderr.count("\n") == 1 and "Errno" not in done.stderr
    assert not any((place / "tmp").iterdir())  # removed at the end
    done = another(place, MOBILELLM, "generate", str(place / "tiny"), "-p", "a", "-n3", **options)
    assert done.returncode == 0 and done.stdout
    warning, told, speed = done.stderr.splitlines()
    assert warning.startswith("mobilellm: ") and "MOBILELLM_CACHE" in warning
    assert told.startswith(f"{place / 'tiny'} is used as balanced, ")
    assert "tokens" in speed
    assert not any((place / "tmp").iterdir())
    assert not Path("~nobody-at-all").exists()


def test_a_forked_child_leaves_the_temporary_folder(place):
    script = (
        "import os, sys; from mobilellm_cpp.cache import converted\n"
        "path = converted(sys.argv[1], 'q8_0')\n"
        "child = os.fork()\n"
        "if not child: sys.exit(0)\n"
        "os.waitpid(child, 0); assert path.exists() and path == converted(sys.argv[1], 'q8_0')"
    )
    command = [sys.executable, "-c", script, str(place / "tiny")]
    done = another(place, *command, env={"MOBILELLM_CACHE": "/proc/none"})
    assert done.returncode == 0 and done.stderr.count("\n") == 1, done.stderr


def test_a_disk_that_is_full(place, kept, monkeypatch, caplog):
    monkeypatch.undo()
    monkeypatch.setenv("MOBILELLM_CACHE", str(kept))
    (place / "cache").mkdir()
    write = os.pwrite

    def full(file, data, at):
        if at > 100_000 and os.readlink(f"/proc/self/fd/{file}").startswith(str(kept)):
            raise OSError(28, "No space left on device")
        return write(file, data, at)

    monkeypatch.setattr(os, "pwrite", full)
    assert converted(place).stat().st_size > 100_000
    (record,) = caplog.records
    assert "No space left on device, so it will be" in record.getMessage()
    assert [path.suffix for path in kept.iterdir()] == [".key"]


def test_where_there_is_no_temporary_folder_either(place, monkeypatch):
    def none(**_):
        raise FileNotFoundError(2, "No usable temporary directory found in ['/tmp']")

    monkeypatch.setenv("MOBILELLM_CACHE", "/proc/none")
    monkeypatch.setattr(tempfile, "mkdtemp", none)
    cache._temporary_folder.cache_clear()
    with pytest.raises(CheckpointError) as error:
        cache.converted(place / "tiny", "bf16")
    assert "/proc/none" in str(error.value) and "No usable temporary" in str(error.value)
    assert "MOBILELLM_CACHE" in str(error.value) and "Errno" not in str(error.value)


def test_a_checkpoint_that_cannot_be_read_is_named_in_a_sentence(place):
    (place / "tiny" / "model.safetensors").chmod(0)
    (place / "cache").mkdir()
    (place / "cache").chmod(0o777)
    env = {"MOBILELLM_CACHE": str(place / "cache")}
    done = another(place, MOBILELLM, "inspect", str(place / "tiny"), env=env, **ORDINARY)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "model.safetensors" in done.stderr and "Permission denied" in done.stderr
    assert "Errno" not in done.stderr


def test_a_long_name_still_is_one(place, kept):
    name = "\u00fc" * 120
    shutil.copytree(place / "tiny", place / name)
    path = cache.converted(place / name, "q4_0")
    assert path.parent == kept and len(os.fsencode(path.name)) < 200


def test_what_the_cache_holds_is_told_without_the_converter():
    """It is listed at each press of the tab key, to complete names of models."""
    code = "import sys; from mobilellm_cpp import kept; kept.kept(); "
    code += "print(*{'numpy', 'gguf', 'mobilellm_cpp.convert'} & set(sys.modules))"
    run = [sys.executable, "-c", f"from mobilellm_cpp import cache; cache.converter_key(); {code}"]
    assert subprocess.run(run, capture_output=True, text=True, check=True).stdout == "\n"
