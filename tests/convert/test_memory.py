"""Anonymous memory does not grow with the model: tensors stream."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from checkpoints import cast, make_checkpoint
from lattices import int4_groups

ROWS, COLUMNS = 32000, 1600
LARGEST = ROWS * COLUMNS * 4 / 2**20  # MB as float32

WORKER = """
import json, sys, threading, time
from mobilellm_cpp.convert import convert_checkpoint
if sys.argv[1] == "bin":
    import torch
    torch.zeros(1)
def memory(key):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(key)) / 1024
before, peak, running = memory("RssAnon"), 0.0, True
resident = memory("VmRSS")
def sample():
    global peak
    while running:
        peak = max(peak, memory("RssAnon"))
        time.sleep(0.001)
sampler = threading.Thread(target=sample)
sampler.start()
convert_checkpoint(sys.argv[2], sys.argv[3], type=sys.argv[4])
running = False
sampler.join()
print(json.dumps([before, peak, memory("VmHWM") - resident]))
"""


@pytest.fixture(scope="module", params=["safetensors", "bin"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file whose embedding dwarfs the rest; untied, so that there are two of them."""
    rows = np.random.default_rng(0).standard_normal((320, COLUMNS), dtype=np.float32)
    embedding = np.tile(cast(rows, "bf16"), (ROWS // 320, 1))
    return make_checkpoint(
        tmp_path_factory.mktemp("memory") / request.param,
        hidden=COLUMNS,
        heads=25,
        kv_heads=5,
        ffn=1024,
        vocab=ROWS,
        tied=False,
        container=request.param,
        tensors={"model.embed_tokens.weight": embedding, "lm_head.weight": embedding[::-1]},
    )


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("kind", ["f16", "q4_0"])
def test_anonymous_memory(kind: str, checkpoint: Path, tmp_path: Path) -> None:
    before, peak, resident = measure(kind, checkpoint, tmp_path)
    apart = before if checkpoint.name == "bin" else 0  # importing torch is not counted
    assert peak - apart < 2 * LARGEST + 150  # what the project promises
    assert peak - before < LARGEST / 4  # what it needs: a few MB for each thread
    if checkpoint.name == "safetensors":
        assert resident < LARGEST / 2  # pages of the mapped file do not pile up


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_searching_for_lattices_streams_too(tmp_path: Path) -> None:
    hidden, ffn = 512, 32768
    rows = int4_groups(np.random.default_rng(0).standard_normal((512, hidden), dtype=np.float32))
    wide = np.tile(cast(rows, "bf16"), (ffn // 512, 1))
    mlp = {"gate_proj": wide, "up_proj": wide, "down_proj": wide.reshape(hidden, ffn)}
    checkpoint = make_checkpoint(
        tmp_path / "safetensors",
        layers=1,
        hidden=hidden,
        ffn=ffn,
        tensors={f"model.layers.0.mlp.{part}.weight": array for part, array in mlp.items()},
    )
    before, peak, resident = measure("exact", checkpoint, tmp_path)
    largest = wide.size * 4 / 2**20
    assert peak - before < largest / 4
    assert resident < largest / 2


def measure(kind: str, checkpoint: Path, folder: Path) -> list[float]:
    """Anonymous memory before and at its peak, and what the resident set grew by, in MB."""
    command = [sys.executable, "-c", WORKER, checkpoint.name, str(checkpoint)]
    done = subprocess.run(
        [*command, str(folder / "m.gguf"), kind], capture_output=True, text=True, cwd=folder
    )
    assert done.returncode == 0, done.stderr[-2000:]
    numbers: list[float] = json.loads(done.stdout)
    return numbers
