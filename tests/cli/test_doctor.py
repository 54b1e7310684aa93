"""mobilellm doctor, against what the system says by other ways."""

import json
import os
import subprocess
import sysconfig
from pathlib import Path

MOBILELLM = str(Path(sysconfig.get_path("scripts")) / "mobilellm")


def doctor(cache, *arguments, **env):
    env = {**os.environ, "MOBILELLM_CACHE": str(cache), **env}
    env.pop("LLAMA_CPP_LIB_PATH", None)
    return subprocess.run(
        [MOBILELLM, "doctor", *arguments], capture_output=True, text=True, env=env, timeout=120
    )


def test_it_tells_what_runs_here(tmp_path):
    (tmp_path / "some.gguf").write_bytes(b"GGUF" * 100)
    done = doctor(tmp_path, "--json")
    assert done.returncode == 0 and done.stderr == "", done.stderr
    found = json.loads(done.stdout)
    assert abs(found["memory"] - os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")) < 1 << 20
    flags = Path("/proc/cpuinfo").read_text()
    for feature, flag in (("AVX2", "avx2"), ("AVX512_VNNI", "avx512_vnni"), ("FMA", "fma")):
        assert (feature in found["features"]) <= (f" {flag} " in flags)
    if " avx512_vnni " in flags:
        assert found["kernels"] == "avx512vnni"
    assert found["cache_files"] == 1 and found["cache_size"] == 400
    assert found["neighbour"].endswith("libllama.so of ours")
    assert 1 <= found["threads"] <= len(os.sched_getaffinity(0)) and found["threads_reason"]
    words = doctor(tmp_path).stdout
    assert found["kernels"] in words and str(tmp_path) in words


def test_it_says_what_is_wrong(tmp_path):
    (tmp_path / "file").write_text("")
    done = doctor(tmp_path / "file")
    assert done.returncode == 1
    assert done.stderr == (
        f"mobilellm: the cache folder {tmp_path}/file cannot be used: {tmp_path}/file is a file\n"
    )


def test_a_setting_of_the_kernels_that_is_not_known(tmp_path):
    done = doctor(tmp_path, MOBILELLM_KERNELS="fast")
    assert done.returncode == 1
    assert done.stderr == "mobilellm: MOBILELLM_KERNELS is 'fast', not 0, pack or 1\n"
