"""A small run of load.py, on a model whose answers are computed together."""

import sys
from pathlib import Path

import openai
import pytest
from checkpoints import make_checkpoint
from serving import running
from sessions import SHAPE

from mobilellm_cpp import MobileLLM, convert_checkpoint

sys.path.insert(0, str(Path(__file__).parent))
import load


def test_beginnings_are_computed_once(tmp_path):
    checkpoint = make_checkpoint(tmp_path / "plain", **SHAPE)
    convert_checkpoint(checkpoint, tmp_path / "model.gguf", type="q8_0")
    with MobileLLM(tmp_path / "model.gguf", n_ctx=512, n_threads=1) as llm, running(llm) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        asked = []
        for word in ("who", "what", "when"):
            text = " ".join(load.WORDS * 6 + [word] * 20)
            made = client.completions.create(model="demo", prompt=text, temperature=0, max_tokens=3)
            assert made.choices[0].text == "".join(llm.stream(text, temperature=0, max_tokens=3))
            asked.append(made.usage)
        common = len(llm.tokenize(" ".join(load.WORDS * 6).encode()))
        cached = [usage.prompt_tokens_details.cached_tokens for usage in asked]
        assert cached[0] == 0 and all(common - 2 <= each <= common + 2 for each in cached[1:])
        many = client.completions.create(
            model="demo", prompt=" ".join(load.WORDS * 3), max_tokens=3, n=4, seed=1
        )
        assert len(many.choices) == 4


# the second with a key that the fused step does not know
@pytest.mark.parametrize("keys", [None, {"llama.logit_scale": 1.0}], ids=["fused", "ordinary"])
def test_clients_that_come_and_go(tmp_path, keys):
    checkpoint = make_checkpoint(tmp_path / "plain", **SHAPE)
    convert_checkpoint(checkpoint, tmp_path / "model.gguf", type="q8_0")
    with MobileLLM(tmp_path / "model.gguf", n_ctx=512, n_threads=1, kv_overrides=keys) as llm:
        ends, grown = load.run(llm, requests=48, connections=16)
        assert llm.computes_together == (keys is None)
    assert set(ends) <= {"right", "left", "status 503"} and ends["right"] > 20 and ends["left"] > 2
    assert grown < 16 << 20
