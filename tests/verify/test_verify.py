"""A file that was converted right passes, and every planted fault fails, in each type."""

import json

import numpy as np
import pytest
from checkpoints import (
    make_checkpoint,
    make_pro,
    make_r1,
    mixed_lines,
    random_tensor,
    tensor_shapes,
    tokenizer_model,
)
from gguf import GGMLQuantizationType, GGUFReader, quantize
from gguf_edit import ARRAY, BOOL, F32, STRING, U32, rewrite
from lattices import WIDTHS, pareto

from mobilellm_cpp import CheckpointError, ModelError, convert_checkpoint
from mobilellm_cpp.engine.gguf_file import open_gguf
from mobilellm_cpp.inspection import tokenizer_check
from mobilellm_cpp.inspection.tokenizer_check import TEXT
from mobilellm_cpp.inspection.verification import NOISE_FACTOR, verify

KINDS = ("f16", "q8_0", "q4_0")
SHAPE = {"layers": 3, "hidden": 128, "ffn": 192, "heads": 4, "kv_heads": 2}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("verify")


@pytest.fixture(scope="module")
def shared(home):
    return make_checkpoint(home / "shared", sharing=True, **SHAPE)


@pytest.fixture(scope="module")
def base(home):
    return make_checkpoint(home / "base", tied=False, dtype="f16", **SHAPE)


@pytest.fixture(scope="module")
def r1(home):
    return make_r1(home / "r1", rope=[1, 0, 1], **SHAPE)


@pytest.fixture(scope="module")
def pro(home):
    return make_pro(home / "pro", sliding=[0, 1, 1], window=40, **SHAPE)


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param


def converted(checkpoint, kind, **arguments):
    """The file of a checkpoint in a type, made once."""
    path = checkpoint.with_name(f"{checkpoint.name}-{kind}.gguf")
    if not path.exists():
        convert_checkpoint(checkpoint, path, type=kind, **arguments)
    return path


def check(path, checkpoint, **arguments):
    return verify(path, checkpoint, n_threads=1, **arguments)


@pytest.mark.parametrize("kind", ["f32", "bf16", *KINDS])
@pytest.mark.parametrize("name", ["shared", "base", "r1", "pro"])
def test_a_right_file_passes(name, kind, request):
    checkpoint = request.getfixturevalue(name)
    done = check(converted(checkpoint, kind), checkpoint)
    assert done.ok, done.failures
    assert done.graph.ratio < NOISE_FACTOR and done.tokenizer.alike == done.tokenizer.texts > 20
    assert done.logits.positions > 100 and done.logits.spread > 1
    reader = GGUFReader(converted(checkpoint, kind))
    assert {t.name for t in done.tensors} == {t.name for t in reader.tensors}
    for tensor in done.tensors:
        matrix = tensor.type in ("q8_0", "q4_0")
        assert (0.8 if matrix else 0) <= tensor.share <= 1 and tensor.outside == 0


def info(path, name):
    with open_gguf(path) as file:
        return next(tensor for tensor in file.tensors() if tensor.name == name)


def raw(path, name):
    """A tensor's rows as bytes [rows, bytes of a row], and its type."""
    tensor = info(path, name)
    data = np.fromfile(path, np.uint8, tensor.n_bytes, offset=tensor.start)
    return data.reshape(tensor.n_elements // tensor.shape[-1], -1), tensor.type


def planted(path, target, wrong):
    """A copy of a file with other bytes in some of its tensors."""
    data = bytearray(path.read_bytes())
    for name, rows in wrong.items():
        tensor, stored = info(path, name), rows.tobytes()
        assert len(stored) == tensor.n_bytes
        data[tensor.start : tensor.start + tensor.n_bytes] = stored
    target.write_bytes(data)
    return target


def swap_heads(path, name="blk.1.attn_q.weight", size=32):
    rows, _ = raw(path, name)
    rows[:size], rows[size : 2 * size] = rows[size : 2 * size].copy(), rows[:size].copy()
    return {name: rows}


def swap(path, one, other):
    return {one: raw(path, other)[0], other: raw(path, one)[0]}


def unpermuted(path, name="blk.0.attn_q.weight"):
    """The rows of q as the checkpoint has them: halves of a head apart."""
    rows, _ = raw(path, name)
    return {name: rows.reshape(-1, 16, 2, rows.shape[1]).swapaxes(1, 2)}


def one_weight(path, name="blk.2.ffn_down.weight"):
    """A single weight moves by two steps of its block, or by one unit in the last place."""
    rows, kind = raw(path, name)
    if kind == "f16":
        rows.view(np.uint16)[5, 7] ^= 1
    else:  # the byte after the scale: weight 0, in q4_0 in its lower half
        rows[5, 2] = rows[5, 2] + 2 if rows[5, 2] % 16 < 8 else rows[5, 2] - 2
    return {name: rows}


def wrong_scale(path, name="blk.0.ffn_up.weight"):
    """A tensor that is larger than the checkpoint's by a hundredth (q4_0: a tenth)."""
    rows, kind = raw(path, name)
    factor = np.float16(1.1 if kind == "q4_0" else 1.01)
    if kind == "f16":
        return {name: rows.view(np.float16) * factor}
    block = 34 if kind == "q8_0" else 18  # bytes, the scale first
    blocks = rows.reshape(-1, block)
    blocks[:, :2] = (blocks[:, :2].copy().view(np.float16) * factor).view(np.uint8)
    return {name: blocks}


TENSOR_FAULTS = {
    "permuted q head": swap_heads,
    "permuted k head": lambda path: swap_heads(path, "blk.0.attn_k.weight"),
    "permuted v head": lambda path: swap_heads(path, "blk.2.attn_v.weight"),
    "swapped gate and up": lambda path: swap(path, "blk.1.ffn_gate.weight", "blk.1.ffn_up.weight"),
    "swapped k and v": lambda path: swap(path, "blk.1.attn_k.weight", "blk.1.attn_v.weight"),
    "swapped blocks": lambda path: swap(
        path, "blk.1.attn_output.weight", "blk.2.attn_output.weight"
    ),
    "swapped norms": lambda path: swap(path, "blk.1.attn_norm.weight", "blk.1.ffn_norm.weight"),
    "a norm of ones": lambda path: {"blk.0.ffn_norm.weight": np.ones(128, np.float32)},
    "a final norm of ones": lambda path: {"output_norm.weight": np.ones(128, np.float32)},
    "halves not interleaved": unpermuted,
    "a single weight": one_weight,
    "a wrong scale": wrong_scale,
}


@pytest.mark.parametrize("fault", TENSOR_FAULTS)
def test_a_fault_in_a_tensor_fails(fault, kind, shared, tmp_path):
    right = converted(shared, kind)
    wrong = TENSOR_FAULTS[fault](right)
    done = check(planted(right, tmp_path / "m.gguf", wrong), shared, text=TEXT[:150])
    assert {tensor.name for tensor in done.tensors if tensor.outside} == set(wrong)
    assert {sentence.split()[0] for sentence in done.failures} == set(wrong)
    assert done.graph.ratio < NOISE_FACTOR  # it computes right, from wrong weights


def off_by_one(blocks):
    return {"mobilellm.block_schedule": (blocks, ARRAY, U32)}


METADATA_FAULTS = {
    "rope base": ("shared", {"mobilellm.rope.freq_base": (5e5, F32)}),
    "rope base of the default": ("r1", {"mobilellm.rope.freq_base": None}),
    "schedule off by one": ("shared", off_by_one([0, 1, 1, 2, 2, 0])),
    "schedule in another order": ("shared", off_by_one([0, 1, 2, 0, 1, 2])),
    "a layer too few": ("shared", off_by_one([0, 0, 1, 1, 2])),
    "norm epsilon": ("shared", {"mobilellm.attention.layer_norm_rms_epsilon": (0.05, F32)}),
    "no q and k norm": ("r1", {"mobilellm.attention.qk_norm": None}),
    "RoPE everywhere": ("r1", {"mobilellm.attention.rope_pattern": None}),
    "RoPE in the wrong blocks": (
        "r1",
        {"mobilellm.attention.rope_pattern": ([0, 1, 1], ARRAY, U32)},
    ),
    "another window": ("pro", {"mobilellm.attention.sliding_window": (32, U32)}),
    "windows in the wrong blocks": (
        "pro",
        {"mobilellm.attention.sliding_window_pattern": ([True, False, True], ARRAY, BOOL)},
    ),
}


@pytest.mark.parametrize("fault", METADATA_FAULTS)
def test_a_fault_in_the_metadata_fails_twice(fault, kind, tmp_path, request):
    """By what the file says, and by what llama.cpp computes then."""
    name, fields = METADATA_FAULTS[fault]
    checkpoint = request.getfixturevalue(name)
    wrong = rewrite(converted(checkpoint, kind), tmp_path / "m.gguf", fields)
    done = check(wrong, checkpoint, text=TEXT[:200])
    said, computed = done.failures
    assert "config.json makes it" in said and "llama.cpp computes" in computed
    assert done.graph.ratio > 2 * NOISE_FACTOR


def words(path, **changed):
    """The token list with the texts of some ids replaced."""
    tokens = GGUFReader(path).fields["tokenizer.ggml.tokens"].contents()
    for name, text in changed.items():
        tokens[int(name[1:])] = text
    return {"tokenizer.ggml.tokens": (tokens, ARRAY, STRING)}


def swapped(path, one, other):
    tokens = GGUFReader(path).fields["tokenizer.ggml.tokens"].contents()
    return words(path, **{f"_{one}": tokens[other], f"_{other}": tokens[one]})


def merges_backwards(path):
    merges = GGUFReader(path).fields["tokenizer.ggml.merges"].contents()
    return {"tokenizer.ggml.merges": (merges[::-1], ARRAY, STRING)}


TOKENIZER_FAULTS = {
    "two tokens swapped": ("base", lambda path: swapped(path, 300, 301)),
    "no bos": ("base", lambda path: {"tokenizer.ggml.add_bos_token": (False, BOOL)}),
    "another bos": ("base", lambda path: {"tokenizer.ggml.bos_token_id": (2, U32)}),
    "another eos": ("base", lambda path: {"tokenizer.ggml.eos_token_id": (5, U32)}),
    "no space before": ("base", lambda path: {"tokenizer.ggml.add_space_prefix": (False, BOOL)}),
    "merges in another order": ("r1", lambda path: merges_backwards(path)),
    "no bos, byte-level": ("r1", lambda path: {"tokenizer.ggml.add_bos_token": (False, BOOL)}),
    "an end missing": ("pro", lambda path: {"tokenizer.ggml.eos_token_id": (400, U32)}),
    "two bytes swapped": ("pro", lambda path: swapped(path, 65, 66)),
}


@pytest.mark.parametrize("fault", TOKENIZER_FAULTS)
def test_a_fault_in_the_tokenizer_fails(fault, tmp_path, request):
    name, change = TOKENIZER_FAULTS[fault]
    checkpoint = request.getfixturevalue(name)
    right = converted(checkpoint, "q8_0")
    done = check(rewrite(right, tmp_path / "m.gguf", change(right)), checkpoint, text=TEXT[:99])
    assert done.failures == done.tokenizer.differences != []


def test_tokens_that_sentencepiece_does_not_know(tmp_path):
    """Added tokens, and a tokenizer that puts no space before a text."""
    checkpoint = make_checkpoint(tmp_path / "m", vocab=516)
    (checkpoint / "tokenizer.model").write_bytes(tokenizer_model(512))
    (checkpoint / "added_tokens.json").write_text('{"[INST]": 512, "Hello": 513}')
    settings = {"add_prefix_space": False, "added_tokens_decoder": {"514": {"content": "if"}}}
    (checkpoint / "tokenizer_config.json").write_text(json.dumps(settings))
    done = check(converted(checkpoint, "f16"), checkpoint)
    assert done.ok, done.failures
    assert 30 < done.tokenizer.texts < 45


def test_a_token_that_is_no_text_fails(base, tmp_path):
    right = converted(base, "q8_0")
    data = right.read_bytes()
    piece = GGUFReader(right).fields["tokenizer.ggml.tokens"].contents()[400].encode()
    at = data.index(len(piece).to_bytes(8, "little") + piece) + 8
    (tmp_path / "m.gguf").write_bytes(data[:at] + b"\xff" + data[at + 1 :])
    done = check(tmp_path / "m.gguf", base)
    assert any(
        "1 tokens are not the checkpoint's: the first is 400:" in text for text in done.failures
    )


def test_another_checkpoint_fails(shared, base, tmp_path):
    done = check(converted(shared, "f16"), make_checkpoint(tmp_path / "m", layers=4, sharing=True))
    assert not done.ok and done.graph is None
    assert any("the file holds 3 blocks, the checkpoint 4" in text for text in done.failures)
    assert any("has shape" in text for text in done.failures)
    done = check(converted(base, "f16"), shared)
    assert any("executed blocks" in text for text in done.failures)
    assert sum("is not the checkpoint's" in text for text in done.failures) > 20
    assert done.logits.kl_divergence > 1 and done.logits.top1_agreement < 0.1


def test_tensors_too_many_and_too_few(shared, tmp_path):
    """llama.cpp refuses such files; tensors that it ignores are named all the same."""
    right = converted(shared, "f16")
    with pytest.raises(ModelError):
        check(rewrite(right, tmp_path / "a.gguf", None, {"blk.0.ffn_up.weight": None}), shared)
    extra = {"blk.0.attn_q.bias": np.ones(128, np.float32)}
    with pytest.raises(ModelError, match="attn_q.bias"):
        check(rewrite(right, tmp_path / "b.gguf", None, extra), shared)


@pytest.mark.parametrize("name", ["shared", "whole r1", "pro without norm"])
def test_a_portable_file_passes(name, kind, shared, tmp_path):
    checkpoint = shared
    if name == "whole r1":
        checkpoint = make_r1(tmp_path / "c", **SHAPE)
    if name == "pro without norm":
        options = {"sliding": [0, 1, 1], "window": 40, "rope": [1, 0, 1], "qk_norm": False}
        checkpoint = make_pro(tmp_path / "c", **options, **SHAPE)
    path = convert_checkpoint(checkpoint, tmp_path / "m.gguf", type=kind, portable=True).path
    done = check(path, checkpoint)
    assert done.ok, done.failures
    blocks = {t.name.split(".")[1] for t in done.tensors if t.name.startswith("blk.")}
    assert len(blocks) == (6 if name == "shared" else 3)

    heads = planted(path, tmp_path / "w.gguf", swap_heads(path))
    wrong = check(heads, checkpoint, text=TEXT[:99])
    assert not wrong.ok and "blk.1.attn_q.weight" in wrong.failures[0]
    arch = GGUFReader(path).fields["general.architecture"].contents()
    base = {f"{arch}.rope.freq_base": (2e4, F32)}
    wrong = check(rewrite(path, tmp_path / "w.gguf", base), checkpoint)
    assert [text.split()[0] for text in wrong.failures] == ["RoPE", "llama.cpp"]


def test_a_qk_norm_with_weights_fails(tmp_path):
    """Portable R1 files have norms of ones, which the checkpoint does not."""
    checkpoint = make_r1(tmp_path / "c", **SHAPE)
    path = convert_checkpoint(checkpoint, tmp_path / "m.gguf", portable=True).path
    norm = {"blk.1.attn_k_norm.weight": np.full(32, 1.5, np.float32)}
    done = check(rewrite(path, tmp_path / "w.gguf", None, norm), checkpoint)
    assert done.failures == [
        "blk.1.attn_k_norm.weight does not hold what leaves attention as it is"
    ]


def test_a_schedule_and_a_setting_of_the_users(tmp_path):
    checkpoint = make_pro(tmp_path / "c", rope_theta=..., **SHAPE)
    path = tmp_path / "m.gguf"
    options = {"schedule": "reverse", "settings": {"rope_theta": 5e4}}
    convert_checkpoint(checkpoint, path, **options)
    assert check(path, checkpoint, **options).ok
    assert not check(path, checkpoint, settings={"rope_theta": 5e4}).ok
    wrong = check(path, checkpoint, schedule="reverse", settings={"rope_theta": 6e4})
    assert len(wrong.failures) == 2
    with pytest.raises(CheckpointError, match="rope_theta"):
        check(path, checkpoint)


def test_a_type_whose_rounding_is_not_known(shared, tmp_path):
    """Files that llama-quantize made: a row may be off by what its bits allow."""
    right = converted(shared, "f16")
    name = "blk.1.ffn_down.weight"
    values = raw(right, name)[0].view(np.float16).astype(np.float32)
    data = quantize(values, GGMLQuantizationType.Q5_1)
    path = rewrite(right, tmp_path / "m.gguf", None, {name: (data, GGMLQuantizationType.Q5_1)})
    done = check(path, shared)
    assert done.ok, done.failures
    data[[3, 4]] = data[[4, 3]]
    path = rewrite(right, tmp_path / "w.gguf", None, {name: (data, GGMLQuantizationType.Q5_1)})
    (tensor,) = [t for t in check(path, shared).tensors if t.outside]
    assert (tensor.name, tensor.outside) == (name, 2)


def test_texts(shared):
    path = converted(shared, "f16")
    done = check(path, shared, text="the and a I")
    assert done.ok and done.logits.tokens == done.logits.positions < 30
    assert check(path, shared, text="x" * 100_000).logits.tokens == 256
    assert check(path, shared, text="").logits.tokens == 1  # bos
    with pytest.raises(ModelError, match="the text to compare logits on is empty"):
        no_bos = {"tokenizer.ggml.add_bos_token": (False, BOOL)}
        check(rewrite(path, path.with_name("no_bos.gguf"), no_bos), shared, text="")


@pytest.mark.parametrize("width", WIDTHS)
def test_an_exact_file_passes(width, tmp_path):
    """ParetoQ's lattices in Q1_0, Q2_0 and Q4_0."""
    shape = {**SHAPE, "ffn": 256}
    shapes = tensor_shapes(3, 128, 128, 64, 256, 512, True)
    stored = {
        name: pareto(random_tensor(name, size, 0), WIDTHS[width])
        for name, size in shapes.items()
        if name.endswith("_proj.weight")
    }
    options = {"architecture": "LlamaForCausalLM", "tensors": stored, **shape}
    checkpoint = make_checkpoint(tmp_path / "c", **options)
    path = convert_checkpoint(checkpoint, tmp_path / "m.gguf", type="exact").path
    done = check(path, checkpoint)
    assert done.ok, done.failures
    assert {"1": "q1_0", "1.58": "q2_0"}.get(width, "q4_0") in {t.type for t in done.tensors}
    heads = planted(path, tmp_path / "w.gguf", swap_heads(path))
    (tensor,) = [t for t in check(heads, checkpoint, text=TEXT[:99]).tensors if t.outside]
    assert tensor.name == "blk.1.attn_q.weight" and tensor.outside > 32 * 128


def test_an_end_that_the_tokenizer_names_beside_the_config(tmp_path):
    checkpoint = make_r1(tmp_path / "r1", eos_token_id=505, **SHAPE)
    assert check(converted(checkpoint, "f16"), checkpoint).ok


def test_a_byte_level_tokenizer_goes_before_tokenizer_model(tmp_path):
    checkpoint = make_r1(tmp_path / "r1", **SHAPE)
    (checkpoint / "tokenizer.model").write_bytes(tokenizer_model(512))
    assert check(converted(checkpoint, "f16"), checkpoint).ok


def test_chunks_that_hold_a_short_context(tmp_path):
    chunks = {"layer_types": ["chunked_attention"] * 3, "attention_chunk_size": 2048}
    checkpoint = make_r1(tmp_path / "r1", **chunks, **SHAPE)
    assert check(converted(checkpoint, "f16"), checkpoint).ok


@pytest.mark.parametrize(
    "edit, part",
    [
        ({"tokenizer.ggml.add_eos_token": (True, BOOL)}, "tokens of 'Hello world'"),
        ({"tokenizer.chat_template": ("{{ messages }}", STRING)}, "the chat template is not"),
    ],
)
def test_a_fault_in_what_surrounds_a_text_fails(edit, part, shared, tmp_path):
    path = rewrite(converted(shared, "f16"), tmp_path / "bad.gguf", edit)
    assert any(part in failure for failure in check(path, shared).failures)


def test_a_setting_that_nothing_reads_is_refused(shared):
    with pytest.raises(CheckpointError, match="nonsense is not a field that this model reads"):
        check(converted(shared, "f16"), shared, settings={"nonsense": 1})


def test_a_portable_pro_of_a_vocabulary_that_stock_cuts_otherwise(tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizer_check, "TEXTS", ("Hello world", *mixed_lines()[:20]))
    checkpoint = make_pro(tmp_path / "pro", qk_norm=False, vocab=900, **SHAPE)
    convert_checkpoint(checkpoint, tmp_path / "m.gguf", portable=True)
    found = check(tmp_path / "m.gguf", checkpoint)
    assert found.ok and found.tokenizer.alike < found.tokenizer.texts
