"""All blocks in one graph node, for one token or many: the same model as the ordinary graph's.

Somebody who watches the nodes gets the ordinary graph: two runs that are equal bit for bit used
the same graph. Single logits differ between any two orders of summation (int8
roundings flip), so models are compared by KL divergence and perplexity, as in test_packed.py.
"""

import ctypes
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from checkpoints import make_checkpoint, make_pro, make_r1
from gguf import GGUFWriter

from mobilellm_cpp import MobileLLM, convert_checkpoint
from mobilellm_cpp.cache import DEMO
from mobilellm_cpp.library import llama_cpp

TRAINING = Path(__file__).resolve().parents[2] / "training"
F32, F16, Q8_0, Q4_0, BF16 = 0, 1, 8, 2, 30  # ggml_type
SHAPE = {"layers": 3, "hidden": 384, "heads": 6, "kv_heads": 2, "ffn": 320, "dtype": "f32"}
NOISE = 0.05  # of such a random model's logits, by flipped roundings; a wrong cell: 0.3 and more
TOKENS = np.random.default_rng(1).integers(3, 512, 90).tolist()


@llama_cpp.ggml_backend_sched_eval_callback
def watch(tensor, ask, data):
    return False


@pytest.fixture
def ordinary(monkeypatch):
    """Calls a function with the fused node left out."""

    def call(function, *arguments, **keywords):
        with monkeypatch.context() as patch:
            patch.setitem(Session.defaults, "cb_eval", watch)
            return function(*arguments, **keywords)

    return call


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Files by name: a plain Llama, layer-shared ones, R1 with a layer without RoPE, Pro."""
    folder = tmp_path_factory.mktemp("fused")
    plain = make_checkpoint(folder / "plain", **SHAPE)
    convert_checkpoint(plain, folder / "llama.gguf", type="q8_0")
    convert_checkpoint(plain, folder / "q4_0.gguf", type="q4_0")
    convert_checkpoint(plain, folder / "shared.gguf", type="q4_0", schedule="immediate")
    convert_checkpoint(plain, folder / "reverse.gguf", type="q8_0", schedule="reverse")
    untied = make_checkpoint(folder / "untied", **SHAPE, tied=False, vocab=519)
    convert_checkpoint(untied, folder / "untied.gguf", type="q8_0")
    # an output matrix of another type, which is multiplied by a node of its own
    convert_checkpoint(untied, folder / "f32.gguf", type="f32")
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype, options.output_tensor_type = 7, F16
    names = [str(folder / name).encode() for name in ("f32.gguf", "f16-head.gguf")]
    assert llama_cpp.llama_model_quantize(*names, ctypes.byref(options)) == 0
    r1 = make_r1(folder / "r1", rope=[1, 0, 1], dtype="f32")
    convert_checkpoint(r1, folder / "r1.gguf", type="q8_0")
    pro = make_pro(folder / "pro", sliding=[0, 1, 1], dtype="f32")
    convert_checkpoint(pro, folder / "pro.gguf", type="q8_0")
    return {path.stem: path for path in folder.glob("*.gguf")}


class Session:
    """A context of its own over a loaded model."""

    defaults: ClassVar = {"n_ctx": 256, "n_threads": 1, "n_threads_batch": 1, "flash_attn_type": 1}

    def __init__(self, llm: MobileLLM, **params: object) -> None:
        self.llm = llm
        values = llama_cpp.llama_context_default_params()
        for name, value in {**self.defaults, **params}.items():
            setattr(values, name, value)
        self.ctx = llama_cpp.llama_init_from_model(llm.model, values)
        assert self.ctx
        self.memory = llama_cpp.llama_get_memory(self.ctx)

    def close(self) -> None:
        llama_cpp.llama_free(self.ctx)

    def batch(
        self, tokens: list[tuple[int, int, int]], wanted: list[int] | None = None
    ) -> np.ndarray:
        """Logits of the tokens (token, position, sequence) numbered in `wanted`, or of all."""
        wanted = list(range(len(tokens))) if wanted is None else wanted
        batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for i, (token, position, sequence) in enumerate(tokens):
            batch.token[i], batch.pos[i] = token, position
            batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = 1, sequence, i in wanted
        assert llama_cpp.llama_decode(self.ctx, batch) == 0
        llama_cpp.llama_batch_free(batch)
        logits = llama_cpp.llama_get_logits(self.ctx)
        return np.ctypeslib.as_array(logits, (len(wanted), self.llm.n_vocab())).copy()

    def step(self, token: int, position: int, sequence: int = 0) -> np.ndarray:
        """Logits after one token."""
        return self.batch([(token, position, sequence)])[0]

    def run(self, tokens: list[int], first: int = 0, sequence: int = 0) -> np.ndarray:
        return np.stack([self.step(t, first + i, sequence) for i, t in enumerate(tokens)])

    def whole(self, tokens: list[int], first: int = 0) -> np.ndarray:
        """Logits of all tokens, which are one batch."""
        return self.batch([(token, first + i, 0) for i, token in enumerate(tokens)])

    def prefill(self, tokens: list[int]) -> None:
        """All at once, without logits but the last."""
        array = (llama_cpp.llama_token * len(tokens))(*tokens)
        assert (
            llama_cpp.llama_decode(self.ctx, llama_cpp.llama_batch_get_one(array, len(tokens))) == 0
        )

    def state(self) -> bytes:
        buffer = (ctypes.c_uint8 * llama_cpp.llama_state_seq_get_size(self.ctx, 0))()
        assert llama_cpp.llama_state_seq_get_data(self.ctx, buffer, len(buffer), 0) == len(buffer)
        return bytes(buffer)

    def restore(self, state: bytes) -> None:
        buffer = (ctypes.c_uint8 * len(state)).from_buffer_copy(state)
        assert llama_cpp.llama_state_seq_set_data(self.ctx, buffer, len(state), 0) == len(state)


def load(path: Path, **arguments: object) -> MobileLLM:
    return MobileLLM(path, **{"n_ctx": 256, "n_threads": 1, **arguments})


def decode(path: Path, tokens: list[int] = TOKENS, **params: object) -> np.ndarray:
    session = Session(load(path), **params)
    rows = session.run(tokens)
    session.close()
    return rows


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def distance(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


# -- the demo model, whole --

CACHES = {
    "f16": {},
    "q8_0": {"type_k": Q8_0, "type_v": Q8_0},
    "f32": {"type_k": F32, "type_v": F32, "flash_attn_type": 0},
    "f16-transposed": {"flash_attn_type": 0},
}

# Without our kernels, in a process of its own: packing is decided when a model is loaded.
UPSTREAM = """
import json, sys
import numpy as np
folders, path, questions, caches = json.loads(sys.argv[1])
sys.path[:0] = folders
from test_fused import decode_texts, load
llm = load(path, n_ctx=1024)
texts = []
for messages in questions:
    answer = "".join(llm.stream(messages, temperature=0, max_tokens=40))
    texts.append(llm.chat_tokens(messages) + llm.tokenize(answer.encode(), add_bos=False))
for name, params in caches.items():
    np.save(f"{path}-{name}.npy", decode_texts(llm, texts, params))
print(json.dumps(texts))
"""


def decode_texts(
    llm: MobileLLM, texts: list[list[int]], params: dict, whole: bool = False
) -> np.ndarray:
    session = Session(llm, **params)
    rows = []
    for text in texts:
        llama_cpp.llama_memory_clear(session.memory, True)
        rows.append(session.whole(text) if whole else session.run(text))
    session.close()
    return np.concatenate(rows)


@pytest.fixture(scope="module", params=["q8_0", "q4_0"])
def demo(request, tmp_path_factory):
    """A file of the demo model, and questions with its answers as tokens."""
    path = tmp_path_factory.mktemp("demo") / f"{request.param}.gguf"
    convert_checkpoint(DEMO, path, type=request.param)
    lines = (TRAINING / "heldout.jsonl").read_text().splitlines()
    questions = [json.loads(line)["messages"] for line in lines]
    tests = Path(__file__).resolve().parents[1]
    arguments = json.dumps([[str(tests), str(tests / "engine")], str(path), questions, CACHES])
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
@pytest.mark.parametrize("name", ["llama", "q4_0", "shared", "reverse", "untied", "f16-head", "r1"])
def test_the_same_logits_as_the_ordinary_graph(files, ordinary, name, cache):
    fused = decode(files[name], TOKENS[:50], **CACHES[cache])
    other = ordinary(decode, files[name], TOKENS[:50], **CACHES[cache])
    assert 0 < distance(fused, other) < NOISE


# up to 12 tokens share the rows of matrices among threads, more are taken in chunks of up to 48
@pytest.mark.parametrize("n", [2, 12, 13, 49, 180])
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("name", ["llama", "shared", "untied", "f16-head", "r1"])
def test_batches_have_the_logits_of_the_ordinary_graph(files, ordinary, name, cache, n):
    def run():
        session = Session(load(files[name]), n_ctx=512, **CACHES[cache])
        rows = session.whole((2 * TOKENS)[:n])
        again = session.whole(TOKENS[:n], first=n)
        session.close()
        return np.concatenate([rows, again])

    got, want = run(), ordinary(run)
    far = distance(got, want)
    # states rounded to f16 for the head may come out the same
    assert far < NOISE and (far > 0 or name == "f16-head")
    assert max(map(distance, got, want)) < 3 * NOISE  # single tokens, which are few among many


@pytest.mark.parametrize("n", [5, 12, 30, 90])
def test_threads_change_no_bit_of_a_batch(files, n):
    rows = []
    for n_threads in range(1, 9):
        session = Session(load(files["shared"]), n_threads_batch=n_threads, n_threads=n_threads)
        rows.append(np.concatenate([session.whole(TOKENS[:n]), session.whole(TOKENS[-n:], n)]))
        session.close()
        assert np.array_equal(rows[-1], rows[0]), n_threads


@pytest.mark.parametrize("cache", CACHES)
def test_small_batches_have_the_bits_of_single_tokens(files, cache):
    alone = decode(files["shared"], **CACHES[cache])
    session = Session(load(files["shared"]), **CACHES[cache])
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


# -- sequences, removals, shifts, saved states --


@pytest.mark.parametrize("unified", [False, True])
def test_sequences_do_not_see_each_other(files, unified):
    """Interleaved, each has the very bits that it has alone."""
    texts = [TOKENS[:30], TOKENS[30:60], TOKENS[60:]]
    alone = [decode(files["llama"], text) for text in texts]
    session = Session(load(files["llama"]), n_seq_max=3, kv_unified=unified, n_ctx=768)
    for i in range(30):
        for sequence, text in enumerate(texts):
            assert np.array_equal(session.step(text[i], i, sequence), alone[sequence][i])
    session.close()


@pytest.mark.parametrize("n", [1, 4, 12, 30])
def test_sequences_in_one_batch_do_not_see_each_other(files, n):
    """As many tokens of each, in turn, whose cells lie between those of the others."""
    texts = [TOKENS[:n], TOKENS[30 : 30 + n], TOKENS[60 : 60 + n]]
    alone = []
    for text in texts:
        session = Session(load(files["llama"]))
        alone.append(session.whole(text))
        session.close()
    session = Session(load(files["llama"]), n_seq_max=3, kv_unified=True, n_ctx=768)
    rows = session.batch([(text[i], i, s) for i in range(n) for s, text in enumerate(texts)])
    session.close()
    rows = rows.reshape(n, 3, -1).swapaxes(0, 1)
    assert distance(rows, np.stack(alone)) < NOISE
    if n <= 12:  # more are attended to in blocks of cells, by the place of a cell
        assert np.array_equal(rows, np.stack(alone))


def test_sequences_with_caches_of_their_own_take_the_ordinary_graph(files, ordinary):
    def run():
        session = Session(load(files["llama"]), n_seq_max=2, n_ctx=512)
        rows = session.batch([(TOKENS[i], i, s) for s in (0, 1) for i in range(20)])
        session.close()
        return rows

    assert np.array_equal(run(), ordinary(run))


@pytest.mark.parametrize("cache", CACHES)
def test_removed_and_shifted_cells(files, ordinary, cache):
    def run():
        session = Session(load(files["q4_0"]), **CACHES[cache])
        rows = [session.run(TOKENS[:40])]
        assert llama_cpp.llama_memory_seq_rm(session.memory, 0, 30, -1)  # a prefix is kept
        rows.append(session.run(TOKENS[50:70], first=30))
        assert llama_cpp.llama_memory_seq_rm(session.memory, 0, 4, 14)  # a context shift
        llama_cpp.llama_memory_seq_add(session.memory, 0, 14, -1, -10)
        rows.append(session.run(TOKENS[70:], first=40))
        session.close()
        return np.concatenate(rows)

    assert 0 < distance(run(), ordinary(run)) < NOISE


def test_a_kept_prefix_gives_the_same_bits(files):
    llm = load(files["shared"])
    whole = decode(files["shared"])
    session = Session(llm)
    session.run(TOKENS[:70])
    assert llama_cpp.llama_memory_seq_rm(session.memory, 0, 20, -1)
    assert np.array_equal(session.run(TOKENS[20:40], first=20), whole[20:40])
    session.close()


def test_a_shift_where_the_cache_holds_no_rotated_keys(tmp_path):
    """Heads that do not divide by 64, in a q8_0 cache: upstream dereferenced null."""
    checkpoint = make_checkpoint(tmp_path / "checkpoint", **{**SHAPE, "heads": 4, "kv_heads": 1})
    convert_checkpoint(checkpoint, tmp_path / "96.gguf", type="q8_0")
    rows = []
    for cache in ("f16", "q8_0"):
        session = Session(load(tmp_path / "96.gguf"), **CACHES[cache])
        session.run(TOKENS[:30])
        assert llama_cpp.llama_memory_seq_rm(session.memory, 0, 4, 14)
        llama_cpp.llama_memory_seq_add(session.memory, 0, 14, -1, -10)
        rows.append(session.run(TOKENS[30:40], first=20))
        session.close()
    assert 0 < distance(*rows) < NOISE


@pytest.mark.parametrize("cache", CACHES)
def test_saved_states_pass_between_the_graphs(files, ordinary, cache):
    llm = load(files["q4_0"])

    def saved():
        session = Session(llm, **CACHES[cache])
        session.run(TOKENS[:40])
        state = session.state()
        session.close()
        return state

    def continued(state):
        session = Session(llm, **CACHES[cache])
        session.restore(state)
        rows = session.run(TOKENS[40:60], first=40)
        session.close()
        return rows

    of_fused, of_ordinary = saved(), ordinary(saved)
    assert len(of_fused) == len(of_ordinary) and of_fused != of_ordinary
    want = continued(of_fused)
    assert 0 < distance(continued(of_ordinary), want) < NOISE
    assert 0 < distance(ordinary(continued, of_fused), want) < NOISE


def test_prompts_and_steps_share_a_cache(files, ordinary):
    def run():
        session = Session(load(files["shared"]))
        session.prefill(TOKENS[:50])
        rows = [session.run(TOKENS[50:60], first=50)]
        session.prefill(TOKENS[60:65])
        rows.append(session.run(TOKENS[65:70], first=65))
        session.close()
        return np.concatenate(rows)

    assert 0 < distance(run(), ordinary(run)) < NOISE


# -- what takes the ordinary graph --


def lora_file(path: Path, folder: Path) -> Path:
    rng = np.random.default_rng(3)
    writer = GGUFWriter(folder / "lora.gguf", "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 8.0)
    a, b = rng.normal(size=(4, 384)) * 0.1, rng.normal(size=(384, 4)) * 0.1
    writer.add_tensor("blk.1.attn_q.weight.lora_a", a.astype(np.float32))
    writer.add_tensor("blk.1.attn_q.weight.lora_b", b.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder / "lora.gguf"


def test_lora_takes_the_ordinary_graph_and_leaves_it(files, ordinary, tmp_path):
    llm = load(files["llama"])
    lora = lora_file(files["llama"], tmp_path)
    adapter = llama_cpp.llama_adapter_lora_init(llm.model, str(lora).encode())
    assert adapter

    def run():
        session = Session(llm)
        rows = [session.run(TOKENS[:5])]
        adapters = (llama_cpp.llama_adapter_lora_p_ctypes * 1)(adapter)
        assert not llama_cpp.llama_set_adapters_lora(
            session.ctx, adapters, 1, (ctypes.c_float * 1)(1)
        )
        rows.append(session.run(TOKENS[5:10], first=5))
        assert not llama_cpp.llama_set_adapters_lora(session.ctx, None, 0, None)
        rows.append(session.run(TOKENS[10:15], first=10))
        session.close()
        return rows

    fused, other = run(), ordinary(run)
    assert distance(fused[1], decode(files["llama"])[5:10]) > 0.05  # the adapter does something
    for got, want in zip(fused, other, strict=True):
        assert 0 < distance(got, want) < NOISE


def test_a_control_vector_takes_the_ordinary_graph(files, ordinary):
    llm = load(files["llama"])
    vector = np.random.default_rng(4).normal(size=(2, 384)).astype(np.float32)

    def run():
        session = Session(llm)
        data = vector.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        assert not llama_cpp.llama_set_adapter_cvec(session.ctx, data, vector.size, 384, 1, 2)
        rows = session.run(TOKENS[:10])
        session.close()
        return rows

    assert np.array_equal(run(), ordinary(run))
    assert distance(run(), decode(files["llama"])[:10]) > 0.05


@pytest.mark.parametrize(
    "params",
    [
        {"embeddings": True, "pooling_type": 0},
        {"type_k": BF16, "type_v": BF16},
        {"type_k": Q4_0, "type_v": Q4_0},
        {"rope_scaling_type": 2, "yarn_ext_factor": 1.0, "rope_freq_scale": 0.5},
    ],
    ids=["embeddings", "bf16-cache", "q4_0-cache", "yarn"],
)
def test_requests_that_take_the_ordinary_graph(files, ordinary, params):
    fused = decode(files["llama"], TOKENS[:20], **params)
    assert np.array_equal(fused, ordinary(decode, files["llama"], TOKENS[:20], **params))


def test_linear_rope_scaling_is_fused(files, ordinary):
    params = {"rope_scaling_type": 1, "rope_freq_scale": 0.25, "rope_freq_base": 5e5}
    fused = decode(files["llama"], **params)
    assert distance(fused, decode(files["llama"])) > 0.05
    assert 0 < distance(fused, ordinary(decode, files["llama"], **params)) < NOISE


def test_sliding_windows_take_the_ordinary_graph(files, ordinary):
    assert np.array_equal(decode(files["pro"]), ordinary(decode, files["pro"]))


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
folders, path, tokens = json.loads(sys.argv[1])
sys.path[:0] = folders
from test_fused import decode
file = io.BytesIO()  # a pipe has no position, which np.save asks for
np.save(file, decode(path, tokens))
sys.stdout.buffer.write(file.getvalue())
"""


def with_setting(value, path):
    """Logits from a process of its own, or its last line of errors."""
    tests = Path(__file__).resolve().parents[1]
    arguments = json.dumps([[str(tests), str(tests / "engine")], str(path), TOKENS[:5]])
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
