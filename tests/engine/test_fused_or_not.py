"""What takes the ordinary graph in the place of the fused node."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from gguf_edit import BOOL, F32, STRING, U32, rewrite
from sessions import NOISE, TOKENS, Session, decode, distance, load

from mobilellm_cpp.engine.library import llama_cpp


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("llama.residual_scale", (2.0, F32)),
        ("llama.attention.clamp_kqv", (0.5, F32)),
        ("llama.of_a_later_version", (1, U32)),
        ("llama.attention.sliding_window", (16, U32)),  # Pro's key, of another architecture
        ("llama.hidden_activation", ("gelu", STRING)),
    ],
)
def test_a_key_that_nobody_listed_takes_the_ordinary_graph(files, ordinary, tmp_path, key, value):
    path = rewrite(files["llama"], tmp_path / "other.gguf", {key: value})
    assert np.array_equal(decode(path, TOKENS[:5]), ordinary(decode, path, TOKENS[:5]))


def test_an_override_that_nobody_listed_takes_the_ordinary_graph(files, ordinary):
    def run(overrides):
        session = Session(load(files["llama"], kv_overrides=overrides))
        rows = session.run(TOKENS[:5])
        session.close()
        return rows

    for overrides, fused in (({"llama.logit_scale": 2.0}, False), ({"llama.vocab_size": 7}, True)):
        assert np.array_equal(run(overrides), ordinary(run, overrides)) is not fused


def test_what_other_programs_write_of_a_llama_is_fused(files, ordinary, tmp_path):
    keys = {
        "llama.rope.scaling.type": ("none", STRING),
        "llama.rope.scaling.finetuned": (False, BOOL),
        "llama.expert_count": (0, U32),
        "llama.attention.causal": (True, BOOL),
    }
    path = rewrite(files["llama"], tmp_path / "other.gguf", keys)
    assert not np.array_equal(decode(path, TOKENS[:5]), ordinary(decode, path, TOKENS[:5]))
    assert np.array_equal(decode(path, TOKENS[:5]), decode(files["llama"], TOKENS[:5]))


def test_somebody_who_watches_sees_every_node(files, ordinary):
    asked = []

    @llama_cpp.ggml_backend_sched_eval_callback
    def watch(tensor, ask, data):
        asked.append(tensor)
        return False

    watched = decode(files["llama"], TOKENS[:5], cb_eval=watch)
    assert np.array_equal(watched, ordinary(decode, files["llama"], TOKENS[:5]))
    assert len(asked) > 5 * 3 * 10  # nodes of three layers


SETTING = """
import io, json, sys
import numpy as np
folder, path, tokens = json.loads(sys.argv[1])
sys.path.insert(0, folder)
from sessions import BF16, Q4_0, decode
file = io.BytesIO()  # a pipe has no position, which np.save asks for
np.save(file, decode(path, tokens))
sys.stdout.buffer.write(file.getvalue())
"""


def with_setting(value, path):
    """Logits from a process of its own, or its last line of errors."""
    tests = Path(__file__).resolve().parents[1]
    arguments = json.dumps([str(tests), str(path), TOKENS[:5]])
    done = subprocess.run(
        [sys.executable, "-c", SETTING, arguments],
        env={**os.environ, "MOBILELLM_KERNELS": value}, capture_output=True, cwd="/",
    )  # fmt: skip
    if done.returncode:
        return done.stderr.decode().splitlines()[-1]
    return np.load(io.BytesIO(done.stdout))


def test_the_setting(files, ordinary):
    path = files["llama"]
    fused = decode(path, TOKENS[:5])
    packed = ordinary(decode, path, TOKENS[:5])
    assert not np.array_equal(fused, packed)
    for value in ("", "1"):
        assert np.array_equal(with_setting(value, path), fused)
    assert np.array_equal(with_setting("pack", path), packed)
    off = with_setting("0", path)
    assert not np.array_equal(off, packed) and distance(off, packed) < NOISE
    for value in ("off", "PACK"):
        error = with_setting(value, path)
        assert error.endswith(f"MOBILELLM_KERNELS is '{value}', not 0, pack or 1"), error
        assert "ModelError" in error
