"""The demo model, as a file and loaded."""

import pytest

from mobilellm_cpp import MobileLLM, convert_checkpoint
from mobilellm_cpp.cache import DEMO


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "demo.gguf"
    convert_checkpoint(DEMO, path, type="q8_0")
    return path


@pytest.fixture(scope="module")
def llm(model):
    with MobileLLM(model, n_threads=1) as llm:
        yield llm
