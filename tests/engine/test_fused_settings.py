"""What a context may change in the fused node: control vectors, scaled RoPE, types of the cache."""

import ctypes

import numpy as np
import pytest
from gguf_edit import rewrite
from sessions import BF16, F16, NOISE, Q4_0, Q8_0, TOKENS, Session, decode, distance, load

from mobilellm_cpp.engine.library import llama_cpp

Q4_1, Q5_0, Q5_1, IQ4_NL = 3, 6, 7, 20  # ggml_type


def prompt_and_steps(path, **params):
    session = Session(load(path), **params)
    rows = np.concatenate([session.whole(TOKENS[:40]), session.run(TOKENS[40:60], 40)])
    session.close()
    return rows


@pytest.mark.parametrize("name", ["llama", "shared"])
def test_a_control_vector(files, ordinary, name):
    llm = load(files[name])
    layers = 2 * 3 if name == "shared" else 3
    vector = np.random.default_rng(4).normal(size=(layers - 1, 384)).astype(np.float32)

    def run(first, last):
        session = Session(llm)
        data = vector.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        rows = [session.whole(TOKENS[:20])]
        args = (session.ctx, data, vector.size, 384, first, last)
        assert not llama_cpp.llama_set_adapter_cvec(*args)
        rows += [session.whole(TOKENS[20:50], 20), session.run(TOKENS[50:55], 50)]
        assert not llama_cpp.llama_set_adapter_cvec(session.ctx, None, 0, 384, 0, 0)
        rows.append(session.run(TOKENS[55:60], 55))
        session.close()
        return np.concatenate(rows)

    plain = prompt_and_steps(files[name])
    got = run(1, layers - 1)
    assert distance(got[20:55], plain[20:55]) > 0.05
    for part in (slice(20), slice(20, 50), slice(50, 55), slice(55, 60)):
        assert 0 < distance(got[part], ordinary(run, 1, layers - 1)[part]) < NOISE
    one = run(2, 2)  # of one layer alone
    assert distance(one[20:55], got[20:55]) > 0.01
    assert 0 < distance(one, ordinary(run, 2, 2)) < NOISE


@pytest.mark.parametrize(
    "params",
    [
        {"rope_scaling_type": 1, "rope_freq_scale": 0.25, "rope_freq_base": 5e5},
        {"rope_scaling_type": 2, "rope_freq_scale": 0.25},
        {"rope_scaling_type": 2, "rope_freq_scale": 0.5, "yarn_ext_factor": 0.7},
        {
            "rope_scaling_type": 2,
            "yarn_beta_fast": 4.0,
            "yarn_orig_ctx": 16,
            "rope_freq_scale": 0.1,
        },
    ],
    ids=["linear", "yarn", "some-yarn", "yarn-of-a-short-context"],
)
@pytest.mark.parametrize("name", ["llama", "r1"])
def test_scaled_rope(files, ordinary, name, params):
    fused = prompt_and_steps(files[name], **params)
    assert distance(fused, prompt_and_steps(files[name])) > 0.05
    assert 0 < distance(fused, ordinary(prompt_and_steps, files[name], **params)) < NOISE


def test_frequencies_of_the_file(files, ordinary, tmp_path):
    """Llama 3's rope_freqs.weight, which each frequency is divided by."""
    factors = np.linspace(1, 8, 32, dtype=np.float32)
    path = rewrite(files["llama"], tmp_path / "far.gguf", tensors={"rope_freqs.weight": factors})
    fused = prompt_and_steps(path)
    assert distance(fused, prompt_and_steps(files["llama"])) > 0.05
    assert 0 < distance(fused, ordinary(prompt_and_steps, path)) < NOISE


@pytest.mark.parametrize("type", [BF16, Q4_0, Q4_1, Q5_0, Q5_1, IQ4_NL])
def test_types_of_the_cache(files, ordinary, type):
    """Of K, of V and of both. A number near the middle of two of theirs may go either way."""
    f16 = prompt_and_steps(files["llama"])
    for params in ({"type_k": type, "type_v": type}, {"type_k": type}, {"type_v": type}):
        fused = prompt_and_steps(files["llama"], **params)
        far = distance(fused, f16)
        other = ordinary(prompt_and_steps, files["llama"], **params)
        assert 0 < distance(fused, other) < (NOISE if type == BF16 else 2 * NOISE)
        assert 0 < far < (NOISE if type == BF16 else 0.5), far


def test_a_type_of_the_cache_changes_no_other_bit(files):
    """Threads, batches, and how a prompt is cut."""
    for params in ({"type_k": Q4_0, "type_v": Q4_0}, {"type_k": BF16, "type_v": Q5_1}):
        alone = decode(files["shared"], TOKENS[:30], **params)
        session = Session(load(files["shared"]), n_threads=3, n_threads_batch=3, **params)
        assert np.array_equal(session.whole(TOKENS[:10]), alone[:10])
        assert np.array_equal(session.run(TOKENS[10:30], 10), alone[10:])
        prompts = []
        for pieces in ((60,), (13, 47), (40, 20)):
            llama_cpp.llama_memory_clear(session.memory, True)
            ends = np.cumsum(pieces)
            rows = [
                session.whole(TOKENS[b - n : b], b - n) for b, n in zip(ends, pieces, strict=True)
            ]
            prompts.append(np.concatenate(rows))
            assert np.array_equal(prompts[-1], prompts[0])
        session.close()


def test_a_cache_of_two_types(files, ordinary):
    params = {"type_k": Q8_0, "type_v": F16}
    fused = prompt_and_steps(files["llama"], **params)
    assert 0 < distance(fused, ordinary(prompt_and_steps, files["llama"], **params)) < NOISE
