"""Many tokens of several sequences in the fused node, which share products of matrices: each
sequence has the very bits that it has alone."""

import numpy as np
import pytest
from batches import decode
from sessions import CACHES, NOISE, TOKENS, Session, distance, load

from mobilellm_cpp.engine.inherited import MEAN, pooled
from mobilellm_cpp.engine.library import llama_cpp

LENGTHS = [13, 30, 14, 47, 20, 90]  # neither their ends nor those of chunks meet


@pytest.fixture(scope="module")
def texts():
    return [TOKENS[-n:] for n in LENGTHS]


def entries(texts):
    return [(token, i, s) for s, text in enumerate(texts) for i, token in enumerate(text)]


def each_alone(llm, texts, **params):
    rows = []
    for text in texts:
        session = Session(llm, **params)
        rows.append(session.whole(text))
        session.close()
    return np.concatenate(rows)


def together(llm, texts, wanted=None, **params):
    several = {"n_seq_max": len(texts), "kv_unified": True, "n_ctx": 768}
    session = Session(llm, **{**several, **params})
    rows = session.batch(entries(texts), wanted)
    session.close()
    return rows


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("name", ["llama", "shared", "f16", "r1", "pro"])
def test_prompts(files, texts, name, cache):
    llm = load(files[name])
    alone = each_alone(llm, texts, **CACHES[cache])
    for n_threads in (1, 3):
        threads = {"n_threads": n_threads, "n_threads_batch": n_threads}
        assert np.array_equal(together(llm, texts, **threads, **CACHES[cache]), alone)


def test_a_cache_for_each(files, texts):
    llm, equal = load(files["pro"]), [text[:13] for text in texts]
    alone = each_alone(llm, equal)
    assert np.array_equal(together(llm, equal, kv_unified=False, n_ctx=6 * 256), alone)


@pytest.mark.parametrize("name", ["llama", "pro"])
def test_what_some_tokens_give(files, texts, name):
    """The last layer computes those alone: none of a chunk, single ones, and some in a row."""
    llm = load(files[name])
    ends = (np.cumsum(LENGTHS) - 1).tolist()
    alone = each_alone(llm, texts)
    for wanted in (ends, ends[-1:], [0, 3, 4, 5, 20, 21, 60, 150, 213], [5]):
        assert np.array_equal(together(llm, texts, wanted), alone[wanted]), wanted


@pytest.mark.parametrize("name", ["llama", "shared", "pro"])
def test_a_token_of_each(files, ordinary, name):
    """More sequences than chunks hold tokens, in three steps; their order changes no bit."""
    llm, n = load(files[name]), 80

    def run(order):
        params = {"n_seq_max": n, "kv_unified": True, "n_ctx": 768}
        session = Session(llm, **params)
        rows = []
        for i in range(3):
            batch = [(TOKENS[(7 * s + i) % 90], i, s) for s in order]
            rows.append(session.batch(batch)[np.argsort(order)])
        session.close()
        return np.stack(rows)

    rows = run(range(n))
    assert np.array_equal(run(np.random.default_rng(1).permutation(n).tolist()), rows)
    assert 0 < distance(rows, ordinary(run, range(n))) < NOISE


@pytest.mark.parametrize("name", ["llama", "f16-head"])
def test_hidden_states_alone(files, name):
    """Embeddings leave the output matrix out; who asks llama.cpp for both gets both."""
    llm = load(files[name])
    llm.embeddings(["its first call asks how the model runs"])
    llama_cpp.llama_set_embeddings(llm.ctx, True)
    for text in ("a few", "more of them, as many as one can count, and then " * 2):
        tokens = llm.tokenize(text.encode())
        batch = [(token, i, 0) for i, token in enumerate(tokens)]
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(llm.ctx), True)
        before = decode(llm, batch)
        states = llama_cpp.llama_get_embeddings(llm.ctx)
        states = np.ctypeslib.as_array(states, (len(tokens), llm.n_embd())).copy()
        logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits(llm.ctx), before.shape)
        logits[:] = 7
        got = llm.embeddings([text], normalize=False)[0]
        assert np.array_equal(got, pooled(states, MEAN))
        assert (logits == 7).all()
        llama_cpp.llama_set_embeddings(llm.ctx, True)
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(llm.ctx), True)
        assert np.array_equal(decode(llm, batch), before)
