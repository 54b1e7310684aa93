"""The threads a model computes with: how many, and what becomes of them."""

import os
import subprocess
import sys

import pytest

ALLOWED = sorted(os.sched_getaffinity(0))


def in_a_system(tmp_path, groups, files, siblings=None):
    """default_threads() where /proc/self/cgroup, /sys/fs/cgroup and the processors' topology say
    what they say here. Skips where this process may not mount."""
    (tmp_path / "groups").write_text(groups)
    cpus = "/sys/devices/system/cpu"
    lines = [
        f"mount --bind {tmp_path}/groups /proc/$$/cgroup",
        "mount -t tmpfs none /sys/fs/cgroup",
    ]
    lines += [f"mount -t tmpfs none {cpus}"]
    for name, text in files.items():
        folder = os.path.dirname(f"/sys/fs/cgroup/{name}")
        lines += [f"mkdir -p {folder}", f"echo '{text}' > /sys/fs/cgroup/{name}"]
    for cpu, text in (siblings or {}).items():
        folder = f"{cpus}/cpu{cpu}/topology"
        lines += [f"mkdir -p {folder}", f"echo '{text}' > {folder}/thread_siblings_list"]
    code = "from mobilellm_cpp.engine.threads import default_threads; print(default_threads())"
    probe = subprocess.run(["unshare", "-m", "mount", "-t", "tmpfs", "none", "/mnt"])
    if probe.returncode:
        pytest.skip("needs a mount namespace")
    script = " && ".join([*lines, f"exec {sys.executable} -c '{code}'"])
    run = subprocess.run(["unshare", "-m", "sh", "-c", script], capture_output=True, text=True)
    assert not run.returncode, run.stderr
    return int(run.stdout)


@pytest.mark.parametrize(
    ("groups", "files", "quota"),
    [
        ("0::/\n", {"cpu.max": "100000 100000"}, 1),
        ("0::/\n", {"cpu.max": "max 100000"}, None),
        ("0::/\n", {"cpu.max": "110000 100000"}, 2),  # rounded up
        ("0::/\n", {"cpu.max": "1000 100000"}, 1),
        ("0::/\n", {"cpu.max": "much"}, None),
        # a limit anywhere above counts, whatever is below it
        (
            "0::/a/b\n",
            {"cpu.max": "max 100000", "a/cpu.max": "50000 50000", "a/b/cpu.max": "900000 100000"},
            1,
        ),
        ("0::/a\n", {"b/cpu.max": "100000 100000"}, None),  # somebody else's
        # a container that sees the host's path, and its own group as the root
        ("0::/docker/123\n", {"cpu.max": "100000 100000"}, 1),
        ("0::/../../x\n", {"cpu.max": "100000 100000"}, 1),
        (
            "4:cpu,cpuacct:/x\n0::/\n",
            {
                "cpu,cpuacct/x/cpu.cfs_quota_us": "100000",
                "cpu,cpuacct/x/cpu.cfs_period_us": "100000",
            },
            1,
        ),
        (
            "2:cpuset:/x\n1:cpu:/x\n",
            {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"},
            None,
        ),
        (
            "1:cpu:/x/y\n",
            {"cpu/x/cpu.cfs_quota_us": "20000", "cpu/x/cpu.cfs_period_us": "100000"},
            1,
        ),
        ("3:cpu:/\n0::/a\n", {"unified/a/cpu.max": "100000 100000"}, 1),
        ("", {}, None),
    ],
)
def test_a_quota_limits_the_threads(tmp_path, groups, files, quota):
    expected = len(ALLOWED) if quota is None else min(len(ALLOWED), quota)
    assert in_a_system(tmp_path, groups, files) == expected


def test_hyper_threads_count_once_and_only_where_there_are_any(tmp_path):
    all_of_one = dict.fromkeys(ALLOWED, f"{ALLOWED[0]}-{ALLOWED[-1]}")
    assert in_a_system(tmp_path, "0::/\n", {}, all_of_one) == 1
    each_alone = {cpu: str(cpu) for cpu in ALLOWED}
    assert in_a_system(tmp_path, "0::/\n", {}, each_alone) == len(ALLOWED)
    assert in_a_system(tmp_path, "0::/\n", {}) == len(ALLOWED)
