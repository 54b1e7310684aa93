"""`mobilellm verify` and `convert --verify`, as a user runs them."""

import json
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from checkpoints import make_checkpoint
from gguf_edit import F32, rewrite

from mobilellm_cpp import CheckpointError, ModelError, convert_checkpoint, verify

MOBILELLM = str(Path(sysconfig.get_path("scripts")) / "mobilellm")

# The command with part of the world replaced.
PATCHED = """
import sys
{patch}
sys.argv = ["mobilellm", *sys.argv[1:]]
from mobilellm_cpp.cli import main
main()
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a checkpoint, its file, and one with another RoPE base."""
    folder = tmp_path_factory.mktemp("command")
    make_checkpoint(folder / "tiny")
    convert_checkpoint(folder / "tiny", folder / "tiny.gguf", type="q8_0")
    rewrite(folder / "tiny.gguf", folder / "wrong.gguf", {"llama.rope.freq_base": (5e5, F32)})
    (folder / "text").write_bytes(b"some words \xff and more of them\n")
    return folder


def run(place, *arguments, patch=None):
    command = [MOBILELLM] if patch is None else [sys.executable, "-c", PATCHED.format(patch=patch)]
    return subprocess.run(
        [*command, *arguments], capture_output=True, text=True, cwd=place, encoding="utf-8"
    )


def test_convert_and_verify(place):
    done = run(place, "convert", "tiny", "-o", "new.gguf", "--schedule", "reverse", "--verify")
    assert done.returncode == 0, done.stderr
    first, *lines = done.stdout.splitlines()
    assert first.startswith("new.gguf: ")
    assert sum("of the bound" in line for line in lines) == 20  # one for each tensor
    for start in ("metadata ", "tensors    20 of 20", "tokenizer ", "logits ", "graph "):
        assert any(line.startswith(start) for line in lines), start
    assert lines[-1] == "verdict    the file matches the checkpoint"


def test_a_wrong_file_as_json(place):
    done = run(place, "verify", "wrong.gguf", "tiny", "--json", "--text", "text", "-t", "1")
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("mobilellm: wrong.gguf does not match ")
    assert "RoPE base is 500000.0, but config.json makes it 10000.0 (and 1 more)" in done.stderr
    found = json.loads(done.stdout)
    assert found["ok"] is False and len(found["failures"]) == 2
    assert {"kl_divergence", "top1_agreement", "max_difference"} < set(found["logits"])
    assert found["graph"]["ratio"] > 5 and len(found["tensors"]) == 20
    assert found["tokenizer"]["alike"] == found["tokenizer"]["texts"]


def test_convert_keeps_a_file_that_fails(place):
    """With a converter that leaves the rows of a head in their order."""
    patch = (
        "from mobilellm_cpp.convert import writing\n"
        "writing.in_order = lambda weight, rows: rows.copy()"
    )
    done = run(place, "convert", "tiny", "-o", "bad.gguf", "--verify", patch=patch)
    assert done.returncode == 1 and done.stdout.splitlines()[-1] == "verdict    FAILED"
    assert "blk.0.attn_q.weight is not the checkpoint's" in done.stderr
    assert done.stderr.endswith("; the file is kept\n")
    assert not verify(place / "bad.gguf", place / "tiny", n_threads=1).ok  # it is there


def test_without_torch(place):
    patch = "sys.modules['torch'] = None"
    for arguments in (["verify", "tiny.gguf", "tiny"], ["convert", "tiny", "-o", "x", "--verify"]):
        done = run(place, *arguments, patch=patch)
        assert done.returncode == 1 and done.stdout == ""
        sentence = "the PyTorch reference needs torch: pip install 'mobilellm-cpp[torch]'"
        assert done.stderr == f"mobilellm: {sentence}\n"
    assert not (place / "x").exists()


def test_refusals(place):
    done = run(place, "verify", "none.gguf", "tiny")
    assert done.returncode == 1 and done.stderr == "mobilellm: none.gguf: no such file\n"
    assert run(place, "verify", "tiny.gguf", "tiny", "--text", "no text").returncode == 2
    with pytest.raises(CheckpointError):
        verify(place / "tiny.gguf", "nothing/here/at-all")
    with pytest.raises(ModelError):
        verify(place / "text", place / "tiny")


def test_a_folder_is_no_file_to_give_a_schedule_for(place):
    done = run(place, "verify", "tiny", "tiny", "--schedule", "reverse")
    assert done.returncode == 1 and "tiny is not a file" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_deep_setting_is_a_string(place):
    done = run(place, "convert", "tiny", "-o", "x.gguf", "--set", "rope_theta=" + "[" * 50000)
    assert done.returncode == 1 and "rope_theta must be a number" in done.stderr
    assert "Traceback" not in done.stderr
