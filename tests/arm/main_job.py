"""The main job on ARM: the wheel for it, in a Debian for ARM whose programs qemu-user runs.

Run by `make test-arm-main` against the same steps on this machine. The commands are those of
docs/raspberry-pi.md.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mobilellm_cpp import convert_checkpoint
from mobilellm_cpp.cache import DEMO

REPOSITORY = Path(__file__).parents[2]
MOBILELLM = "/root/mobilellm/bin/mobilellm"
PYTHON = "/root/mobilellm/bin/python"
CHECKPOINT = "/root/mobilellm/lib/python3.11/site-packages/mobilellm_cpp/demo"
QUESTION = "Hello! Who are you?"
TEXT = "Once upon a time there was a little robot who liked to count the stars in the sky. " * 3

# What a process on either side says of a file: logits of a text, greedy tokens, chat, embedding.
TELL = """
import json, sys
import numpy as np
from mobilellm_cpp import MobileLLM
path, text, question, out = sys.argv[1:]
llm = MobileLLM(path, n_ctx=512, n_threads=2, cache_type="f16")
np.save(out, llm.logits(llm.tokenize(text.encode())))
greedy = "".join(llm.stream(text, max_tokens=16, temperature=0))
answer = "".join(llm.chat([{"role": "user", "content": question}], temperature=0, max_tokens=16))
print(json.dumps([greedy, answer, np.asarray(llm.embeddings([text])).tolist()]))
"""


class Root:
    """A Debian for ARM with the package in a virtual environment."""

    def __init__(self) -> None:
        self.folder = Path(os.environ["MOBILELLM_ARM_ROOT"])

    def run(self, *command: str, processor: str = "cortex-a72", stdin: str = "") -> str:
        """A command inside; returns its output."""
        inside = {
            "HOME": "/root",
            "LANG": "C.UTF-8",
            "PATH": "/usr/bin:/usr/sbin",
            "QEMU_CPU": processor,
        }
        qemu = shutil.which("qemu-aarch64-static")
        assert qemu, "apt install qemu-user-static"
        enter = [REPOSITORY / "packaging/in-root", qemu, self.folder, *command]
        done = subprocess.run(
            enter, env=inside, input=stdin, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        return done.stdout

    def path(self, inside: str) -> Path:
        return self.folder / inside.lstrip("/")


@pytest.fixture(scope="session")
def arm() -> Root:
    root = Root()
    for name in ("/etc/resolv.conf", "/etc/ssl/certs/ca-certificates.crt"):  # this machine's
        shutil.copy(name, root.path(name))
    shutil.rmtree(root.path("/root"), ignore_errors=True)
    shutil.copytree(REPOSITORY / "dist", root.path("/root/dist"))
    root.run("python3", "-m", "venv", "/root/mobilellm")
    install = ["--quiet", "--no-compile", "--find-links", "/root/dist", "mobilellm-cpp"]
    root.run(PYTHON, "-m", "pip", "install", *install)
    return root


@pytest.mark.parametrize("type", ["q4_0", "q8_0", "f16"])
def test_the_same_checkpoint_gives_the_same_bytes(arm, tmp_path, type):
    here, there = tmp_path / "here.gguf", f"/root/{type}.gguf"
    convert_checkpoint(DEMO, here, type=type)
    arm.run(MOBILELLM, "convert", CHECKPOINT, "-o", there, "--type", type)
    assert here.read_bytes() == arm.path(there).read_bytes()


@pytest.mark.parametrize("processor", ["cortex-a72", "cortex-a76"])
@pytest.mark.parametrize("type", ["f32", "q4_0"])
def test_arm_answers_as_this_machine(arm, tmp_path, type, processor):
    """Greedy texts, a chat answer and an embedding of f32 are equal, with two threads; the mean
    divergence of the predictions is at most 1e-4 with rounded weights, too. The KV cache is F16:
    Q8_0's rounding magnifies what sums in another order change, between x86-64 machines, too."""
    path = tmp_path / "demo.gguf"
    convert_checkpoint(DEMO, path, type=type)
    shutil.copy(path, arm.path("/root/demo.gguf"))
    here = [sys.executable, "-c", TELL, path, TEXT, QUESTION, tmp_path / "here.npy"]
    said = subprocess.run(here, check=True, capture_output=True, text=True).stdout
    inside = [PYTHON, "-c", TELL, "/root/demo.gguf", TEXT, QUESTION, "/root/logits.npy"]
    arm_said = arm.run(*inside, processor=processor)

    if type == "f32":
        (text, answer, embedding), (arm_text, arm_answer, arm_embedding) = (
            json.loads(lines.splitlines()[-1]) for lines in (said, arm_said)
        )
        assert (arm_text, arm_answer) == (text, answer)
        np.testing.assert_allclose(arm_embedding, embedding, atol=1e-4)

    def log_softmax(path: Path) -> np.ndarray:
        x = np.load(path).astype(np.float64)
        x -= x.max(-1, keepdims=True)
        return x - np.log(np.exp(x).sum(-1, keepdims=True))

    mine, theirs = log_softmax(tmp_path / "here.npy"), log_softmax(arm.path("/root/logits.npy"))
    assert (np.exp(mine) * (mine - theirs)).sum(-1).mean() <= 1e-4


@pytest.mark.parametrize(
    "processor, backend, kernels",
    [
        ("cortex-a53", "armv8.0_1", "neon"),
        ("cortex-a72", "armv8.0_1", "neon"),
        ("cortex-a76", "armv8.2_2", "dotprod"),
        ("max,sve-max-vq=1", "armv8.2_2", "i8mm"),
    ],
)
def test_one_wheel_has_the_kernels_of_each_processor(arm, processor, backend, kernels):
    script = (
        "import re; from mobilellm_cpp.inspection.doctor import examine; found = examine();"
        "maps = open('/proc/self/maps').read();"
        "print(found.kernels, *set(re.findall(r'libggml-cpu-([^/]*)[.]so', maps)))"
    )
    assert arm.run(PYTHON, "-c", script, processor=processor).split() == [kernels, backend]


def test_the_commands_of_the_main_job(arm):
    """Generate, one question of a chat, embed: from the terminal, on a processor with all sets."""
    everything = "max,sve-max-vq=1"
    arguments = ["demo", "-p", "Once", "-n", "8", "--temperature", "0"]
    assert arm.run(MOBILELLM, "generate", *arguments, processor=everything).strip()
    assert arm.run(MOBILELLM, "chat", processor=everything, stdin=QUESTION + "\n").strip()
    numbers = arm.run(
        MOBILELLM, "embed", "demo", "--json", processor=everything, stdin="the stars\n"
    )
    assert len(json.loads(numbers)["data"][0]["embedding"]) > 16
