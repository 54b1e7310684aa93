"""Every packed type, and several of them in one block: in the fused node, and the same model as
upstream's kernels make of the file."""

import ctypes
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from checkpoints import make_checkpoint
from sessions import NOISE, TOKENS, Session, decode, distance, load

from mobilellm_cpp import convert_checkpoint
from mobilellm_cpp.engine.gguf_file import open_gguf
from mobilellm_cpp.engine.library import llama_cpp

# llama_ftype; `pure`: all matrices, the tied embedding too, are of the type.
TYPES = {"q4_1": 3, "q5_0": 8, "q5_1": 9, "q3_K": 11, "q4_K": 14, "q5_K": 16, "q6_K": 18}
TYPES |= {"iq4_nl": 25, "iq4_xs": 30}
Q4_K_M = 15
OTHERS = {"attn_k": 8, "ffn_up": 20, "ffn_gate": 6}  # Q8_0, IQ4_NL, Q5_0
SHAPE = {"layers": 2, "hidden": 256, "heads": 4, "kv_heads": 2, "ffn": 512, "dtype": "f32"}

# Logits of files without our kernels, which are packed, or not, once a process.
UPSTREAM = """
import json, sys
import numpy as np
folder, paths = json.loads(sys.argv[1])
sys.path.insert(0, folder)
from sessions import decode
for path in paths:
    np.save(path + ".npy", decode(path))
"""

pytestmark = pytest.mark.skipif(
    not re.search(r"\bavx2\b", Path("/proc/cpuinfo").read_text())
    if Path("/proc/cpuinfo").exists()
    else True,
    reason="only x86 has kernels for all of these types",
)


def quantize(source: Path, target: Path, ftype: int, others: dict[str, int] | None = None) -> None:
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype, options.nthread, options.pure = ftype, 1, others is None
    overrides = [(f"{name}\\.weight".encode(), kind) for name, kind in (others or {}).items()]
    array = (llama_cpp.llama_model_tensor_override * (len(overrides) + 1))(*overrides)
    options.tt_overrides = array
    names = (str(source).encode(), str(target).encode())
    assert llama_cpp.llama_model_quantize(*names, ctypes.byref(options)) == 0


@pytest.fixture(scope="module")
def typed(tmp_path_factory) -> dict[str, Path]:
    """A small random model by type, each with upstream's logits beside it."""
    folder = tmp_path_factory.mktemp("types")
    source = folder / "f32"
    convert_checkpoint(make_checkpoint(folder / "checkpoint", **SHAPE), source, type="f32")
    files = {name: folder / f"{name}.gguf" for name in [*TYPES, "mixed"]}
    for name, ftype in TYPES.items():
        quantize(source, files[name], ftype)
    quantize(source, files["mixed"], Q4_K_M, OTHERS)
    tests = Path(__file__).resolve().parents[1]
    arguments = json.dumps([str(tests), [str(path) for path in files.values()]])
    done = subprocess.run(
        [sys.executable, "-c", UPSTREAM, arguments],
        env={**os.environ, "MOBILELLM_KERNELS": "0"}, capture_output=True, text=True, cwd="/",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return files


def matrices(path: Path) -> set[str]:
    """The types of a file's matrices."""
    with open_gguf(path) as file:
        return {tensor.type for tensor in file.tensors()} - {"f32"}


@pytest.mark.parametrize("name", [*TYPES, "mixed"])
def test_the_model_says_what_upstream_makes_of_the_file(typed, ordinary, name):
    mixed = {"q4_K", "q6_K", "q8_0", "iq4_nl", "q5_0"}
    assert matrices(typed[name]) == ({name} if name in TYPES else mixed)
    want = np.load(f"{typed[name]}.npy")
    got = decode(typed[name])
    assert 0 < distance(got, want) < NOISE
    # the ordinary graph over the same packed weights: equal bits would be the same graph
    assert 0 < distance(got, ordinary(decode, typed[name])) < NOISE
    session = Session(load(typed[name]))
    assert distance(session.whole(TOKENS), want) < NOISE  # all at once, by other tiles
    session.close()
