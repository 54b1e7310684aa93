"""Sliding layers in the fused node: a cache of their own, of which cells are taken again."""

import numpy as np
import pytest
from checkpoints import make_pro
from sessions import CACHES, NOISE, TOKENS, Session, distance, load

from mobilellm_cpp import convert_checkpoint
from mobilellm_cpp.engine.library import llama_cpp

LONG = (6 * TOKENS)[:400]  # the small cache has 256 cells
SMALL = {"n_ctx": 1024, "n_ubatch": 64, "n_batch": 64, "swa_full": False}


@pytest.fixture(scope="module")
def windows(files, tmp_path_factory):
    """Files by name: a full layer and two sliding ones, none that is full, shared blocks."""
    folder = tmp_path_factory.mktemp("windows")
    only = make_pro(folder / "only", sliding=[1, 1, 1], dtype="f32")
    convert_checkpoint(only, folder / "only.gguf", type="q8_0")
    mixed = make_pro(folder / "mixed", sliding=[0, 1, 1], rope=[1, 1, 0], dtype="f32")
    convert_checkpoint(mixed, folder / "shared.gguf", type="q4_0", schedule="immediate")
    return {"pro": files["pro"], **{path.stem: path for path in folder.glob("*.gguf")}}


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("name", ["pro", "only", "shared"])
def test_the_same_logits_as_the_ordinary_graph(windows, ordinary, name, cache):
    """A prompt in pieces, whose sliding layers run out of cells, and tokens one by one."""

    def run():
        session = Session(load(windows[name]), **SMALL, **CACHES[cache])
        rows = [session.whole(LONG[first : first + 40], first) for first in range(0, 320, 40)]
        rows.append(session.run(LONG[320:340], 320))
        session.close()
        return np.concatenate(rows)

    got, want = run(), ordinary(run)
    assert 0 < distance(got, want) < NOISE
    assert max(map(distance, got, want)) < 4 * NOISE


def test_no_bit_depends_on_pieces_threads_or_cells(windows):
    """What a token sees of a sliding layer begins within a block of 64 cells."""
    rows = []
    for n_threads, pieces in ((1, [64, 64, 40]), (2, [13, 51, 64, 40]), (3, [40, 40, 48, 40])):
        llm = load(windows["pro"])
        session = Session(llm, n_threads=n_threads, n_threads_batch=n_threads, **SMALL)
        part, first = [], 0
        for n in pieces:
            part.append(session.whole(LONG[first : first + n], first))
            first += n
        part.append(session.run(LONG[first : first + 10], first))
        rows.append(np.concatenate(part))
        session.close()
        assert np.array_equal(rows[-1], rows[0]), pieces


def test_sequences_do_not_see_each_other(windows):
    """Each has the very bits that it has alone, in a prompt and token by token."""
    texts = [LONG[:330], LONG[40:370]]
    alone = []
    for text in texts:
        session = Session(load(windows["pro"]), **SMALL)
        rows = [session.whole(text[first : first + 30], first) for first in range(0, 300, 30)]
        alone.append(np.concatenate([*rows, session.run(text[300:], 300)]))
        session.close()
    session = Session(load(windows["pro"]), **SMALL, n_seq_max=4, kv_unified=True)
    for first in range(0, 300, 30):
        batch = [(text[i], i, s) for s, text in enumerate(texts) for i in range(first, first + 30)]
        rows = session.batch(batch).reshape(2, 30, -1)
        for each, want in zip(rows, alone, strict=True):
            assert np.array_equal(each, want[first : first + 30]), first
    for i in range(300, 330):
        rows = session.batch([(text[i], i, s) for s, text in enumerate(texts)])
        assert np.array_equal(rows, np.stack([want[i] for want in alone]))
    llama_cpp.llama_memory_seq_rm(session.memory, 0, -1, -1)
    assert np.array_equal(session.step(LONG[0], 0, 2), alone[0][0])
    session.close()
