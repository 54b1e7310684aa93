"""The reference holds one block at a time."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoints import make_checkpoint

LAYERS, HIDDEN, FFN, VOCAB = 10, 512, 4096, 32000
BLOCK = (3 * HIDDEN * FFN + 4 * HIDDEN * HIDDEN) * 4 / 2**20  # MB as float32
EMBEDDING = VOCAB * HIDDEN * 4 / 2**20

WORKER = """
import json, sys, threading, time
from mobilellm_cpp.convert.checkpoint import open_checkpoint
from mobilellm_cpp.convert.reference import Reference, torch
torch.set_num_threads(1)
torch.zeros(64, 64) @ torch.zeros(64, 64)  # what torch needs by itself
def memory(key):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(key)) / 1024
before, resident, peak, running = memory("RssAnon"), memory("VmRSS"), 0.0, True
def sample():
    global peak
    while running:
        peak = max(peak, memory("RssAnon"))
        time.sleep(0.001)
sampler = threading.Thread(target=sample)
sampler.start()
Reference(open_checkpoint(sys.argv[1])).logits([1, 2, 3, 4], [3])
running = False
sampler.join()
print(json.dumps([peak - before, memory("VmHWM") - resident]))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_memory(tmp_path):
    sizes = {"layers": LAYERS, "hidden": HIDDEN, "heads": 8, "kv_heads": 8, "ffn": FFN}
    checkpoint = make_checkpoint(tmp_path / "m", vocab=VOCAB, dtype="f16", **sizes)
    command = [sys.executable, "-c", WORKER, str(checkpoint)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    anonymous, resident = json.loads(done.stdout)
    # of 290 MB in all: a block, and a part of what is read at the moment
    assert BLOCK < anonymous < 2 * BLOCK
    assert resident < 2 * BLOCK + 16 < (LAYERS * BLOCK + EMBEDDING) / 4
