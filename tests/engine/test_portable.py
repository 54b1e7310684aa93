"""`portable` files run on a libllama without our patch, with the same greedy tokens."""

import re

import numpy as np
import pytest
from checkpoints import make_checkpoint, make_pro, make_r1
from gguf import GGUFReader
from peer import greedy, run_on

from mobilellm_cpp import MobileLLM, MobileLLMError, convert_checkpoint
from mobilellm_cpp.engine import library

OURS = library.FOLDER
PROMPTS = [[1, 17, 44], [1, 300], [1, *range(40, 120)]]
SHAPE = {"hidden": 192, "heads": 3, "ffn": 256, "layers": 3, "dtype": "f32"}
ROUNDING = 0.03  # of the largest logit; batched and single decoding of one file differ by as much
PLAIN_PRO = {"qk_norm": False, "sliding": [0, 1, 1]}

# name: maker, its options, schedule, architecture of the portable file
MODELS = {
    "base": (make_checkpoint, {"kv_heads": 1}, None, "llama"),
    "layer-shared": (make_checkpoint, {"kv_heads": 1, "sharing": True}, None, "llama"),
    "reverse": (make_checkpoint, {"kv_heads": 1}, "reverse", "llama"),
    "r1": (make_r1, {"kv_heads": 1}, None, "qwen3"),
    "r1-shared": (make_r1, {"kv_heads": 1}, "immediate", "qwen3"),
    "pro": (make_pro, {"kv_heads": 1, **PLAIN_PRO}, None, "granite_swa"),
    "pro-no-rope": (make_pro, {"kv_heads": 1, **PLAIN_PRO, "rope": [1, 1, 0]}, None, "granite_swa"),
    "pro-shared": (make_pro, {"kv_heads": 1, **PLAIN_PRO}, "repeat-all-over", "granite_swa"),
    "pro-full": (make_pro, {"kv_heads": 1, "sliding": [0, 0, 0]}, None, "qwen3"),
}


@pytest.mark.parametrize("kind", ["f32", "q8_0", "q4_0"])
@pytest.mark.parametrize("name", MODELS)
def test_same_tokens_on_stock(name, kind, stock_lib, tmp_path, monkeypatch):
    # our kernels sum in another order: test_packed.py holds them against these
    monkeypatch.setenv("MOBILELLM_KERNELS", "0")
    make, options, schedule, architecture = MODELS[name]
    checkpoint = make(tmp_path / "c", **SHAPE, **options)
    own, portable = tmp_path / "own.gguf", tmp_path / "portable.gguf"
    convert_checkpoint(checkpoint, own, type=kind, schedule=schedule)
    report = convert_checkpoint(checkpoint, portable, type=kind, schedule=schedule, portable=True)
    assert report.architecture == architecture
    for flash in (False, True):
        ours = greedy(OURS, own, PROMPTS, flash=flash)
        theirs = greedy(stock_lib, portable, PROMPTS, flash=flash)
        assert greedy(OURS, portable, PROMPTS, flash=flash) == theirs
        for prompt, a, b in zip(PROMPTS, ours, theirs, strict=True):
            if a != b and kind != "f32":
                assert_a_tie(own, portable, prompt, a, b)
            else:
                assert a == b


def assert_a_tie(own, portable, prompt, a, b):
    """qwen3 norms before it rotates, and sums the products of a head in another order: last digits,
    which the rounding of activations to 8 bits enlarges to percents of a logit. The two answers may
    part only where two tokens are as likely within that."""
    at = next(i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y)
    tokens = prompt + a[:at]
    for path in (own, portable):
        row = MobileLLM(path, n_ctx=256, n_threads=1).logits(tokens)[-1]
        for token in (a[at], b[at]):
            assert row.max() - row[token] <= ROUNDING * np.abs(row).max()


def test_a_base_model_is_portable_as_it_is(tmp_path):
    checkpoint = make_checkpoint(tmp_path / "c")
    convert_checkpoint(checkpoint, tmp_path / "a.gguf")
    convert_checkpoint(checkpoint, tmp_path / "b.gguf", portable=True)
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_sharing_is_written_out(tmp_path):
    checkpoint = make_checkpoint(tmp_path / "c", sharing=True)
    report = convert_checkpoint(checkpoint, tmp_path / "m.gguf", portable=True)
    assert (report.n_stored, report.n_executed) == (4, 4)
    reader = GGUFReader(tmp_path / "m.gguf")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert (tensors["blk.2.ffn_up.weight"].data == tensors["blk.3.ffn_up.weight"].data).all()
    assert not (tensors["blk.1.ffn_up.weight"].data == tensors["blk.2.ffn_up.weight"].data).all()


REFUSED = {
    "r1": (make_r1, {"rope": [1, 0, 1]}, "layers without RoPE beside a norm of q and k"),
    "r1-no-norm": (make_r1, {"rope": [1, 0, 1], "qk_norm": False}, "layers without RoPE"),
    "pro-no-rope": (
        make_pro,
        {"sliding": [0, 1, 0], "rope": [0, 0, 0], "qk_norm": False},
        "it has no layer with RoPE",
    ),
    "pro": (make_pro, {"sliding": [0, 1, 0]}, "a norm of q and k beside sliding windows"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_stock_cannot_express_is_refused(name, tmp_path):
    make, options, reason = REFUSED[name]
    checkpoint = make(tmp_path / "c", **options)
    with pytest.raises(MobileLLMError, match=reason):
        convert_checkpoint(checkpoint, tmp_path / "m.gguf", portable=True)
    assert not (tmp_path / "m.gguf").exists()


LOAD = "import json, sys, llama_cpp; llama_cpp.Llama(json.loads(sys.argv[1]), verbose=False)"


def test_stock_refuses_a_file_that_is_not_portable(stock_lib, tmp_path):
    convert_checkpoint(make_r1(tmp_path / "c"), tmp_path / "m.gguf")
    done = run_on(stock_lib, LOAD, str(tmp_path / "m.gguf"))
    assert done.returncode == 1 and re.search("Failed to load model", done.stderr)
