"""Packed weights: the same model as with MOBILELLM_KERNELS=0, whatever is done with it.

Single logits differ between any two orders of summation, since activations are rounded to 8 bits
and a last bit decides some roundings: models are compared by KL divergence and perplexity.
"""

import ctypes
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from batches import decode
from checkpoints import make_checkpoint
from gguf import GGUFWriter

import mobilellm_cpp
from mobilellm_cpp import MobileLLM, convert_checkpoint
from mobilellm_cpp.engine.gguf_file import open_gguf
from mobilellm_cpp.engine.library import llama_cpp

DEMO = Path(mobilellm_cpp.__file__).parent / "demo"
TESTS = Path(__file__).resolve().parents[1]
TRAINING = TESTS.parent / "training"
Q2_0 = 41  # llama_ftype
NOISE = 0.05  # of the logits of a random model, from rounding activations to 8 bits; wrong ones: 1
SHAPE = {"layers": 2, "hidden": 192, "heads": 3, "kv_heads": 1, "ffn": 320, "dtype": "f32"}

TOKENS = np.random.default_rng(1).integers(3, 512, 70).tolist()
STEPS = [1, 2, 3, 4, 5, 8, 1, 13, 33]  # tokens at a time

ON = {k: v for k, v in os.environ.items() if k != "MOBILELLM_KERNELS"}
OFF = {**ON, "MOBILELLM_KERNELS": "0"}

pytestmark = pytest.mark.skipif(
    not re.search(r"\bavx2\b", Path("/proc/cpuinfo").read_text())
    if Path("/proc/cpuinfo").exists()
    else True,
    reason="only AVX2 has kernels",
)


HEAD = """
import json, sys, numpy as np
from mobilellm_cpp import MobileLLM
arguments = json.loads(sys.argv[1])
"""


def run(script: str, arguments: object, env: dict[str, str] = ON) -> str:
    """What a script with json, sys, np, MobileLLM and its `arguments` prints to stdout."""
    command = [sys.executable, "-c", HEAD + script, json.dumps(arguments)]
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
        for line in (TRAINING / "heldout.jsonl").read_text().splitlines()
    ]
    texts = [json.loads(line) for line in run(ANSWERS, [path, questions], OFF).splitlines()]
    for name, env in (("on.npy", ON), ("off.npy", OFF)):
        run(LOGITS, [path, texts, str(tmp_path / name)], env)
    on, off = (log_softmax(np.load(tmp_path / name)) for name in ("on.npy", "off.npy"))
    assert not np.array_equal(on, off)  # else nothing was packed
    assert (np.exp(off) * (off - on)).sum(1).mean() <= 1e-4

    targets = np.concatenate([text[1:] for text in texts])
    rows = np.arange(len(targets))
    assert len(targets) > 1800
    surprise = [-logs[rows, targets].mean() for logs in (on, off)]
    assert abs(np.exp(surprise[0] - surprise[1]) - 1) <= 1e-3


@pytest.fixture(scope="module", params=["q8_0", "q4_0", "q2_0", "bf16"])
def path(request, tmp_path_factory) -> str:
    """A small random model with 2.5 groups of 16 rows in its K and V."""
    folder = tmp_path_factory.mktemp("packed")
    checkpoint = make_checkpoint(folder / "c", **SHAPE)
    target = folder / f"{request.param}.gguf"
    if request.param != "q2_0":
        convert_checkpoint(checkpoint, target, type=request.param)
        return str(target)
    convert_checkpoint(checkpoint, folder / "f32.gguf", type="f32")
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread = Q2_0, 1
    source = str(folder / "f32.gguf").encode()
    assert llama_cpp.llama_model_quantize(source, str(target).encode(), ctypes.byref(params)) == 0
    return str(target)


def model(folder: Path, kind: str, **shape) -> Path:
    checkpoint = make_checkpoint(folder / "c", **{**SHAPE, **shape})
    convert_checkpoint(checkpoint, folder / "m.gguf", type=kind)
    return folder / "m.gguf"


def load(path: str, **arguments) -> MobileLLM:
    return MobileLLM(path, **{"n_ctx": 256, "n_threads": 1, **arguments})


def in_steps(llm: MobileLLM, steps: list[int]) -> np.ndarray:
    """Logits of TOKENS, decoded so many at a time."""
    rows, first = [], 0
    for n in steps:
        rows.append(
            decode(llm, [(t, first + i, 0) for i, t in enumerate(TOKENS[first : first + n])])
        )
        first += n
    assert first == len(TOKENS)
    return np.concatenate(rows)


IN_STEPS = """
import sys
sys.path.insert(0, arguments["tests"])
from batches import decode
llm = MobileLLM(arguments["path"], n_ctx=256, n_threads=1, lora_path=arguments.get("lora"))
rows, first, tokens = [], 0, arguments["tokens"]
for n in arguments["steps"]:
    rows.append(decode(llm, [(tokens[i], i, 0) for i in range(first, first + n)]))
    first += n
np.save(arguments["out"], np.concatenate(rows))
"""


def unpacked(path: str, folder: Path, lora: str | None = None) -> np.ndarray:
    """Logits of TOKENS in STEPS, from upstream's own kernels."""
    arguments = {"path": path, "tokens": TOKENS, "steps": STEPS, "out": str(folder / "off.npy")}
    run(IN_STEPS, {**arguments, "tests": str(TESTS), "lora": lora}, OFF)
    return np.load(folder / "off.npy")


def distance(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def buffers(path: str) -> dict[str, float]:
    """MiB of weights in each type of buffer, as the loader says."""
    script = "MobileLLM(arguments, n_threads=1, n_ctx=64, verbose=True)"
    log = subprocess.run(
        [sys.executable, "-c", HEAD + script, json.dumps(path)],
        env=ON, capture_output=True, text=True, cwd="/",
    ).stderr  # fmt: skip
    found = re.findall(r"(\w+) model buffer size = +([\d.]+) MiB", log)
    assert found, log[-2000:]
    return {name: float(size) for name, size in found}


def test_any_number_of_tokens_at_a_time(path, tmp_path):
    got = in_steps(load(path), STEPS)
    assert 0 < distance(got, unpacked(path, tmp_path)) < NOISE
    # prompts end in other kernels for attention, not for weights
    assert distance(in_steps(load(path), [len(TOKENS)]), got) < NOISE


def test_threads_change_no_bit(path):
    one = in_steps(load(path), STEPS)
    for n in range(2, 9):
        assert np.array_equal(in_steps(load(path, n_threads=n), STEPS), one), f"{n} threads"


def test_threads_change_at_run_time(path):
    one = in_steps(load(path), STEPS)
    llm = load(path)
    rows, first = [], 0
    for n, threads in zip(STEPS, [1, 4, 2, 3, 1, 2, 5, 1, 3], strict=False):
        llama_cpp.llama_set_n_threads(llm.ctx, threads, threads)
        rows.append(
            decode(llm, [(t, first + i, 0) for i, t in enumerate(TOKENS[first : first + n])])
        )
        first += n
    assert np.array_equal(np.concatenate(rows), one[:first])


def test_mapped_or_read(path):
    assert np.array_equal(in_steps(load(path, use_mmap=False), STEPS), in_steps(load(path), STEPS))


def test_state_is_saved_and_restored(path):
    llm = load(path)
    llm.eval(TOKENS[:40])
    state = llm.save_state()
    other = load(path)
    other.load_state(state)
    for i in range(40, 50):
        entry = [(TOKENS[i], i, 0)]
        assert np.array_equal(decode(llm, entry), decode(other, entry))


def test_the_tied_embedding_is_packed_once(path):
    with open_gguf(path) as file:
        matrices = [t for t in file.tensors() if "norm" not in t.name]
    once = sum(tensor.n_bytes for tensor in matrices) / 2**20
    # Q2_0 pads the scales of a group
    assert once - 0.01 <= buffers(path)["CPU_MOBILELLM"] <= 1.1 * once
    embedding = next(t.n_bytes for t in matrices if t.name == "token_embd.weight") / 2**20
    assert embedding > 0.12 * once


MAPPED = """
import re
llm = MobileLLM(arguments, n_threads=1, n_ctx=64)
maps = open("/proc/self/smaps").read()
found = re.findall(re.escape(arguments) + r"\\n(?:.*\\n){1,3}?Rss: +(\\d+) kB", maps)
assert len(found) == 1, maps
print(found[0])
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/smaps"), reason="reads Linux's /proc")
def test_mapped_pages_are_given_back(tmp_path):
    path = model(tmp_path, "q8_0", hidden=512, heads=8, kv_heads=2, ffn=1024)
    assert int(run(MAPPED, str(path))) * 1024 < 0.3 * path.stat().st_size
    assert int(run(MAPPED, str(path), OFF)) * 1024 > 0.9 * path.stat().st_size


FEW_THREADS = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>

int get_nprocs(void) { return 8; }

int pthread_create(pthread_t * t, const pthread_attr_t * a, void * (*f)(void *), void * x) {
    static atomic_int n;
    int (*real)(pthread_t *, const pthread_attr_t *, void * (*) (void *), void *) =
        dlsym(RTLD_NEXT, "pthread_create");
    const char * limit = getenv("MAX_THREADS");
    return limit && n++ >= atoi(limit) ? EAGAIN : real(t, a, f, x);
}
"""

LOGITS_OF_ONE_THREAD = """
import ctypes
path, limit, tokens, out = arguments
ctypes.CDLL(None).setenv(b"MAX_THREADS", limit.encode(), 1)
np.save(out, MobileLLM(path, n_threads=1, n_ctx=64).logits(tokens))
"""


@pytest.mark.skipif(sys.platform != "linux" or not shutil.which("cc"), reason="needs LD_PRELOAD")
def test_a_system_that_gives_no_more_threads(tmp_path):
    """Packing goes on with those there are: a crash once, when the second could not be started."""
    path = str(model(tmp_path, "q8_0", hidden=640, heads=10, kv_heads=5, ffn=2048, vocab=4096))
    source, library = tmp_path / "few.c", tmp_path / "few.so"
    source.write_text(FEW_THREADS)
    subprocess.run(["cc", "-shared", "-fPIC", str(source), "-o", str(library), "-ldl"], check=True)
    rows = []
    for limit in ("0", "1", "3", "1000"):
        out = tmp_path / f"{limit}.npy"
        arguments = [path, limit, TOKENS[:20], str(out)]
        run(LOGITS_OF_ONE_THREAD, arguments, {**ON, "LD_PRELOAD": str(library)})
        rows.append(np.load(out))
    assert all(np.array_equal(row, rows[-1]) for row in rows[:-1])


def test_an_untied_head_and_odd_vocabulary(tmp_path):
    path = str(model(tmp_path, "q8_0", tied=False, vocab=519))
    got = in_steps(load(path), STEPS)
    assert got.shape[1] == 519
    assert 0 < distance(got, unpacked(path, tmp_path)) < NOISE


@pytest.mark.parametrize("kind", ["f16", "q8_0"])
def test_other_widths_are_left_to_upstream(kind, tmp_path):
    path = str(model(tmp_path, kind, hidden=96))
    assert "CPU_MOBILELLM" in buffers(path)  # ffn_down is 320 wide
    got = in_steps(load(path), STEPS)
    assert distance(got, unpacked(path, tmp_path)) < (NOISE if kind == "q8_0" else 1e-3)


def test_lora(path, tmp_path):
    rng = np.random.default_rng(3)
    lora = tmp_path / "lora.gguf"
    with open_gguf(path) as file:
        architecture = file.get("general.architecture")
    writer = GGUFWriter(lora, architecture)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 8.0)
    for name, n_in, n_out in [("attn_q", 192, 192), ("ffn_down", 320, 192)]:
        a, b = rng.normal(size=(4, n_in)) * 0.1, rng.normal(size=(n_out, 4)) * 0.1
        writer.add_tensor(f"blk.1.{name}.weight.lora_a", a.astype(np.float32))
        writer.add_tensor(f"blk.1.{name}.weight.lora_b", b.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    got = in_steps(load(path, lora_path=str(lora)), STEPS)
    assert distance(got, in_steps(load(path), STEPS)) > 0.1
    assert 0 < distance(got, unpacked(path, tmp_path, str(lora))) < NOISE


def mmapped(path: Path) -> dict[str, bytes]:
    """Each tensor's bytes (gguf-py's reader does not know Q2_0)."""
    data = path.read_bytes()
    with open_gguf(path) as file:
        start = len(data)
        found = {}
        for tensor in reversed(file.tensors()):  # in file order, each padded to 32
            start -= -(-tensor.n_bytes // 32) * 32
            found[tensor.name] = data[start : start + tensor.n_bytes]
    return found


def test_weights_can_be_read_back(path, tmp_path):
    """llama_model_save_to_file asks the buffer for every tensor."""
    llm = load(path)
    copy = tmp_path / "copy.gguf"
    llama_cpp.llama_model_save_to_file(llm.model, str(copy).encode())
    source, target = (mmapped(p) for p in (Path(path), copy))
    assert source.keys() == target.keys()
    assert source == target
