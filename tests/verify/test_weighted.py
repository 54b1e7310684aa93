"""Files whose rounding heeds how strong the columns of inputs are, as the default type's does."""

import numpy as np
import pytest
from gguf import GGUFReader

from mobilellm_cpp import convert_checkpoint
from mobilellm_cpp.cache import DEMO
from mobilellm_cpp.inspection.verification import verify
from mobilellm_cpp.quantization.checkpoint import convert_to
from mobilellm_cpp.quantization.run import make_plan, quantize_file
from mobilellm_cpp.quantization.source import Source


@pytest.fixture(scope="module")
def balanced(tmp_path_factory):
    from mobilellm_cpp.convert import open_checkpoint

    path = tmp_path_factory.mktemp("weighted") / "balanced.gguf"
    convert_to(open_checkpoint(DEMO), path, "balanced")
    return path


def test_the_default_type(balanced):
    assert verify(balanced, DEMO, n_threads=1).failures == []


def test_a_calibrated_file(tmp_path):
    convert_checkpoint(DEMO, tmp_path / "f16.gguf", type="f16")
    source = Source(tmp_path / "f16.gguf")
    text = "who bakes the bread in the village, and who sells the buns? " * 400
    out = tmp_path / "q4_0.gguf"
    quantize_file(source, out, make_plan(source, "q4_0"), text=text, sequences=2)
    assert verify(out, DEMO, n_threads=1).failures == []


def test_a_row_that_is_not_the_checkpoints(balanced, tmp_path):
    spoiled = tmp_path / "spoiled.gguf"
    spoiled.write_bytes(balanced.read_bytes())
    tensor = next(t for t in GGUFReader(spoiled).tensors if t.name == "blk.1.ffn_up.weight")
    rows = np.memmap(spoiled, np.uint8, "r+", tensor.data_offset, tensor.data.shape)
    rows[[3, 4]] = rows[[4, 3]]
    rows.flush()
    failures = verify(spoiled, DEMO, n_threads=1).failures
    assert any("blk.1.ffn_up.weight" in failure for failure in failures)
