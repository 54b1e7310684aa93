"""Stock llama.cpp is the peer: the same greedy tokens from the same weights."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import sentencepiece
from checkpoints import executed, make_checkpoint
from gguf import GGUFReader
from peer import assert_same_tensors, greedy, run_on
from safetensors.numpy import load_file, save_file

from mobilellm_cpp import MobileLLM, convert_checkpoint
from mobilellm_cpp.engine import library

OURS = library.FOLDER
PROMPTS = [[1, 17, 44], [1, 300], [1, *range(40, 120)]]
SHAPE = {"layers": 3, "hidden": 192, "heads": 6, "kv_heads": 2, "ffn": 256, "dtype": "f32"}
SCHEDULES = {
    "immediate": [0, 0, 1, 1, 2, 2],
    "repeat-all-over": [0, 1, 2, 0, 1, 2],
    "reverse": [0, 1, 2, 2, 1, 0],
    "0,2,2,1,0": [0, 2, 2, 1, 0],
}


def written_out(checkpoint, folder, schedule):
    """A checkpoint without sharing that holds every executed layer."""
    weights = executed(load_file(checkpoint / "model.safetensors"), schedule)
    out = make_checkpoint(folder, **{**SHAPE, "layers": len(schedule)})
    save_file(weights, out / "model.safetensors")
    return out


@pytest.mark.parametrize("kind", ["f32", "f16", "q8_0", "q4_0"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_shared_equals_written_out_on_stock(name, kind, stock_lib, tmp_path, monkeypatch):
    # our kernels sum in another order: tests/engine/test_packed.py holds them against these
    monkeypatch.setenv("MOBILELLM_KERNELS", "0")
    checkpoint = make_checkpoint(tmp_path / "shared", **SHAPE)
    plain = written_out(checkpoint, tmp_path / "plain", SCHEDULES[name])
    convert_checkpoint(checkpoint, tmp_path / "shared.gguf", type=kind, schedule=name)
    convert_checkpoint(plain, tmp_path / "plain.gguf", type=kind)
    for flash in (False, True):
        ours = greedy(OURS, tmp_path / "shared.gguf", PROMPTS, flash=flash)
        assert ours == greedy(stock_lib, tmp_path / "plain.gguf", PROMPTS, flash=flash)
    # our own build runs plain llama files the same way
    assert ours == greedy(OURS, tmp_path / "plain.gguf", PROMPTS, flash=True)


SHIFT = """
import json, sys
import llama_cpp
path, prompt = json.loads(sys.argv[1])
llm = llama_cpp.Llama(path, n_ctx=256, n_threads=1, n_threads_batch=1, verbose=False)
llm.eval(prompt)
memory = llama_cpp.llama_get_memory(llm.ctx)
assert llama_cpp.llama_memory_seq_rm(memory, 0, 4, 24)
llama_cpp.llama_memory_seq_add(memory, 0, 24, -1, -20)  # rotates the keys of every layer
llm.n_tokens -= 20
answer = []
for _ in range(32):
    answer.append(llm.sample(temp=0.0))
    llm.eval(answer[-1:])
print(json.dumps(answer))
"""


def test_a_shifted_context_equals_stock(stock_lib, tmp_path):
    checkpoint = make_checkpoint(tmp_path / "shared", **SHAPE)
    plain = written_out(checkpoint, tmp_path / "plain", SCHEDULES["immediate"])
    convert_checkpoint(checkpoint, tmp_path / "s.gguf", type="f32", schedule="immediate")
    convert_checkpoint(plain, tmp_path / "p.gguf", type="f32")
    ours = run_on(OURS, SHIFT, [str(tmp_path / "s.gguf"), PROMPTS[2]])
    stock = run_on(stock_lib, SHIFT, [str(tmp_path / "p.gguf"), PROMPTS[2]])
    assert ours.returncode == 0, ours.stderr[-2000:]
    assert ours.stdout == stock.stdout
    (unshifted,) = greedy(OURS, tmp_path / "s.gguf", [PROMPTS[2]], n=32)
    assert json.loads(ours.stdout) != unshifted


def test_base_file_equals_that_of_the_stock_converter(stock_lib, llama_cpp_source, tmp_path):
    checkpoint = make_checkpoint(tmp_path / "c", architecture="LlamaForCausalLM", **SHAPE)
    convert_checkpoint(checkpoint, tmp_path / "ours.gguf", type="f16")
    script = llama_cpp_source / "convert_hf_to_gguf.py"
    arguments = [checkpoint, "--outtype", "f16", "--outfile", tmp_path / "theirs.gguf"]
    done = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    ours = greedy(stock_lib, tmp_path / "ours.gguf", PROMPTS)
    assert ours == greedy(stock_lib, tmp_path / "theirs.gguf", PROMPTS)
    assert ours == greedy(OURS, tmp_path / "ours.gguf", PROMPTS)


def test_stock_refuses_a_shared_file(stock_lib, tmp_path):
    checkpoint = make_checkpoint(tmp_path / "c", sharing=True)
    convert_checkpoint(checkpoint, tmp_path / "m.gguf")
    done = run_on(
        stock_lib,
        "import json, sys, llama_cpp; llama_cpp.Llama(json.loads(sys.argv[1]), verbose=True)",
        str(tmp_path / "m.gguf"),
    )
    assert done.returncode == 1 and "unknown model architecture: 'mobilellm'" in done.stderr


QUANTIZE = """
import ctypes, json, sys
import llama_cpp
source, target, ftype = json.loads(sys.argv[1])
params = llama_cpp.llama_model_quantize_default_params()
params.ftype = ftype
params.nthread = 1
sys.exit(llama_cpp.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(params)))
"""


@pytest.mark.parametrize("kind, ftype", [("q8_0", 7), ("q4_0", 2)])
def test_llama_quantize_runs_on_a_shared_file(kind, ftype, tmp_path):
    checkpoint = make_checkpoint(tmp_path / "c", **SHAPE, sharing=True)
    convert_checkpoint(checkpoint, tmp_path / "f32.gguf", type="f32")
    convert_checkpoint(checkpoint, tmp_path / "direct.gguf", type=kind)
    target = tmp_path / "quantized.gguf"
    done = run_on(OURS, QUANTIZE, [str(tmp_path / "f32.gguf"), str(target), ftype])
    assert done.returncode == 0, done.stderr[-2000:]
    assert_same_tensors(GGUFReader(tmp_path / "direct.gguf"), GGUFReader(target))
    assert greedy(OURS, target, PROMPTS) == greedy(OURS, tmp_path / "direct.gguf", PROMPTS)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    checkpoint = make_checkpoint(folder / "c")
    convert_checkpoint(checkpoint, folder / "m.gguf")
    spm = sentencepiece.SentencePieceProcessor(model_file=str(checkpoint / "tokenizer.model"))
    return spm, MobileLLM(folder / "m.gguf", n_threads=1)


NASTY = [
    "", " ", "   ", "a", " a", "  a  b   c  ", "\t", "a\tb", "\n", "\r\n", "a\n\n\nb", "\0", "a\0b",
    "😀", "👩‍👧 family", "é", "e\u0301", "\u2581", "a\u2581b", "\ufeffbom", "\u200b", "ｆｕｌｌ",
    "<s>", "</s>", "<unk>", "<0x41>", "[INST]", "你好，世界", "שלום", "ไทย", "0123456789", "1.5e-3",
    "x" * 1000, " " * 1000, "ab " * 300, "\U0010ffff", "İ", "ﬁ", "don't", "a,b;c:d", "CamelCase",
]  # fmt: skip
NO_UTF8 = [
    b"\xff", b"\xfe\xff", b"a\xe2\x82b", b"\xe2\x82", b"\xf0\x9f\x98", b"\xc0\x80", b"\xed\xa0\x80",
    b"\xf8\x88\x80\x80\x80", b"ok \x80 ok", bytes(range(256)), b"\xf4\x90\x80\x80", b"\xe2\x28\xa1",
]  # fmt: skip


@pytest.mark.parametrize("text", NASTY, ids=ascii)
def test_nasty_strings_tokenize_as_sentencepiece(tokenizers, text):
    spm, llm = tokenizers
    assert llm.tokenize(text.encode(), add_bos=False) == spm.encode(text)


@pytest.mark.parametrize("text", NO_UTF8, ids=ascii)
def test_bytes_that_are_no_utf8_tokenize_as_sentencepiece(tokenizers, text):
    spm, llm = tokenizers
    assert llm.tokenize(text, add_bos=False) == spm.encode(text)


def test_100_kilobytes_tokenize_as_sentencepiece(tokenizers):
    spm, llm = tokenizers
    rng = np.random.default_rng(0)
    words = ["lorem", " ", "\t", "😀", "ipsum", "\n", "é", "x", "42", "  "]
    text = "".join(rng.choice(words, 60_000))[:100_000]
    assert len(text.encode()) >= 100_000
    assert llm.tokenize(text.encode(), add_bos=False) == spm.encode(text)


@pytest.mark.parametrize("seed", range(20))
def test_random_bytes_tokenize_as_sentencepiece(tokenizers, seed):
    spm, llm = tokenizers
    text = np.random.default_rng(seed).integers(0, 256, 200, np.uint8).tobytes()
    assert llm.tokenize(text, add_bos=False) == spm.encode(text)


MEMORY = """
import json, sys
from mobilellm_cpp import MobileLLM
def rss():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
start = rss()
llm = MobileLLM(json.loads(sys.argv[1]), n_ctx=64, n_batch=8, use_mmap=False, n_threads=1)
llm.eval([1])
print(json.dumps(rss() - start))
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="reads Linux's /proc")
def test_sharing_costs_no_memory(tmp_path):
    """At the shape of MobileLLM-125M: file within 1 %, memory once loaded within 5 %."""
    from checkpoints import PUBLISHED

    checkpoint = make_checkpoint(tmp_path / "c", **PUBLISHED["125M"], dtype="bf16")
    base, shared = tmp_path / "base.gguf", tmp_path / "shared.gguf"
    convert_checkpoint(checkpoint, base, type="bf16")
    convert_checkpoint(checkpoint, shared, type="bf16", schedule="immediate")
    assert abs(shared.stat().st_size / base.stat().st_size - 1) < 0.01

    def loaded(path):
        done = run_on(OURS, MEMORY, str(path))
        assert done.returncode == 0, done.stderr[-2000:]
        return json.loads(done.stdout)

    # the 30 further KV caches: positions, layers, heads, head size, K and V, f16
    n_kv = 64 * 30 * 3 * 64 * 2 * 2
    assert loaded(shared) - n_kv < 1.05 * loaded(base)
