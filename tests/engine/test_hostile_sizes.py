"""What upstream treats quadratically takes about a second, or is refused with a sentence; and what
overrides make of a file's metadata passes the same checks as the file."""

import time

import pytest
from checkpoints import make_checkpoint
from gguf_edit import U32, rewrite

from mobilellm_cpp import MobileLLM, ModelError, convert_checkpoint

SECONDS = 2  # of this process's CPU time


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sizes")
    make_checkpoint(folder / "c", dtype="f32", sharing=True)
    return convert_checkpoint(folder / "c", folder / "m.gguf", type="f32").path


@pytest.fixture(scope="module")
def llm(model):
    return MobileLLM(model, n_ctx=64, n_threads=1)


def test_special_tokens(llm):
    start = time.process_time()
    assert llm.tokenize(b"<s>" * 5000, add_bos=False, special=True) == [1] * 5000
    for text in (b"<s>" * 100_000, b"<s>a</s> " * 50_000):
        with pytest.raises(ModelError, match="more than 16384 special tokens"):
            llm.tokenize(text, special=True)
    assert len(llm.tokenize(b"<s>" * 20_000, special=False)) > 20_000  # as plain text
    assert time.process_time() - start < SECONDS


@pytest.mark.parametrize("text", ["\U0001f600", "\u4e2d\u6587", "\ud800"])
def test_characters_outside_the_vocabulary(llm, text):
    """Upstream copied all tokens so far for each of them: 18 s for 320,000."""
    start = time.process_time()
    tokens = llm.tokenize((text * (320_000 // len(text))).encode("utf-8", "surrogatepass"))
    assert len(tokens) > 900_000
    assert time.process_time() - start < SECONDS


def test_many_keys(model, tmp_path):
    path = rewrite(model, tmp_path / "m.gguf", {f"mobilellm.x{i}": (i, U32) for i in range(40_000)})
    start = time.process_time()
    with pytest.raises(ModelError, match="holds 400.. keys"):
        MobileLLM(path)
    assert time.process_time() - start < SECONDS


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        ({"mobilellm.attention.head_count": 0}, "head_count is 0"),
        ({"mobilellm.attention.head_count": -1}, "which has no 32 bits"),
        ({"mobilellm.attention.head_count": 2**40}, "which has no 32 bits"),
        ({"mobilellm.attention.head_count": 4.0}, "of another kind than the file's, which is u32"),
        ({"mobilellm.attention.head_count": "4"}, "of another kind than the file's"),
        ({"mobilellm.rope.dimension_count": 0}, "dimension_count is 0"),
        ({"mobilellm.rope.freq_base": -1.0}, "freq_base is -1"),
        ({"mobilellm.context_length": 0}, "context_length is 0"),
        ({"mobilellm.attention.layer_norm_rms_epsilon": True}, "of another kind"),
        ({"mobilellm.block_schedule": 1}, "of another kind"),
        ({"mobilellm.expert_count": 4}, "is not a key that this version understands"),
        ({"general.alignment": 3}, "cannot be overridden"),
        ({"tokenizer.ggml.tokens": "x"}, "of another kind"),
    ],
)
def test_overrides(model, overrides, sentence):
    with pytest.raises(ModelError, match=sentence):
        MobileLLM(model, n_ctx=64, n_threads=1, kv_overrides=overrides)


def test_sound_overrides(model):
    overrides = {"mobilellm.rope.freq_base": 5e5, "general.name": "x", "our.own": True}
    llm = MobileLLM(model, n_ctx=64, n_threads=1, kv_overrides=overrides)
    plain = MobileLLM(model, n_ctx=64, n_threads=1)
    tokens = list(range(1, 60))
    assert abs(llm.logits(tokens) - plain.logits(tokens)).max() > 0
