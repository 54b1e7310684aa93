"""The threads a model computes with: how many, and what becomes of them."""

import os
import socket
import subprocess
import sys
import urllib.request

import pytest
from checkpoints import make_checkpoint

from mobilellm_cpp import convert_checkpoint

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


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A model whose weights (40 MB) are most of what a process needs."""
    folder = tmp_path_factory.mktemp("threads")
    make_checkpoint(folder / "m", layers=3, hidden=1024, heads=16, kv_heads=4, ffn=3072)
    convert_checkpoint(folder / "m", folder / "m.gguf", type="q8_0")
    return folder / "m.gguf"


# What a process that used a model before it forks, and the child, run. `answer` is a text of its
# own for each number, so that a child cannot give the parent's.
PROGRAM = """
import multiprocessing, os, re, sys
{first}
from mobilellm_cpp import MobileLLM

def model():
    return MobileLLM({path!r}, n_threads=2, n_ctx=256)

def answer(llm, number):
    return "".join(llm.stream(f"number {{number}}", max_tokens=16, temperature=0))

def private():
    with open("/proc/self/smaps_rollup") as file:
        return sum(int(kb) for kb in re.findall(r"^Private_\\w+: +(\\d+)", file.read(), re.M)) << 10

def work(number):
    return answer(llm, number)

def own(number):
    return answer(model(), number)

llm = None
if __name__ == "__main__":
    llm = model()
    expected = [answer(llm, number) for number in range(4)]
    assert len(set(expected)) == 4
{body}
"""

IN_CHILDREN = """
    children = []
    for number in range(4):
        children.append(os.fork())
        if not children[-1]:
            good = {ask} == expected[number]
            {then}
            os._exit(0 if good else 1)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4
    assert answer(llm, 3) == expected[3]  # the parent goes on
"""


def run(path, body, first="", timeout=120):
    program = path.parent / "program.py"
    program.write_text(PROGRAM.format(path=str(path), body=body, first=first))
    command = [sys.executable, str(program)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    assert not done.returncode, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("first", ["", "import torch"])
@pytest.mark.parametrize("ask", ["answer(llm, number)", "answer(model(), number)"])
def test_a_forked_child_answers(path, ask, first):
    run(path, IN_CHILDREN.format(ask=ask, then="llm.close()"), first)


def test_a_child_of_a_child_answers(path):
    body = """
    child = os.fork()
    if not child:
        good = answer(llm, 1) == expected[1]
        grandchild = os.fork()
        if not grandchild:
            os._exit(0 if answer(llm, 2) == expected[2] else 1)
        os._exit(0 if good and os.waitpid(grandchild, 0)[1] == 0 else 1)
    assert os.waitpid(child, 0)[1] == 0
"""
    run(path, body)


def test_a_child_shares_the_weights_with_its_parent(path):
    then = "os.write(1, f'{private()}\\n'.encode())"  # in one piece
    out = run(path, IN_CHILDREN.format(ask="answer(llm, number)", then=then))
    assert len(out.split()) == 4
    assert max(map(int, out.split())) < path.stat().st_size / 5


@pytest.mark.parametrize(
    ("method", "function"), [("fork", "work"), ("fork", "own"), ("spawn", "own")]
)
def test_processes_of_multiprocessing_answer(path, method, function):
    body = f"""
    with multiprocessing.get_context("{method}").Pool(2) as pool:
        assert pool.map({function}, range(4)) == expected
"""
    run(path, body)


def test_workers_of_gunicorn_answer(path):
    """The model is loaded and used before the workers are forked."""
    app = path.parent / "served.py"
    app.write_text(
        f"""
from mobilellm_cpp import MobileLLM

llm = MobileLLM({str(path)!r}, n_threads=2, n_ctx=256)

def answer(number):
    return "".join(llm.stream("number " + number, max_tokens=16, temperature=0))

first = answer("0")

def app(environ, start_response):
    import os
    start_response("200 OK", [("X-Process", str(os.getpid()))])
    return [answer(environ["QUERY_STRING"]).encode()]
"""
    )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "gunicorn", "--preload", "--workers", "2", "served:app"]
    command += ["--bind", f"127.0.0.1:{port}", "--chdir", str(path.parent)]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        for line in server.stderr:
            if "Booting worker" in line:
                break
        answers, workers = {}, set()
        for i in range(100):
            number = str(i % 4)
            url = f"http://127.0.0.1:{port}/?{number}"
            with urllib.request.urlopen(url, timeout=60) as reply:
                answers.setdefault(number, set()).add(reply.read())
                workers.add(reply.headers["X-Process"])
            if i > 8 and len(workers) == 2:
                break
        assert [len(found) for found in answers.values()] == [1] * 4
        assert len(set().union(*answers.values())) == 4
    finally:
        server.terminate()
        server.communicate(timeout=60)
