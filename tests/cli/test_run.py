"""mobilellm-run, the program without Python, says what the Python class says."""

import subprocess
from pathlib import Path

import pytest
from checkpoints import make_checkpoint

from mobilellm_cpp import MobileLLM, convert_checkpoint
from mobilellm_cpp.engine.library import FOLDER

TEXTS = ("the quick brown fox", "a lazy dog asks who bakes the bread here and " * 14)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    source = make_checkpoint(folder / "c", sharing=True)
    return {
        kind: convert_checkpoint(source, folder / f"{kind}.gguf", type=kind).path
        for kind in ("q4_0", "f32")
    }


def run(*arguments: object, text: str = "") -> subprocess.CompletedProcess[str]:
    """Random tokens are not always UTF-8: what is none reads as U+FFFD."""
    command = [FOLDER / "mobilellm-run", "--threads", "1", *map(str, arguments)]
    settings = {"encoding": "utf-8", "errors": "replace", "timeout": 60}
    return subprocess.run(command, input=text, capture_output=True, **settings)


@pytest.mark.parametrize("kind", ["q4_0", "f32"])
@pytest.mark.parametrize("text", TEXTS, ids=["few", "many"])
def test_the_same_text_as_in_python(models, kind, text):
    with MobileLLM(models[kind], n_ctx=1024, n_threads=1) as llm:
        for how in ({"temperature": 0.0}, {"temperature": 0.9, "seed": 7, "top_k": 12}):
            options = [f"--{name}".replace("_", "-") for name in how]
            options = [each for pair in zip(options, how.values(), strict=True) for each in pair]
            told = "".join(llm.stream(text, max_tokens=24, **how))
            done = run(models[kind], "--ctx", 1024, "-n", 24, *options, text=f"{text}\n")
            assert (done.returncode, done.stdout) == (0, f"{told}\n"), done.stderr


def test_a_full_context_ends_the_text(models):
    done = run(models["q4_0"], "-p", "a fox", "--ctx", 20, "--temperature", 0)
    with MobileLLM(models["q4_0"], n_ctx=20, n_threads=1) as llm:
        stream = llm.stream("a fox", temperature=0.0)
        assert done.stdout == "".join(stream) + "\n"


@pytest.mark.parametrize(
    "arguments, code, sentence",
    [
        (("/nowhere.gguf", "-p", "x"), 1, "/nowhere.gguf: No such file or directory"),
        ((__file__, "-p", "x"), 1, "test_run.py is not a GGUF file"),
        (("/", "-p", "x"), 1, "/ is not a GGUF file"),
        ((), 2, "which model?"),
        (("MODEL", "--heat", "1"), 2, "what is '--heat'?"),
        (("MODEL", "--top-p", "2"), 2, "--top-p is '2', not a number from 0 to 1"),
        (("MODEL", "-p"), 2, "-p needs a value"),
        (("MODEL", "-t", "0", "-p", "x"), 2, "-t is '0', not a number from 1 to 512"),
        (("MODEL", "-p", "a fox " * 30, "--ctx", "16"), 1, "but the context holds 16"),
    ],
)
def test_mistakes_get_a_sentence(models, arguments, code, sentence):
    done = run(*[models["q4_0"] if each == "MODEL" else each for each in arguments])
    assert done.returncode == code
    assert sentence in done.stderr


def test_a_damaged_file_gets_a_sentence(models, tmp_path):
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(models["q4_0"].read_bytes()[:5000])
    done = run(cut, "-p", "x")
    assert done.returncode == 1
    assert done.stderr.startswith(f"mobilellm-run: {cut}: ") and len(done.stderr.splitlines()) == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's full disk")
def test_a_full_disk_gets_a_sentence(models):
    with open("/dev/full", "w") as full:
        command = [FOLDER / "mobilellm-run", models["q4_0"], "-t", "1", "-p", "x", "-n", "4"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.startswith("mobilellm-run: the text cannot be written: No space")
