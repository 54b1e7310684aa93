"""The pin, the patch applier and what a failed build says."""

import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import _mobilellm_cpp_library
import pytest

ROOT = Path(__file__).resolve().parents[2]
UPSTREAM = ROOT / "mobilellm_cpp" / "native" / "upstream"


@pytest.fixture
def upstream(monkeypatch, tmp_path):
    """The build script as a module, with an empty cache."""
    spec = importlib.util.spec_from_file_location("upstream", UPSTREAM / "upstream.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setenv("MOBILELLM_BUILD_CACHE", str(tmp_path / "cache"))
    return module


def test_the_pin_is_the_runtime_requirement(upstream):
    version, sha256 = upstream.pin()
    assert re.fullmatch("[0-9a-f]{64}", sha256)
    assert f'"llama-cpp-python=={version}"' in (ROOT / "pyproject.toml").read_text()
    assert f"llama-cpp-python=={version}" in importlib.metadata.requires("mobilellm-cpp")
    assert importlib.metadata.version("llama-cpp-python") == version
    assert version == _mobilellm_cpp_library.LLAMA_CPP_PYTHON


def test_the_patches_keep_their_budget_and_say_why():
    changed = []
    for patch in (UPSTREAM / "patches").glob("*.patch"):
        first, *lines = patch.read_text().splitlines()
        assert not first.startswith("---"), f"{patch.name} does not begin with its purpose"
        changed += [line for line in lines if re.match(r"[+-](?![+-])", line)]
    assert 0 < len(changed) <= 60


@pytest.fixture
def tree(llama_cpp_source, tmp_path):
    """A copy of the folders that the patch touches."""
    for folder in ("src", "ggml/src/ggml-cpu"):
        shutil.copytree(llama_cpp_source / folder, tmp_path / "tree" / folder)
    return tmp_path / "tree"


def contents(tree: Path) -> dict[str, bytes]:
    return {str(p.relative_to(tree)): p.read_bytes() for p in tree.rglob("*") if p.is_file()}


def test_applying_twice_is_applying_once(upstream, tree):
    before = contents(tree)
    upstream.apply_patches(tree)
    once = contents(tree)
    assert once != before
    upstream.apply_patches(tree)
    assert contents(tree) == once


def test_a_changed_upstream_is_refused_and_left_alone(upstream, tree):
    path = tree / "src" / "llama-model.cpp"
    path.write_text(path.read_text().replace("load_hparams(llama_model_loader & ml) {", "load() {"))
    before = contents(tree)
    with pytest.raises(upstream.UpstreamError, match="llama-model.cpp.*regenerate the patch"):
        upstream.apply_patches(tree)
    assert contents(tree) == before


def test_prepare_leaves_a_given_source_alone(upstream, llama_cpp_source, tmp_path):
    upstream.prepare(tmp_path / "copy", llama_cpp_source)
    assert "mobilellm" not in (llama_cpp_source / "src" / "llama-arch.cpp").read_text()
    assert "mobilellm" in (tmp_path / "copy" / "src" / "llama-arch.cpp").read_text()
    stamp = (tmp_path / "copy" / "src" / "llama-arch.cpp").stat().st_mtime_ns
    upstream.prepare(tmp_path / "copy", llama_cpp_source)  # nothing to do
    assert (tmp_path / "copy" / "src" / "llama-arch.cpp").stat().st_mtime_ns == stamp


def test_prepare_follows_a_given_source_that_changes(upstream, llama_cpp_source, tmp_path):
    own = tmp_path / "own"
    own.mkdir()
    for name in upstream.NEEDED:
        copy = shutil.copytree if (llama_cpp_source / name).is_dir() else shutil.copy2
        copy(llama_cpp_source / name, own / name)
    upstream.prepare(tmp_path / "copy", own)
    (own / "src" / "llama.cpp").write_text("// changed")
    upstream.prepare(tmp_path / "copy", own)
    assert (tmp_path / "copy" / "src" / "llama.cpp").read_text() == "// changed"


def test_a_folder_that_is_no_llama_cpp(upstream, tmp_path):
    with pytest.raises(upstream.UpstreamError, match="no llama.cpp source folder"):
        upstream.prepare(tmp_path / "copy", tmp_path)


def test_wrong_hash(upstream, monkeypatch, tmp_path):
    """An index with another archive of that name: pip is not to run anything in it."""
    index = tmp_path / "index"
    index.mkdir()
    with tarfile.open(index / f"llama_cpp_python-{upstream.pin()[0]}.tar.gz", "w:gz") as tar:
        tar.add(__file__, "setup.py")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    with pytest.raises(upstream.UpstreamError, match="whose sha256 is not .*: do not use it"):
        upstream.fetch()
    assert list((tmp_path / "cache").iterdir()) == []


def test_no_network(tmp_path):
    env = {**os.environ, "MOBILELLM_BUILD_CACHE": str(tmp_path), "PIP_RETRIES": "0"}
    env |= {"PIP_INDEX_URL": "http://127.0.0.1:9/", "PIP_EXTRA_INDEX_URL": "", "PIP_FIND_LINKS": ""}
    command = [sys.executable, str(UPSTREAM / "upstream.py"), "fetch"]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "could not be downloaded" in done.stderr and "check the network" in done.stderr


def test_no_compiler(tmp_path):
    cmake = shutil.which("cmake")
    env = {k: v for k, v in os.environ.items() if k not in ("CC", "CXX", "CMAKE_ARGS")}
    env["PATH"] = str(tmp_path)
    done = subprocess.run(
        [cmake, "-S", str(ROOT), "-B", str(tmp_path / "b")], env=env, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "no C++ compiler found; install one" in re.sub(r"\s+", " ", done.stderr)
