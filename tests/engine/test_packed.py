"""Packed weights: the same model as with MOBILELLM_KERNELS=0, whatever is done with it.

Single logits differ between any two orders of summation, since activations are rounded to 8 bits
and a last bit decides some roundings: models are compared by KL divergence and perplexity.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from checkpoints import make_checkpoint
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, quantize
from peer import assert_same_tensors, greedy

import mobilellm_cpp
from mobilellm_cpp import MobileLLM, convert_checkpoint, library
from mobilellm_cpp.library import llama_cpp

DEMO = Path(mobilellm_cpp.__file__).parent / "demo"
QUESTIONS = Path(__file__).resolve().parents[2] / "training"
SHAPE = {"layers": 2, "hidden": 192, "heads": 3, "kv_heads": 1, "ffn": 320, "dtype": "f32"}

ON = {k: v for k, v in os.environ.items() if k != "MOBILELLM_KERNELS"}
OFF = {**ON, "MOBILELLM_KERNELS": "0"}

pytestmark = pytest.mark.skipif(
    not re.search(r"\bavx2\b", Path("/proc/cpuinfo").read_text())
    if Path("/proc/cpuinfo").exists()
    else True,
    reason="only AVX2 has kernels",
)


def run(script: str, arguments: object, env: dict[str, str] = ON) -> str:
    """What a script with json, sys, np, MobileLLM and its `arguments` prints to stdout."""
    head = "import json, sys, numpy as np\nfrom mobilellm_cpp import MobileLLM\n"
    head += "arguments = json.loads(sys.argv[1])\n"
    command = [sys.executable, "-c", head + script, json.dumps(arguments)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


LOGITS = """
path, texts, out = arguments
llm = MobileLLM(path, n_threads=1, n_ctx=1024)
np.save(out, np.concatenate([llm.logits(text)[:-1] for text in texts]))
"""

ANSWERS = """
path, questions = arguments
llm = MobileLLM(path, n_threads=1, n_ctx=1024)
for messages in questions:
    answer = "".join(llm.stream(messages, temperature=0, max_tokens=40))
    tokens = llm.chat_tokens(messages) + llm.tokenize(answer.encode(), add_bos=False)
    print(json.dumps(tokens))
"""


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(1, keepdims=True))


@pytest.mark.parametrize("kind", ["q8_0", "q4_0"])
def test_the_demo_model_says_the_same(kind, tmp_path):
    path = str(tmp_path / "m.gguf")
    convert_checkpoint(DEMO, path, type=kind)
    questions = [
        json.loads(line)["messages"]
        for name in ("dev.jsonl", "heldout.jsonl")
        for line in (QUESTIONS / name).read_text().splitlines()
    ]
    texts = [json.loads(line) for line in run(ANSWERS, [path, questions], OFF).splitlines()]
    for name, env in (("on.npy", ON), ("off.npy", OFF)):
        run(LOGITS, [path, texts, str(tmp_path / name)], env)
    on, off = (log_softmax(np.load(tmp_path / name)) for name in ("on.npy", "off.npy"))
    assert not np.array_equal(on, off)  # else nothing was packed
    assert (np.exp(off) * (off - on)).sum(1).mean() <= 1e-4

    targets = np.concatenate([text[1:] for text in texts])
    rows = np.arange(len(targets))
    assert len(targets) > 2000
    surprise = [-logs[rows, targets].mean() for logs in (on, off)]
    assert abs(np.exp(surprise[0] - surprise[1]) - 1) <= 1e-3


def model(folder: Path, kind: str, **shape) -> Path:
    checkpoint = make_checkpoint(folder / "c", **{**SHAPE, **shape})
    convert_checkpoint(checkpoint, folder / f"{kind}.gguf", type=kind)
    return folder / f"{kind}.gguf"


def as_q2_0(source: Path, target: Path) -> Path:
    """A copy of an f32 file with the matrices of its blocks as Q2_0."""
    # gguf-py has no Q2_0 writer: block 64, fp16 scale, codes -1, 0, 1, 2 in pairs of bits
    reader = GGUFReader(source)
    writer = GGUFWriter(target, "llama")
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name == "general.architecture":
            continue
        value = field.contents()
        sub = field.types[-1] if len(field.types) > 1 else None
        writer.add_key_value(field.name, value, field.types[0], sub)
    for tensor in reader.tensors:
        if len(tensor.shape) != 2 or not tensor.name.startswith("blk."):
            writer.add_tensor(tensor.name, tensor.data)
            continue
        weights = np.array(tensor.data, np.float32).reshape(-1, 64)
        scale = np.abs(weights).mean(1).astype(np.float16)
        codes = np.clip(np.rint(weights / scale[:, None].astype(np.float32)), -1, 2) + 1
        bits = codes.astype(np.uint8).reshape(-1, 16, 4) << np.array([0, 2, 4, 6], np.uint8)
        blocks = np.concatenate(
            [scale.view(np.uint8).reshape(-1, 2), bits.sum(2).astype(np.uint8)], 1
        )
        rows = blocks.reshape(tensor.data.shape[0], -1)
        writer.add_tensor(tensor.name, rows, raw_dtype=GGMLQuantizationType(42))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target
