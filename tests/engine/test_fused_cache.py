"""The fused node and the KV cache: sequences, removals, shifts, saved states."""

import numpy as np
import pytest
from checkpoints import make_checkpoint
from sessions import CACHES, F16, F32, NOISE, SHAPE, TOKENS, Session, decode, distance, load

from mobilellm_cpp import convert_checkpoint
from mobilellm_cpp.engine.library import llama_cpp


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


@pytest.mark.parametrize("name", ["llama", "shared", "pro"])
@pytest.mark.parametrize("type", [F16, F32])
def test_flash_attention_changes_no_bit(files, name, type):
    """Without it llama.cpp holds V as columns, where the node does not read it."""
    rows = []
    for flash in (0, 1):
        session = Session(load(files[name]), type_k=type, type_v=type, flash_attn_type=flash)
        rows.append(np.concatenate([session.whole(TOKENS[:40]), session.run(TOKENS[40:50], 40)]))
        session.close()
    assert np.array_equal(*rows)


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
