"""What does not fit into the memory that is free is refused before any of it is taken."""

import re

import pytest
from checkpoints import make_checkpoint
from sessions import SHAPE

from mobilellm_cpp import MobileLLM, ModelError, convert_checkpoint
from mobilellm_cpp.engine import memory

MB = 1 << 20


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("memory")
    source = make_checkpoint(folder / "c", **SHAPE)
    return convert_checkpoint(source, folder / "m.gguf", type="q8_0").path


def refused(monkeypatch, model, free, **arguments):
    monkeypatch.setattr(memory, "free_memory", lambda: free)
    with pytest.raises(ModelError) as error:
        MobileLLM(model, n_threads=1, **arguments)
    return str(error.value)


def test_a_context_that_fits_is_named(monkeypatch, model):
    free = model.stat().st_size + memory.OTHER + 4 * MB
    said = refused(monkeypatch, model, free, n_ctx=1 << 18)
    assert re.search(r"\d+ MB for weights and \d+ MB for a context of 262144 tokens", said)
    fits = int(re.search(r"a context of (\d+) tokens fits$", said)[1])
    MobileLLM(model, n_ctx=fits, n_threads=1).close()
    assert "fits" in refused(monkeypatch, model, free, n_ctx=2 * fits)
    MobileLLM(model, n_ctx=int(1.8 * fits), n_threads=1, cache_type="q8_0").close()


def test_a_type_that_fits_is_named(monkeypatch, model):
    free = int(model.stat().st_size * 0.8) + memory.OTHER
    said = refused(monkeypatch, model, free, n_ctx=64)
    assert re.search(r"as q4_0 the weights take \d+ MB, and a context of 64 tokens fits", said)
    nothing = refused(monkeypatch, model, memory.OTHER, n_ctx=64)
    assert nothing.endswith("neither a smaller context nor a smaller type of weights fits")


def test_the_limit_of_a_cgroup_counts(monkeypatch, tmp_path):
    free = memory.free_memory()
    assert free > 0
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "memory.max").write_text("max\n")
    (tmp_path / "a" / "b" / "memory.max").write_text("1048576\n")
    (tmp_path / "own").write_text("0::/a/b\n")
    monkeypatch.setattr(memory, "CGROUPS", tmp_path)
    monkeypatch.setattr(memory, "OWN_CGROUP", tmp_path / "own")
    assert memory.free_memory() == MB


def test_floats_count_where_they_are_packed(monkeypatch, tmp_path, model):
    """All but the norms; without our kernels they stay in the file."""
    source = make_checkpoint(tmp_path / "c", **SHAPE)
    floats = convert_checkpoint(source, tmp_path / "m.gguf", type="f16").path
    said = refused(monkeypatch, floats, memory.OTHER, n_ctx=64)
    weights = int(re.search(r"(\d+) MB for weights", said)[1])
    assert weights == pytest.approx(floats.stat().st_size / MB, rel=0.1, abs=1)
    monkeypatch.setenv("MOBILELLM_KERNELS", "0")
    assert ", 0 MB for weights" in refused(monkeypatch, floats, memory.OTHER - 1, n_ctx=64)
