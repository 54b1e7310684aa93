"""All blocks in one graph node, for one token or many: the same model as the ordinary graph's.

Somebody who watches the nodes gets the ordinary graph: two runs that are equal bit for bit used
the same graph. Single logits differ between any two orders of summation (int8
roundings flip), so models are compared by KL divergence and perplexity, as in test_packed.py.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from sessions import CACHES, NOISE, TOKENS, Session, decode, decode_texts, distance, load

from mobilellm_cpp import convert_checkpoint
from mobilellm_cpp.cache import DEMO
from mobilellm_cpp.engine.library import llama_cpp

# -- the demo model, whole --

TRAINING = Path(__file__).resolve().parents[2] / "training"

# Without our kernels, in a process of its own: packing is decided when a model is loaded.
UPSTREAM = """
import json, sys
import numpy as np
folder, path, questions, caches = json.loads(sys.argv[1])
sys.path.insert(0, folder)
from sessions import decode_texts, load
llm = load(path, n_ctx=1024)
texts = []
for messages in questions:
    answer = "".join(llm.stream(messages, temperature=0, max_tokens=40))
    texts.append(llm.chat_tokens(messages) + llm.tokenize(answer.encode(), add_bos=False))
for name, params in caches.items():
    np.save(f"{path}-{name}.npy", decode_texts(llm, texts, params))
print(json.dumps(texts))
"""


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


@pytest.fixture(scope="module", params=["q8_0", "q4_0"])
def demo(request, tmp_path_factory):
    """A file of the demo model, and questions with its answers as tokens."""
    path = tmp_path_factory.mktemp("demo") / f"{request.param}.gguf"
    convert_checkpoint(DEMO, path, type=request.param)
    lines = (TRAINING / "heldout.jsonl").read_text().splitlines()
    questions = [json.loads(line)["messages"] for line in lines]
    tests = Path(__file__).resolve().parents[1]
    arguments = json.dumps([str(tests), str(path), questions, CACHES])
    done = subprocess.run(
        [sys.executable, "-c", UPSTREAM, arguments],
        env={**os.environ, "MOBILELLM_KERNELS": "0"}, capture_output=True, text=True, cwd="/",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return path, json.loads(done.stdout)


@pytest.mark.parametrize("whole", [False, True], ids=["steps", "batches"])
@pytest.mark.parametrize("cache", CACHES)
def test_the_demo_model_says_the_same(demo, cache, whole):
    """Against upstream's own kernels and graph."""
    path, texts = demo
    fused = log_softmax(decode_texts(load(path), texts, CACHES[cache], whole))
    off = log_softmax(np.load(f"{path}-{cache}.npy"))
    assert not np.array_equal(fused, off)
    noise = np.abs(fused - off).max(-1)
    assert (np.exp(off) * (off - fused)).sum(-1).mean() <= 1e-4

    follows = np.concatenate([np.arange(len(t)) < len(t) - 1 for t in texts])
    targets = np.concatenate([[*t[1:], 0] for t in texts])
    surprise = [-logs[np.arange(len(targets)), targets][follows].mean() for logs in (fused, off)]
    assert follows.sum() > 1500
    assert abs(np.exp(surprise[0] - surprise[1]) - 1) <= 1e-3

    # greedy tokens: another one only where the two best are closer than the two runs are
    second, best = np.sort(off, -1)[:, -2:].T
    differ = fused.argmax(-1) != off.argmax(-1)
    assert np.all((best - second)[differ] <= 2 * noise[differ])
    assert differ.mean() < 0.01


# -- every model, cache and thread count --


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize(
    "name",
    ["llama", "q4_0", "shared", "reverse", "untied", "f32", "f16", "bf16", "f16-head", "r1", "pro"],
)
def test_the_same_logits_as_the_ordinary_graph(files, ordinary, name, cache):
    fused = decode(files[name], TOKENS[:50], **CACHES[cache])
    other = ordinary(decode, files[name], TOKENS[:50], **CACHES[cache])
    assert 0 < distance(fused, other) < NOISE


# up to 12 tokens share the rows of matrices among threads, more are taken in chunks of up to 48
@pytest.mark.parametrize("n", [2, 12, 13, 49, 180])
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("name", ["llama", "shared", "untied", "f16", "f16-head", "r1", "pro"])
def test_batches_have_the_logits_of_the_ordinary_graph(files, ordinary, name, cache, n):
    def run():
        session = Session(load(files[name]), n_ctx=512, **CACHES[cache])
        rows = session.whole((2 * TOKENS)[:n])
        again = session.whole(TOKENS[:n], first=n)
        session.close()
        return np.concatenate([rows, again])

    got, want = run(), ordinary(run)
    assert 0 < distance(got, want) < NOISE
    assert max(map(distance, got, want)) < 3 * NOISE  # single tokens, which are few among many


@pytest.mark.parametrize("name", ["shared", "bf16"])
@pytest.mark.parametrize("n", [5, 12, 30, 90])
def test_threads_change_no_bit_of_a_batch(files, name, n):
    rows = []
    for n_threads in range(1, 9):
        session = Session(load(files[name]), n_threads_batch=n_threads, n_threads=n_threads)
        rows.append(np.concatenate([session.whole(TOKENS[:n]), session.whole(TOKENS[-n:], n)]))
        session.close()
        assert np.array_equal(rows[-1], rows[0]), n_threads


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("name", ["shared", "f16", "f16-head"])
def test_small_batches_have_the_bits_of_single_tokens(files, name, cache):
    alone = decode(files[name], **CACHES[cache])
    session = Session(load(files[name]), **CACHES[cache])
    for first in range(0, 90, 10):
        rows = session.whole(TOKENS[first : first + 10], first)
        assert np.array_equal(rows, alone[first : first + 10])
    session.close()


def test_how_a_prompt_is_cut_changes_no_bit(files):
    """As long as the pieces have more than 12 tokens."""
    llm = load(files["llama"])
    rows = []
    for pieces in ([90], [13, 77], [40, 50], [50, 40]):
        session = Session(llm, n_ubatch=77)
        first = np.cumsum([0, *pieces])
        rows.append([session.whole(TOKENS[a:b], a) for a, b in zip(first, first[1:], strict=False)])
        session.close()
        assert np.array_equal(np.concatenate(rows[-1]), np.concatenate(rows[0]))


@pytest.mark.parametrize("n", [10, 90])
def test_only_the_logits_that_are_wanted(files, n):
    session = Session(load(files["llama"]))
    every = session.whole(TOKENS[:n])
    tokens = [(token, i, 0) for i, token in enumerate(TOKENS[:n])]
    for wanted in ([n - 1], [0], [1, 3, n // 2]):
        llama_cpp.llama_memory_clear(session.memory, True)
        assert np.array_equal(session.batch(tokens, wanted), every[wanted])
    # a batch without any still fills the cache
    llama_cpp.llama_memory_clear(session.memory, True)
    session.batch(tokens[: n // 2], [])
    rest = session.batch(tokens[n // 2 :])
    if n // 2 > 12 or n <= 12:
        assert np.array_equal(rest, every[n // 2 :])
    session.close()


@pytest.mark.parametrize("cache", CACHES)
def test_threads_change_no_bit(files, cache):
    session = Session(load(files["shared"]), **CACHES[cache])
    session.prefill(TOKENS[:70])
    state = session.state()
    one = session.run(TOKENS[70:80], first=70)
    session.close()
    for n in range(2, 9):
        session = Session(load(files["shared"]), n_threads=n, **CACHES[cache])
        session.restore(state)
        assert np.array_equal(session.run(TOKENS[70:80], first=70), one), n
        session.close()


def test_threads_change_between_steps(files):
    one = decode(files["llama"])
    session = Session(load(files["llama"]))
    for i, token in enumerate(TOKENS[:40]):
        llama_cpp.llama_set_n_threads(session.ctx, 1 + i % 5, 1)
        assert np.array_equal(session.step(token, i), one[i])
    session.close()


def test_a_long_context(files, ordinary):
    """Past 2048 cells."""
    prompt = np.random.default_rng(2).integers(3, 512, 2100).tolist()

    def run():
        session = Session(load(files["llama"]), n_ctx=4096, n_batch=4096)
        session.prefill(prompt)
        rows = session.run(TOKENS[:12], first=len(prompt))
        session.close()
        return rows

    assert 0 < distance(run(), ordinary(run)) < NOISE
