"""Corrupt and hostile GGUF files: a Python exception with the reason, never an abort or a crash.

Other architectures: test_hostile_other_architectures.py; what is no file: test_hostile_*.py.
"""

import subprocess
import sys

import numpy as np
import pytest
from checkpoints import make_checkpoint, make_pro
from gguf import GGMLQuantizationType
from gguf_edit import ARRAY, BOOL, F32, I32, STRING, U32, rewrite
from hostile import assert_outcomes, outcomes
from tokenizers import Tokenizer

from mobilellm_cpp import MobileLLM, ModelError, convert_checkpoint

ARCHITECTURES = ("mobilellm", "llama")


@pytest.fixture(scope="module", params=ARCHITECTURES)
def model(request, tmp_path_factory):
    """(architecture, GGUF file): 2 blocks, 64 wide, 4 heads of 16, 2 KV heads, 512 tokens."""
    folder = tmp_path_factory.mktemp("hostile")
    make_checkpoint(folder / "c", dtype="f32", sharing=request.param == "mobilellm")
    convert_checkpoint(folder / "c", folder / "good.gguf", type="f32")
    return request.param, folder / "good.gguf"


def one_bad_row() -> np.ndarray:
    embedding = np.random.default_rng(0).normal(size=(512, 64)).astype(np.float32)
    embedding[300, 5] = np.nan
    return embedding


def tokens(changes: dict[int, str] | None = None, n: int = 512) -> tuple[list[str], object, object]:
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    words += [f"w{i}" for i in range(512 - len(words))]
    for i, word in (changes or {}).items():
        words[i] = word
    return words[:n], ARRAY, STRING


# key without the architecture's prefix, what is written, a part of the sentence
METADATA = [
    ("block_count", (0, U32), "block_count is 0"),
    ("block_count", (1000, U32), "block_count is 1000"),
    ("block_count", (2**32 - 1, U32), "block_count is 4294967295"),
    ("block_count", (3, U32), None),
    ("block_count", (1, U32), None),
    ("block_count", ("two", STRING), "block_count is not a 32-bit integer"),
    ("block_count", None, "block_count is missing"),
    ("attention.head_count", (0, U32), "head_count is 0"),
    ("attention.head_count", (3, U32), "head_count is 3"),
    ("attention.head_count", (8, U32), None),
    ("attention.head_count", (2**31, U32), "head_count is 2147483648"),
    ("attention.head_count", None, "head_count is missing"),
    ("attention.head_count_kv", (0, U32), "head_count_kv is 0"),
    ("attention.head_count_kv", (3, U32), "not a multiple of 3 KV heads"),
    ("attention.head_count_kv", (8, U32), "not a multiple of 8 KV heads"),
    ("attention.head_count_kv", ([2, 0], ARRAY, U32), "head_count_kv is 0"),
    ("attention.head_count_kv", ([2], ARRAY, U32), None),
    ("attention.head_count_kv", ([2, 4, 2], ARRAY, U32), None),
    ("attention.key_length", (0, U32), "key_length is 0"),
    ("attention.key_length", (32, U32), "key_length is 32 but"),
    ("attention.value_length", (7, U32), "value_length is 7"),
    ("embedding_length", (0, U32), "embedding_length is 0"),
    ("embedding_length", (128, U32), None),
    ("embedding_length", (2**31, U32), "embedding_length is 2147483648"),
    ("feed_forward_length", (0, U32), "feed_forward_length is 0"),
    ("feed_forward_length", (2**32 - 1, U32), "feed_forward_length is 4294967295"),
    ("context_length", (0, U32), "context_length is 0"),
    ("context_length", (2**32 - 1, U32), "context_length is 4294967295"),
    ("context_length", None, "context_length is missing"),
    ("rope.dimension_count", (0, U32), "dimension_count is 0"),
    ("rope.dimension_count", (15, U32), "dimension_count is 15"),
    ("rope.dimension_count", (32, U32), "dimension_count is 32"),
    ("rope.freq_base", (float("nan"), F32), "freq_base is nan"),
    ("rope.freq_base", (0.0, F32), "freq_base is 0"),
    ("rope.freq_base", (1, U32), "freq_base is not a 32-bit float"),
    ("rope.scaling.type", ("sideways", STRING), "'sideways' is unknown|is not a key"),
    ("rope.scaling.factor", (float("inf"), F32), "factor is inf|is not a key"),
    ("attention.layer_norm_rms_epsilon", (float("nan"), F32), "epsilon is nan"),
    ("attention.layer_norm_rms_epsilon", None, "layer_norm_rms_epsilon"),
    ("expert_count", (4, U32), "is not a key|expert_used_count is missing"),
    ("expert_count", (4, U32, "expert_used_count", [1, 0]), "is not a key|expert_used_count is 0"),
    ("expert_count", (4, U32, "expert_used_count", [5, 1]), "is not a key|expert_used_count is 5"),
    ("embedding_length_out", (1, U32), "is not a key|embedding_length_out is 1"),
    ("embedding_length_out", (4096, U32), "is not a key|embedding_length_out is 4096"),
    ("pooling_type", (99, U32), "is not a key|pooling_type is 99"),
    ("pooling_type", (1, U32), "is not a key|runs"),
    ("nextn_predict_layers", (1, U32), "is not a key|nextn_predict_layers is 1"),
    ("attention.causal", (False, BOOL), "is not a key|runs|cannot be run"),
    ("attention.qk_norm", (True, BOOL), "is not a key|runs"),
    ("vocab_size", (2**32 - 1, U32), "runs"),
    ("general.architecture", ("nonsense", STRING), "unknown model architecture: 'nonsense'"),
    ("general.architecture", None, "architecture"),
    ("tokenizer.ggml.tokens", tokens({300: "w1"}), "the same token at 260 and 300"),
    ("tokenizer.ggml.tokens", tokens(n=2), "2 tokens"),
    ("tokenizer.ggml.tokens", tokens(n=500), "token_embd.weight"),
    ("tokenizer.ggml.tokens", tokens({i: "" for i in range(3, 400)}), "cannot spell"),
    ("tokenizer.ggml.tokens", ([1, 2, 3], ARRAY, U32), "tokenizer.ggml.tokens"),
    ("tokenizer.ggml.tokens", None, "cannot find tokenizer vocab"),
    ("tokenizer.ggml.scores", ([0.0], ARRAY, F32), "scores"),
    ("tokenizer.ggml.scores", ("x", STRING), "scores"),
    ("tokenizer.ggml.token_type", ([1], ARRAY, I32), "toktypes"),
    ("tokenizer.ggml.token_type", ([99] * 512, ARRAY, I32), None),
    ("tokenizer.ggml.model", ("morse", STRING), "unknown tokenizer: 'morse'"),
    ("tokenizer.ggml.model", ("gpt2", STRING), "merges"),
    ("tokenizer.ggml.model", ("none", STRING), None),
    ("tokenizer.ggml.bos_token_id", (99999, U32), "runs"),
    ("tokenizer.ggml.eos_token_id", (2**32 - 1, U32), "runs"),
    ("tokenizer.chat_template", ("{% for", STRING), "the chat template of this file fails"),
    ("tokenizer.chat_template", ("{{ 1 // 0 }}", STRING), "the chat template of this file fails"),
    ("tokenizer.chat_template", ("{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}", STRING), None),
    ("tokenizer.chat_template", ("", STRING), None),
]  # fmt: skip

SCHEDULES = [
    (([0, 2], ARRAY, U32), "names block 2, but only 2 blocks are stored"),
    (([0, 2**32 - 1, 1], ARRAY, U32), "names block 4294967295"),
    (([0] * 512 + [1], ARRAY, U32), "makes 513 layers"),
    (([0, 0, 0], ARRAY, U32), "never runs block 1"),
    (([0, 1], ARRAY, I32), "is not an array of 32-bit unsigned integers"),
    (([0.0, 1.0], ARRAY, F32), "is not an array of 32-bit unsigned integers"),
    ((1, U32), "is not an array of 32-bit unsigned integers"),
    (("0,0,1,1", STRING), "is not an array of 32-bit unsigned integers"),
    (([1, 0] * 256, ARRAY, U32), "runs"),
    (None, "runs"),
]

# of a Pro file of three blocks
LAYERS = [
    ("attention.qk_norm", (1, U32), "qk_norm is neither true nor false"),
    ("attention.qk_norm", None, "runs"),
    ("attention.sliding_window", (0, U32), "sliding_window is 0"),
    ("attention.sliding_window", (2**32 - 1, U32), "sliding_window is 4294967295"),
    ("attention.sliding_window", ([16, 16, 16], ARRAY, U32), "sliding_window is an array"),
    ("attention.sliding_window", (1, U32), "runs"),
    ("attention.sliding_window", (4096, U32), "runs"),
    ("attention.sliding_window", None, "not both there"),
    ("attention.sliding_window_pattern", None, "not both there"),
    ("attention.sliding_window_pattern", ([True] * 2, ARRAY, BOOL), "array of 3 booleans"),
    ("attention.sliding_window_pattern", ([1, 0, 1], ARRAY, U32), "array of 3 booleans"),
    ("attention.sliding_window_pattern", (True, BOOL), "array of 3 booleans"),
    ("attention.sliding_window_pattern", ([True] * 3, ARRAY, BOOL), "runs"),
    ("attention.sliding_window_pattern", ([False] * 3, ARRAY, BOOL), "names no layer"),
    ("attention.rope_pattern", ([1, 1, 2], ARRAY, U32), "rope_pattern is 2"),
    ("attention.rope_pattern", ([1], ARRAY, U32), "array of 3 32-bit"),
    ("attention.rope_pattern", ([1, 0, 1], ARRAY, I32), "array of 3 32-bit"),
    ("attention.rope_pattern", ([0, 0, 0], ARRAY, U32), "runs"),
    ("block_schedule", ([0, 1, 2] * 170, ARRAY, U32), "runs"),
    ("tokenizer.ggml.merges", None, "merges"),
    ("tokenizer.ggml.merges", (["a"], ARRAY, STRING), None),
    ("tokenizer.ggml.merges", (["", " ", "a b c"], ARRAY, STRING), None),
    ("tokenizer.ggml.merges", ([1], ARRAY, U32), "merges"),
    ("tokenizer.ggml.pre", ("morse", STRING), "morse"),
    ("tokenizer.ggml.model", ("llama", STRING), None),
    ("tokenizer.ggml.tokens", tokens(), None),
]

BAD = GGMLQuantizationType
TENSORS = [
    ({"blk.1.attn_q.weight": None}, "blk.1.attn_q.weight"),
    ({"token_embd.weight": None}, "token_embd.weight"),
    ({"output_norm.weight": None}, "output_norm.weight"),
    ({"blk.0.attn_q.weight": np.ones((64, 32), np.float32)}, "blk.0.attn_q.weight"),
    ({"blk.0.attn_k.weight": np.ones((64, 64), np.float32)}, "blk.0.attn_k.weight"),
    ({"blk.0.ffn_down.weight": np.ones((128, 64), np.float32)}, "blk.0.ffn_down.weight"),
    ({"blk.0.attn_norm.weight": np.ones((64, 64), np.float32)}, "blk.0.attn_norm.weight"),
    ({"token_embd.weight": np.ones((4, 64), np.float32)}, "token_embd.weight"),
    ({"blk.0.attn_norm.weight": np.ones(64, np.float16)}, "a vector must be f32"),
    ({"blk.0.attn_q.weight": np.ones((64, 64), np.int32)}, "has type i32"),
    ({"blk.0.attn_q.weight": np.ones((64, 64), np.float64)}, "has type f64"),
    ({"token_embd.weight": np.ones((512, 64), np.int8)}, "has type i8"),
    ({"blk.0.attn_q.weight": (np.zeros((64, 292), np.uint8), BAD.Q8_K)}, "has type q8_K"),
    ({"output_norm.weight": np.full(64, np.nan, np.float32)}, "is damaged"),
    ({"blk.0.attn_q.weight": np.full((64, 64), np.inf, np.float32)}, "is damaged"),
    ({"token_embd.weight": np.full((512, 64), np.nan, np.float32)}, "is damaged"),
    ({"token_embd.weight": np.full((512, 64), 3e38, np.float32)}, None),
    ({"token_embd.weight": one_bad_row()}, "is damaged"),
    ({"blk.7.attn_q.weight": np.ones((64, 64), np.float32)}, "blk.7.attn_q|wrong number"),
    ({"blk.1.attn_q.scale": np.ones(1, np.float32)}, None),
    ({"rope_freqs.weight": np.ones(3, np.float32)}, "rope_freqs"),
]


def test_unsound_layers(tmp_path):
    make_pro(tmp_path / "c", dtype="f32")
    good = tmp_path / "good.gguf"
    convert_checkpoint(tmp_path / "c", good, type="f32")
    wanted = {good: "runs"}
    for i, (key, edit, part) in enumerate(LAYERS):
        name = key if key.startswith("tokenizer.") else f"mobilellm.{key}"
        path = rewrite(good, tmp_path / f"{i}-{key}.gguf", {name: edit})
        wanted[path] = part
    assert_outcomes(wanted)


def test_metadata(model, tmp_path):
    arch, good = model
    wanted = {}
    for i, (key, edit, part) in enumerate(METADATA):
        name = key if key.startswith(("general.", "tokenizer.")) else f"{arch}.{key}"
        edits = {name: edit}
        if edit and len(edit) == 4:  # a second key goes with it
            edits = {name: edit[:2], f"{arch}.{edit[2]}": (edit[3], ARRAY, U32)}
        path = rewrite(good, tmp_path / f"{i}-{key}.gguf", edits)
        wanted[path] = part
    assert_outcomes(wanted)


def test_schedules(model, tmp_path):
    arch, good = model
    if arch == "mobilellm":
        wanted = {}
        for i, (edit, part) in enumerate(SCHEDULES):
            path = rewrite(good, tmp_path / f"{i}.gguf", {"mobilellm.block_schedule": edit})
            wanted[path] = part
        assert_outcomes(wanted)


def test_empty_schedule(model, tmp_path):
    """gguf-py does not write empty arrays: the count is changed in the bytes."""
    arch, good = model
    if arch == "mobilellm":
        data = good.read_bytes()
        key = b"mobilellm.block_schedule"
        at = data.index(key) + len(key) + 4 + 4  # behind the value's type and the items' type
        assert data[at : at + 8] == (4).to_bytes(8, "little")
        path = tmp_path / "empty.gguf"
        path.write_bytes(data[:at] + bytes(8) + data[at + 8 + 16 :] + bytes(16))
        assert_outcomes({path: "block_schedule is empty"})


def test_tensors(model, tmp_path):
    _, good = model
    wanted = {}
    for i, (edits, part) in enumerate(TENSORS):
        path = rewrite(good, tmp_path / f"{i}-{next(iter(edits))}.gguf", tensors=edits)
        wanted[path] = part
    assert_outcomes(wanted)


def test_truncated_and_foreign_files(model, tmp_path):
    _, good = model
    data = good.read_bytes()
    files = {f"cut-{n}": data[: len(data) * n // 40] for n in range(40)}
    files |= {
        "text": b"This is no model.\n" * 1000,
        "zeros": bytes(4096),
        "version-1": data[:4] + (1).to_bytes(4, "little") + data[8:],
        "version-99": data[:4] + (99).to_bytes(4, "little") + data[8:],
        "big-endian": data[:4] + data[4:8][::-1] + data[8:],
        "tensor-count": data[:8] + (2**62).to_bytes(8, "little") + data[16:],
        "key-count": data[:16] + (2**62).to_bytes(8, "little") + data[24:],
    }
    wanted = {}
    for name, content in files.items():
        path = tmp_path / f"{name}.gguf"
        path.write_bytes(content)
        cut = " is cut short" if name.startswith("cut-") else ""
        wanted[path] = f"{path}{cut}"  # the sentence names the file
    assert_outcomes(wanted)


def test_missing_bytes_are_counted(model, tmp_path):
    _, good = model
    size = good.stat().st_size
    path = tmp_path / "cut.gguf"
    path.write_bytes(good.read_bytes()[: size - 1000])
    with pytest.raises(ModelError, match=rf"short: 1,000 of {size:,} bytes .*; download it"):
        MobileLLM(path)


@pytest.mark.parametrize("seed", range(4))
def test_flipped_bytes_in_the_header(model, tmp_path, seed):
    _, good = model
    rng = np.random.default_rng(seed)
    data = bytearray(good.read_bytes())
    header = data.index(b"output_norm.weight")
    paths = []
    for i in range(25):
        mutant = bytearray(data)
        for at in rng.integers(0, header, rng.integers(1, 4)):
            mutant[at] = rng.integers(0, 256)
        paths.append(tmp_path / f"{i}.gguf")
        paths[-1].write_bytes(mutant)
    outcomes(paths)


LONG = """
import sys
from mobilellm_cpp import MobileLLM, MobileLLMError
llm = MobileLLM(sys.argv[1], n_ctx=64, n_threads=1)
for word in sys.argv[2:]:
    print(*llm.tokenize((word * 50_000).encode(), add_bos=False))
try:
    llm.tokenize(b"a" * 1_100_000)
except MobileLLMError as error:
    print(error)
"""


@pytest.mark.parametrize("pre", ["mobilellm", "llama4"])
def test_long_words(pre, tmp_path):
    """Upstream's `llama4` splits by std::regex, which recurses once for each character of a word:
    26,000 of them were the end of the process."""
    folder = make_pro(tmp_path / "pro", layers=3)
    convert_checkpoint(folder, tmp_path / "own.gguf", type="f32")
    rewrite(tmp_path / "own.gguf", tmp_path / "pro.gguf", {"tokenizer.ggml.pre": (pre, STRING)})
    words = ["a", "=", " ", "\n", "B", "\u4e2d", "\n\u3000"]
    command = [sys.executable, "-c", LONG, str(tmp_path / "pro.gguf"), *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr[-1500:]
    *lines, refusal = done.stdout.splitlines()
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    for word, line in zip(words, lines, strict=True):
        ids = tokenizer.encode(word * 50_000, add_special_tokens=False).ids
        assert line == " ".join(map(str, ids)), word
    assert "a line of 1100000 characters is too long" in refusal
