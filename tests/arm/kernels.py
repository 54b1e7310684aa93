"""The C++ tests of the kernels, cross-compiled, on four processors that qemu-user emulates.

Run by `make test-arm`. Each processor must have run the sets of kernels that it has, and no others:
an instruction that it lacks ends the program.
"""

import os
import re
import subprocess
from pathlib import Path

import pytest

# qemu's name and the sets that it runs, the fastest first
PROCESSORS = {
    "cortex-a53": ["neon", "scalar"],  # Raspberry Pi 3
    "cortex-a72": ["neon", "scalar"],  # Raspberry Pi 4
    "cortex-a76": ["dotprod", "neon", "scalar"],  # Raspberry Pi 5
    "max,sve-max-vq=1": ["i8mm", "dotprod", "neon", "scalar"],
}


def run(processor: str, program: str, *arguments: str) -> str:
    build = Path(os.environ["MOBILELLM_ARM"])
    emulated = ["qemu-aarch64", "-cpu", processor, "-L", "/usr/aarch64-linux-gnu"]
    emulated += ["-E", f"LD_LIBRARY_PATH={build / 'bin'}", str(build / program), *arguments]
    done = subprocess.run(emulated, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize(
    "processor, kernels", [(name, each) for name, sets in PROCESSORS.items() for each in sets]
)
def test_products_equal_the_scalar_twins(processor, kernels):
    out = run(processor, "kernels_test", "emulated", kernels)
    assert re.search(rf"^{kernels}: [1-9]\d* cases", out, re.M), out
    assert out.splitlines()[-1] == f"best: {PROCESSORS[processor][0]}"


@pytest.mark.parametrize("processor", PROCESSORS)
def test_operations_between_matrices(processor):
    """Of exactly the sets that the processor has."""
    out = run(processor, "kernels_test", "emulated", "between")
    found = re.findall(r"^between matrices, (\w+): [1-9]\d* cases", out, re.M)
    assert found == PROCESSORS[processor], out


@pytest.mark.parametrize("processor", PROCESSORS)
def test_the_buffer_of_packed_weights(processor):
    """What it supports, and its results on any number of threads."""
    assert re.search(r"^packed: [1-9]\d* cases", run(processor, "packed_test"), re.M)
