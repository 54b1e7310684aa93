"""The type of the KV cache: what is chosen without a word, and what each type holds."""

import numpy as np
import pytest
from checkpoints import make_checkpoint
from sessions import F16, F32, Q4_0, Q8_0, TOKENS, load

from mobilellm_cpp import ModelError, convert_checkpoint
from mobilellm_cpp.engine.gguf_file import kv_bytes, open_gguf


def types(llm):
    return llm.context_params.type_k, llm.context_params.type_v


def test_shared_blocks_get_q8_0(files, tmp_path):
    for name in ("shared", "reverse"):
        assert types(load(files[name])) == (Q8_0, Q8_0)
    assert types(load(files["llama"])) == (F16, F16)
    assert types(load(files["shared"], flash_attn=False)) == (F16, F16)
    assert types(load(files["shared"], type_k=F32))[0] == F32
    narrow = make_checkpoint(tmp_path / "narrow", layers=2, hidden=64, heads=4, sharing=True)
    file = convert_checkpoint(narrow, tmp_path / "narrow.gguf", type="f32").path
    assert types(load(file)) == (F16, F16)  # heads of 16, blocks of 32


@pytest.mark.parametrize(
    ("name", "number", "far"), [("f16", F16, 0.05), ("q8_0", Q8_0, 0.06), ("q4_0", Q4_0, 0.4)]
)
def test_each_type_is_near_f32_and_survives_a_saved_state(files, name, number, far):
    llm = load(files["shared"], cache_type=name)
    assert types(llm) == (number, number)
    got = llm.logits(TOKENS[:40])
    want = load(files["shared"], cache_type="f32").logits(TOKENS[:40])
    assert np.linalg.norm(got - want) < far * np.linalg.norm(want)
    start, rest = TOKENS[:30], TOKENS[30:40]
    llm.reset()
    llm.eval(start)
    state = llm.save_state()

    def go_on():
        llm.eval(rest)
        return np.array(llm.eval_logits)[-1]

    after = go_on()
    llm.reset()
    llm.load_state(state)
    assert np.array_equal(after, go_on())


def test_the_size_that_is_told_is_the_size_of_the_cache(files):
    saved = {}
    with open_gguf(files["shared"]) as file:
        told = {name: kv_bytes(file, 256, cache_type=name) for name in ("f16", "q8_0", "q4_0")}
        assert kv_bytes(file, 256) == told["q8_0"]
    for name in told:
        llm = load(files["shared"], cache_type=name)
        llm.eval([TOKENS[i % len(TOKENS)] for i in range(200)])
        saved[name] = llm.save_state().llama_state_size
    for name in ("q8_0", "q4_0"):
        ratio = told[name] / told["f16"]
        assert saved[name] / saved["f16"] == pytest.approx(ratio, rel=0.1)


def test_what_does_not_go_together_is_refused(files):
    for arguments, message in (
        ({"cache_type": "q3"}, "cache_type is 'q3', not one of f32, f16, q8_0, q4_0"),
        ({"cache_type": 8}, "cache_type is 8, not one of"),
        ({"cache_type": "f16", "type_v": F16}, "cache_type sets type_k and type_v"),
        ({"cache_type": "q4_0", "flash_attn": False}, "quantized caches need flash attention"),
    ):
        with pytest.raises(ModelError, match=message):
            load(files["shared"], **arguments)
