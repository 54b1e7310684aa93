"""Arguments of every wrong kind: one sentence names them, before anything is done with them."""

import inspect
import math

import llama_cpp
import numpy as np
import pytest

from mobilellm_cpp import CheckpointError, MobileLLM, ModelError
from mobilellm_cpp.cache import DEMO
from mobilellm_cpp.engine.arguments import check_constructor, check_sampling, check_stop

NAN, INF = math.nan, math.inf


class Strange:
    def __repr__(self):
        raise RuntimeError("no words")


CONSTRUCTOR = [
    (dict(n_contexts=3), "did you mean n_ctx"),
    (dict(xyzzy=3), "has no argument xyzzy$"),
    (dict(n_ctx="512"), "n_ctx is '512', not a whole number"),
    (dict(n_ctx=None), "n_ctx is None"),
    (dict(n_ctx=True), "n_ctx is True"),
    (dict(n_ctx=1.5), "n_ctx is 1.5"),
    (dict(n_ctx=-1), "n_ctx is -1, outside 0 to"),
    (dict(n_ctx=10**5000), "n_ctx is a number of"),
    (dict(n_ctx=Strange()), "n_ctx is a Strange"),
    (dict(n_batch=0), "n_batch is 0, outside 1"),
    (dict(n_ubatch=0), "n_ubatch is 0"),
    (dict(n_ubatch=1 << 40), "n_ubatch is 1099511627776"),
    (dict(n_threads=513), "n_threads is 513"),
    (dict(type_k=5), r"type_k is 5, not one of the cache types GGML_TYPE_F32 \(0\)"),
    (dict(type_k=9), "type_k is 9"),
    (dict(type_v=-1), "type_v is -1"),
    (dict(type_v=43), "type_v is 43"),
    (dict(type_k=2**40), "type_k is 1099511627776"),
    (dict(type_k="q8_0"), "type_k is 'q8_0', not the number of a|type_k is 'q8_0'"),
    (dict(type_k=8, flash_attn=False), "quantized caches need flash attention"),
    (dict(type_k=0, type_v=8), "quantized caches need flash attention"),
    (dict(split_mode=3), "split_mode is 3"),
    (dict(pooling_type=5), "pooling_type is 5"),
    (dict(attention_type=2), "attention_type is 2"),
    (dict(rope_scaling_type=4), "rope_scaling_type is 4"),
    (dict(tensor_split=[]), "tensor_split is"),
    (dict(tensor_split=[NAN]), "tensor_split is nan"),
    (dict(tensor_split=[0.5] * 4000), "tensor_split is"),
    (dict(tensor_split=3), "tensor_split is 3"),
    (dict(rope_freq_base=NAN), "rope_freq_base is nan"),
    (dict(rope_freq_scale=-1.0), "rope_freq_scale is -1"),
    (dict(rope_freq_scale="1"), "rope_freq_scale is '1', not a number"),
    (dict(yarn_orig_ctx=-1), "yarn_orig_ctx is -1"),
    (dict(numa=77), "numa is 77"),
    (dict(verbose="no"), "verbose is 'no', neither True nor False"),
    (dict(use_mmap=np.ones(3)), "use_mmap is"),
    (dict(seed="x"), "seed is 'x'"),
    (dict(seed=2**32), "seed is 4294967296"),
    (dict(seed=-2), "seed is -2"),
    (dict(last_n_tokens_size=-1), "last_n_tokens_size is -1"),
    (dict(last_n_tokens_size=2**31), "last_n_tokens_size is"),
    (dict(lora_path=3), "lora_path is 3, not a path"),
    (dict(lora_path="/no/such.gguf"), "/no/such.gguf: no such file"),
    (dict(lora_path="a\0b"), "zero byte"),
    (dict(lora_scale=INF), "lora_scale is inf"),
    (dict(chat_format=3), "chat_format is 3"),
    (dict(chat_handler="llama-2"), "chat_handler is 'llama-2', which cannot be called"),
    (dict(tokenizer=3), "tokenizer is 3, which has no tokenize"),
    (dict(kv_overrides=[]), r"kv_overrides is \[\], not a dict"),
    (dict(kv_overrides={"": 1}), "a key is a text of 1 to 127 bytes"),
    (dict(kv_overrides={"x" * 128: 1}), "1 to 127 bytes"),
    (dict(kv_overrides={"a\0b": 1}), "1 to 127 bytes"),
    (dict(kv_overrides={3: 1}), "1 to 127 bytes"),
    (dict(kv_overrides={"a": "x" * 128}), "longer than 127 bytes"),
    (dict(kv_overrides={"a": 1 << 70}), r"kv_overrides\['a'\] is"),
    (dict(kv_overrides={"a": NAN}), r"kv_overrides\['a'\] is nan"),
    (dict(kv_overrides={"a": None}), "neither bool, int, float nor text"),
]  # fmt: skip

SAMPLING = [
    (dict(temprature=1.0), "did you mean temperature"),
    (dict(temperature=NAN), "temperature is nan, outside 0 to"),
    (dict(temperature=INF), "temperature is inf"),
    (dict(temperature=-1), "temperature is -1"),
    (dict(temperature="hot"), "temperature is 'hot', not a number"),
    (dict(temperature=None), "temperature is None"),
    (dict(temperature=10**400), "temperature is a number of"),
    (dict(top_k=1.5), "top_k is 1.5"),
    (dict(top_k=2**31), "top_k is 2147483648"),
    (dict(top_k=-2), "top_k is -2"),
    (dict(top_p=1.1), "top_p is 1.1, outside 0 to 1"),
    (dict(top_p=NAN), "top_p is nan"),
    (dict(min_p=-0.1), "min_p is -0.1"),
    (dict(typical_p=2), "typical_p is 2"),
    (dict(repeat_penalty=0), "repeat_penalty is 0"),
    (dict(repeat_penalty=NAN), "repeat_penalty is nan"),
    (dict(frequency_penalty=INF), "frequency_penalty is inf"),
    (dict(presence_penalty=-INF), "presence_penalty is -inf"),
    (dict(mirostat_mode=3), "mirostat_mode is 3, not one of"),
    (dict(mirostat_mode="2"), "mirostat_mode is '2'"),
    (dict(mirostat_tau=NAN), "mirostat_tau is nan"),
    (dict(mirostat_eta=-1), "mirostat_eta is -1"),
    (dict(seed=2**32), "seed is 4294967296"),
    (dict(seed=1.0), "seed is 1.0"),
    (dict(max_tokens=2**31), "max_tokens is"),
    (dict(max_tokens="7"), "max_tokens is '7'"),
    (dict(logprobs=-1), "logprobs is -1"),
    (dict(grammar="root ::= x"), "grammar is 'root ::= x', which has no _grammar"),
    (dict(logits_processor=3), "logits_processor is 3, which cannot be called"),
    (dict(logits_processor=[3]), "an item of logits_processor is 3"),
    (dict(stopping_criteria="x"), "stopping_criteria is 'x'"),
    (dict(logit_bias=[1]), r"logit_bias is \[1\], not a dict"),
    (dict(logit_bias={512: 1.0}), "a token of logit_bias is 512, outside 0 to 511"),
    (dict(logit_bias={-1: 1.0}), "a token of logit_bias is -1"),
    (dict(logit_bias={"x": 1.0}), "a token of logit_bias is 'x'"),
    (dict(logit_bias={1: NAN}), r"logit_bias\[1\] is nan"),
    (dict(logit_bias={1: INF}), r"logit_bias\[1\] is inf"),
]  # fmt: skip


@pytest.mark.parametrize(("values", "sentence"), CONSTRUCTOR)
def test_constructor_refuses(values, sentence):
    with pytest.raises(ModelError, match=sentence):
        check_constructor(**values)


@pytest.mark.parametrize(("values", "sentence"), SAMPLING)
def test_sampling_refuses(values, sentence):
    with pytest.raises(ModelError, match=sentence):
        check_sampling(n_vocab=512, **values)


def test_all_of_llama_is_known():
    """The defaults of every argument of llama_cpp pass, so that none is refused as unknown."""
    for function, check in [
        (llama_cpp.Llama.__init__, check_constructor),
        (llama_cpp.Llama.generate, check_sampling),
        (llama_cpp.Llama.create_completion, check_sampling),
    ]:
        parameters = inspect.signature(function).parameters.values()
        not_ours = {"tokens", "reset", "prompt", "suffix", "echo", "stop", "stream", "model"}
        defaults = {
            p.name: "model.gguf" if p.default is p.empty else p.default
            for p in parameters
            if p.name not in not_ours | {"self", "kwargs"}
        }
        assert check(**defaults) == defaults


def test_values_become_plain():
    checked = check_constructor(n_ctx=np.int64(64), verbose=np.bool_(True), rope_freq_base=1)
    assert checked == {"n_ctx": 64, "verbose": True, "rope_freq_base": 1.0}
    assert {type(value) for value in checked.values()} == {int, bool, float}
    sampling = check_sampling(
        temperature=1e-9, top_k=-1, seed=2**32 - 1, logit_bias={"3": -INF, np.int32(4): 1}
    )
    assert sampling == {
        "temperature": 0.0,
        "top_k": -1,
        "seed": 4294967295,
        "logit_bias": {3: -INF, 4: 1.0},
    }


def test_stop():
    assert check_stop(None) == () == check_stop([])
    assert check_stop("\n") == ("\n",)
    assert check_stop(["a", "b"]) == ("a", "b")
    for bad, sentence in [
        ("", "empty text"),
        (["a", ""], "empty text"),
        ([3], "holds 3"),
        (b"a", "not a text"),
        (7, "stop is 7"),
        ({"a"}, "not a text or a list"),
    ]:
        with pytest.raises(ModelError, match=sentence):
            check_stop(bad)


def test_what_people_hand_over_first():
    with MobileLLM.from_checkpoint(DEMO, "q8_0", n_ctx=64, n_threads=1) as llm:
        with pytest.raises(ModelError, match="tokenize takes bytes"):
            llm.tokenize("hello")
        for lora in ("a.gguf", ["a.gguf"], ("a.gguf", 1.0), {"a.gguf": 1.0}):
            with pytest.raises(ModelError, match="lora is a list of files with their scales"):
                llm.set_lora(lora)
    with pytest.raises(CheckpointError, match="one of f32, .*, balanced, best, not 'q9'"):
        MobileLLM.from_checkpoint(DEMO, "q9")
