"""Kernels and what is built of them, in C++ programs that `make sanitize` runs, too."""

import os
import re
import subprocess
from pathlib import Path

import pytest

from mobilellm_cpp import convert_checkpoint
from mobilellm_cpp.cache import DEMO

# what a processor must have (as /proc/cpuinfo names it) for each set of kernels
NEEDS = {
    "scalar": set(),
    "avx2": {"avx2", "fma", "bmi1", "bmi2", "f16c"},
    "avx512vnni": {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl", "avx512_vnni"},
    "neon": {"asimd"},
    "dotprod": {"asimddp"},
    "i8mm": {"asimddp", "i8mm"},
}


def run(program: str, *arguments: str) -> str:
    folder = os.environ.get("MOBILELLM_NATIVE_TESTS")
    if not folder:
        pytest.fail("the test programs are built by `make test`")
    env = {k: v for k, v in os.environ.items() if k != "MOBILELLM_KERNELS"}
    done = subprocess.run(
        [Path(folder) / program, *arguments], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    return done.stdout


def processor() -> set[str]:
    cpuinfo = Path("/proc/cpuinfo")
    return set(re.findall(r"\S+", cpuinfo.read_text())) if cpuinfo.exists() else set()


def test_every_kernel_equals_the_scalar_twin():
    out = run("kernels_test")
    for name, needs in NEEDS.items():
        if needs <= processor():  # else it was not compiled in, or not found
            for part in ("", "between matrices, "):
                assert re.search(rf"^{part}{name}: \d+ cases", out, re.M), out


def test_the_buffer_of_packed_weights():
    """What it supports, and its results on any number of threads."""
    out = run("packed_test")
    if NEEDS["avx2"] <= processor() or NEEDS["neon"] <= processor():
        assert re.search(r"^packed: \d+ cases", out, re.M), out


def test_the_threads_of_a_backend():
    """Assertions in any of them, forks, several at once."""
    run("thread_pool_test")


@pytest.mark.parametrize("type", ["q4_0", "f16"])  # packed, and not
def test_many_callers_of_one_model(tmp_path, type):
    convert_checkpoint(DEMO, tmp_path / "demo.gguf", type=type)
    assert run("callers_test", str(tmp_path / "demo.gguf")) == "0 of 12 answers differ\n"
