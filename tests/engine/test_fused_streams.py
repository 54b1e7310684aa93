"""The fused node where each sequence has a cache of its own (kv_unified off, as in a plain
context): each sequence has the very bits that it has alone."""

import numpy as np
import pytest
from peer import run_on
from sessions import CACHES, NOISE, TOKENS, Session, distance, load

from mobilellm_cpp.engine.library import llama_cpp

TEXTS = [TOKENS[:70], TOKENS[20:], TOKENS[10:80]]
STREAMS = {"n_seq_max": 3, "n_ctx": 768}


def together(session, texts, first, n, order=None):
    """Logits [text, n, vocab] after the next n tokens of each, sequence by sequence or in turn."""
    tokens = [(text[i], i, s) for s, text in enumerate(texts) for i in range(first, first + n)]
    order = list(range(len(tokens))) if order is None else order
    rows = session.batch([tokens[i] for i in order])
    return rows[np.argsort(order)].reshape(len(texts), n, -1)


def each_alone(llm, texts, pieces, **params):
    """The same as `together` for all pieces, from a context for each text."""
    alone = []
    for text in texts:
        session = Session(llm, **params)
        ends = np.cumsum(pieces)
        rows = [session.whole(text[b - n : b], b - n) for b, n in zip(ends, pieces, strict=True)]
        alone.append(np.concatenate(rows))
        session.close()
    return np.stack(alone)


def all_together(llm, texts, pieces, **params):
    session = Session(llm, **{**STREAMS, **params})
    ends = np.cumsum(pieces)
    rows = [together(session, texts, b - n, n) for b, n in zip(ends, pieces, strict=True)]
    session.close()
    return np.concatenate(rows, 1)


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("name", ["llama", "shared", "f16-head", "r1", "pro"])
def test_prompts_and_steps(files, ordinary, name, cache):
    """Prompts, drafts, tokens one by one."""
    llm = load(files[name])
    pieces = [20, 13, 1, 1, 12, 5, 1]
    fused = all_together(llm, TEXTS, pieces, **CACHES[cache])
    assert np.array_equal(fused, each_alone(llm, TEXTS, pieces, **CACHES[cache]))
    assert 0 < distance(fused, ordinary(all_together, llm, TEXTS, pieces, **CACHES[cache])) < NOISE


def test_small_windows(files):
    """Sliding layers run out of cells, each sequence by itself."""
    texts = [(5 * text)[:330] for text in TEXTS]
    small = {"n_ubatch": 192, "n_batch": 192, "swa_full": False}
    pieces = [40] * 8 + [1] * 5
    llm = load(files["pro"])
    alone = each_alone(llm, texts, pieces, **small, n_ctx=512)
    assert np.array_equal(all_together(llm, texts, pieces, **small, n_ctx=1536), alone)


@pytest.mark.parametrize("n", [1, 12, 30])
def test_tokens_in_turn(files, n):
    """Their order in the batch is not that in which they are computed."""
    llm = load(files["llama"])
    session = Session(llm, **STREAMS)
    in_turn = np.arange(3 * n).reshape(3, n).T.ravel()
    rows = together(session, TEXTS, 0, n, in_turn.tolist())
    session.close()
    assert np.array_equal(rows, each_alone(llm, TEXTS, [n]))


def test_some_of_the_sequences(files):
    """Not from the first on, neighbours or not."""
    llm = load(files["llama"])
    alone = each_alone(llm, TEXTS, [20, 1, 1])
    session = Session(llm, **{**STREAMS, "n_seq_max": 6, "n_ctx": 1536})
    for sequences in ([3, 4, 5], [1, 2, 5], [0, 2, 4]):
        for first, n in ((0, 20), (20, 1), (21, 1)):
            places = [(s, text) for s, text in zip(sequences, TEXTS, strict=True)]
            batch = [(text[i], i, s) for s, text in places for i in range(first, first + n)]
            rows = session.batch(batch).reshape(3, n, -1)
            assert np.array_equal(rows, alone[:, first : first + n]), sequences
        llama_cpp.llama_memory_clear(session.memory, True)
    session.close()


def test_prompts_of_different_lengths(files, ordinary):
    """llama.cpp cuts them into equal pieces."""
    llm = load(files["shared"])

    def run():
        session = Session(llm, **STREAMS)
        tokens = [(text[i], i, s) for s, text in enumerate(TEXTS) for i in range(15 + 20 * s)]
        rows = session.batch(tokens)
        session.close()
        return rows

    assert 0 < distance(run(), ordinary(run)) < NOISE


def test_threads_change_no_bit(files):
    llm = load(files["shared"])
    pieces = [20, 5, 1]
    one = all_together(llm, TEXTS, pieces)
    for n in (2, 3, 5):
        assert np.array_equal(all_together(llm, TEXTS, pieces, n_threads=n, n_threads_batch=n), one)


def test_copied_removed_and_shifted_cells(files, ordinary):
    """What a sequence was copied from, and what becomes of both later."""
    llm = load(files["llama"])

    def run():
        session = Session(llm, **STREAMS)
        session.whole(TOKENS[:40])
        llama_cpp.llama_memory_seq_cp(session.memory, 0, 2, -1, -1)
        after = [(TOKENS[50 + i], 40 + i, s) for s in (0, 2) for i in range(10)]
        rows = [session.batch(after)]
        assert llama_cpp.llama_memory_seq_rm(session.memory, 2, 30, -1)
        rows.append(session.run(TOKENS[60:65], 30, 2))
        assert llama_cpp.llama_memory_seq_rm(session.memory, 0, 4, 14)
        llama_cpp.llama_memory_seq_add(session.memory, 0, 14, -1, -10)
        ends = ((0, 40), (2, 35))
        last = [(TOKENS[70 + i], end + i, s) for s, end in ends for i in (0, 1)]
        rows.append(session.batch(last))
        session.close()
        return rows

    rows = run()
    assert np.array_equal(rows[0][:10], rows[0][10:])
    session = Session(llm)
    session.whole(TOKENS[:40])
    assert llama_cpp.llama_memory_seq_rm(session.memory, 0, 30, -1)
    assert np.array_equal(rows[1], session.run(TOKENS[60:65], 30))
    assert np.array_equal(rows[2][2:], session.run(TOKENS[70:72], 35))
    session.close()
    assert 0 < distance(np.concatenate(rows), np.concatenate(ordinary(run))) < NOISE


def test_a_saved_state_goes_to_another_sequence(files):
    llm = load(files["q4_0"])
    want = each_alone(llm, TEXTS[:1], [40, 1, 1])[0]
    session = Session(llm, **STREAMS)
    session.batch([(TEXTS[0][i], i, 1) for i in range(40)])
    state = session.state(1)
    session.close()
    session = Session(llm, **STREAMS)
    session.restore(state, 2)
    for i in (40, 41):
        rows = session.batch([(TEXTS[1][i], i - 40, 1), (TEXTS[0][i], i, 2)])
        assert np.array_equal(rows[1], want[i])
    session.close()


STOCK = """
import json, sys
import numpy as np
import llama_cpp
path, tokens, params, out = json.loads(sys.argv[1])
model = llama_cpp.llama_model_load_from_file(path.encode(), llama_cpp.llama_model_default_params())
values = llama_cpp.llama_context_default_params()
for name, value in params.items():
    setattr(values, name, value)
assert not values.kv_unified
context = llama_cpp.llama_init_from_model(model, values)
batch = llama_cpp.llama_batch_init(512, 0, 1)
n_vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
rows = []
for step in tokens:
    batch.n_tokens = len(step)
    for i, (token, position, sequence) in enumerate(step):
        batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, position, 1
        batch.seq_id[i][0], batch.logits[i] = sequence, 1
    assert llama_cpp.llama_decode(context, batch) == 0
    logits = llama_cpp.llama_get_logits(context)
    rows.append(np.ctypeslib.as_array(logits, (len(step), n_vocab)).copy())
np.save(out, np.concatenate(rows))
"""


def test_stock_llama_cpp(files, stock_lib, tmp_path):
    params = {**Session.defaults, **STREAMS}
    pieces = ((0, 20), (20, 5), (25, 1), (26, 1))
    steps = [
        [(text[i], i, s) for s, text in enumerate(TEXTS) for i in range(first, first + n)]
        for first, n in pieces
    ]
    arguments = [str(files["llama"]), steps, params, str(tmp_path / "rows.npy")]
    done = run_on(stock_lib, STOCK, arguments)
    assert done.returncode == 0, done.stderr[-2000:]
    want = np.load(tmp_path / "rows.npy")
    session = Session(load(files["llama"]), **STREAMS)
    got = np.concatenate([session.batch(step) for step in steps])
    session.close()
    assert 0 < distance(got, want) < NOISE
    assert max(map(distance, got, want)) < 3 * NOISE
