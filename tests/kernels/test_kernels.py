"""Every kernel against its scalar twin: a C++ program, also run by `make sanitize`."""

import os
import re
import subprocess
from pathlib import Path

import pytest

# what a processor must have (as /proc/cpuinfo names it) for each set of kernels
NEEDS = {
    "scalar": set(),
    "avx2": {"avx2", "fma", "bmi2"},
    "avx512vnni": {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni"},
}


def test_every_kernel_equals_the_scalar_twin():
    program = os.environ.get("MOBILELLM_KERNELS_TEST")
    if not program:
        pytest.fail("the test program is built by `make test`")
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    cpuinfo = Path("/proc/cpuinfo")
    flags = set(re.findall(r"\S+", cpuinfo.read_text())) if cpuinfo.exists() else set()
    for name, needs in NEEDS.items():
        if needs <= flags:  # else it was not compiled in, or not found
            for part in ("", "between matrices, "):
                assert re.search(rf"^{part}{name}: \d+ cases", done.stdout, re.M), done.stdout
