"""A small run of load.py, on a model whose answers are computed together."""

import sys
from pathlib import Path

import pytest
from checkpoints import make_checkpoint
from sessions import SHAPE

from mobilellm_cpp import MobileLLM, convert_checkpoint

sys.path.insert(0, str(Path(__file__).parent))
import load


@pytest.mark.parametrize("type", ["q8_0", "f32"])
def test_clients_that_come_and_go(tmp_path, type):
    checkpoint = make_checkpoint(tmp_path / "plain", **SHAPE)
    convert_checkpoint(checkpoint, tmp_path / "model.gguf", type=type)
    with MobileLLM(tmp_path / "model.gguf", n_ctx=512, n_threads=1) as llm:
        ends, grown = load.run(llm, requests=60, connections=16)
        assert llm.computes_together == (type == "q8_0")
    assert set(ends) <= {"right", "left", "status 503"} and ends["right"] > 25 and ends["left"] > 2
    assert grown < 16 << 20
