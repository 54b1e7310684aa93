"""The wheels for x86-64 in dist/, installed as a user would, without a compiler.

Run by `make test-wheels` after `make wheels`. qemu-user emulates processors: a wheel that runs an
instruction which one of them lacks would end there.
"""

import os
import re
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DIST = ROOT / "dist"

# qemu's name, which of llama.cpp's CPU backends is loaded there, and our sets of kernels
PROCESSORS = {
    "Nehalem": ("sse42", ["scalar"]),  # of 2008: no AVX
    "Haswell": ("haswell", ["avx2", "scalar"]),
}

TELL = """
import re, sys
import llama_cpp  # finds our library by itself
from mobilellm_cpp import MobileLLM
from mobilellm_cpp.inspection.doctor import examine
maps = open("/proc/self/maps").read()
print(*set(re.findall(r"libggml-cpu-([^/]*)[.]so$", maps, re.M)))
print(examine().kernels)
with MobileLLM(sys.argv[1], n_ctx=512, n_threads=1) as llm:
    print("".join(llm.stream("Who bakes the bread?", max_tokens=24, temperature=0)).strip())
"""


def run(command: list[str | Path], **env: str) -> str:
    kept = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(command, env=kept | env, capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="session")
def python(tmp_path_factory) -> Path:
    """A new environment with the package, installed with no compiler on the PATH."""
    folder = tmp_path_factory.mktemp("venv")
    venv.create(folder, with_pip=True)
    python = folder / "bin/python"
    install = ["-m", "pip", "install", "--quiet", "--find-links", DIST, "mobilellm-cpp"]
    run([python, *install], PATH=str(folder / "bin"), CC="none", CXX="none")
    return python


@pytest.mark.parametrize("processor", ["x86_64", "aarch64"])
def test_what_a_wheel_asks_of_a_system(processor):
    """Its size, and the versions of glibc and libstdc++ that its libraries need."""
    (wheel,) = DIST.glob(f"mobilellm_cpp-*-py3-none-*_{processor}.whl")
    assert wheel.stat().st_size < 15e6
    auditwheel = Path(sys.executable).with_name("auditwheel")
    said = " ".join(run([auditwheel, "show", wheel]).split())
    tags = re.findall(rf"manylinux_2_(\d+)_{processor}", said)
    assert tags and all(int(minor) <= 31 for minor in tags), said


def test_the_bindings_are_for_any_machine():
    assert len(list(DIST.glob("llama_cpp_python-*-py3-none-any.whl"))) == 1


def test_the_same_bytes_and_answers_on_every_processor(python, tmp_path):
    """As from the package that was built for this machine."""
    from mobilellm_cpp import convert_checkpoint
    from mobilellm_cpp.cache import DEMO

    here = {type: tmp_path / f"{type}.gguf" for type in ("f32", "q4_0")}
    for type, path in here.items():
        convert_checkpoint(DEMO, path, type=type)
    answer = run([sys.executable, "-c", TELL, here["f32"]]).splitlines()[-1]
    assert len(answer) > 20
    assert run([python, "-c", TELL, here["f32"]]).splitlines()[-1] == answer
    for processor, (backend, sets) in PROCESSORS.items():
        emulated = ["qemu-x86_64", "-cpu", processor, python]
        said = run([*emulated, "-c", TELL, here["f32"]]).splitlines()
        assert said == [backend, sets[0], answer]
        for type, path in here.items():
            there = tmp_path / f"{processor}-{type}.gguf"
            run([*emulated, "-m", "mobilellm_cpp", "convert", DEMO, "-o", there, "--type", type])
            assert there.read_bytes() == path.read_bytes()


@pytest.mark.parametrize("processor", PROCESSORS)
def test_the_kernels_of_a_processor(processor):
    """The C++ tests in the wheel's own build."""
    build = ROOT / "build/wheel-x86_64"
    emulated = ["qemu-x86_64", "-cpu", processor, build / "kernels_test", "emulated"]
    out = run(emulated, LD_LIBRARY_PATH=str(build / "bin"))
    sets = PROCESSORS[processor][1]
    for prefix in ("", "between matrices, "):
        assert re.findall(rf"^{prefix}(\w+): [1-9]\d* cases", out, re.M) == sets, out
