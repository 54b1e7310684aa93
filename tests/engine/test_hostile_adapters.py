"""LoRA adapters: right ones are the merged weights, wrong ones are refused before anything is done.

Upstream refused some by a null pointer, which llama-cpp-python takes for an adapter.
"""

import json
import subprocess
import sys

import numpy as np
import pytest
from checkpoints import make_checkpoint
from gguf import GGUFReader, GGUFValueType, GGUFWriter
from gguf_edit import rewrite

from mobilellm_cpp import MobileLLM, ModelError, convert_checkpoint
from mobilellm_cpp.engine.adapters import Adapters

Q, UP, EMBED = "blk.1.attn_q.weight", "blk.0.ffn_up.weight", "token_embd.weight"
RANK, ALPHA = 3, 6.0


def write_adapter(path, pairs, architecture="mobilellm", alpha=ALPHA, **texts):
    """pairs: tensor names to arrays; texts: general_type and adapter_type, None to leave out."""
    writer = GGUFWriter(path, "")
    writer.kv_data[0].clear()
    said = {"general.type": "adapter", "adapter.type": "lora", "general.architecture": architecture}
    said |= {key.replace("_", ".", 1): value for key, value in texts.items()}
    for key, value in said.items():
        if isinstance(value, str):
            writer.add_key_value(key, value, GGUFValueType.STRING)
        elif value is not None:
            writer.add_key_value(key, value, GGUFValueType.UINT32)
    if alpha is not None:
        kind = GGUFValueType.FLOAT32 if isinstance(alpha, float) else GGUFValueType.UINT32
        writer.add_key_value("adapter.lora.alpha", alpha, kind)
    for name, array in pairs.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def pair(name, rows, width, rank=RANK, dtype=np.float32):
    rng = np.random.default_rng(len(name))
    a = (rng.standard_normal((rank, width)) * 0.2).astype(dtype)
    return {f"{name}.lora_a": a, f"{name}.lora_b": rng.standard_normal((rows, rank)).astype(dtype)}


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A layer-shared model: 2 blocks that run twice, 64 wide, 4 heads of 16, 2 KV heads."""
    folder = tmp_path_factory.mktemp("adapters")
    make_checkpoint(folder / "c", dtype="f32", sharing=True)
    return convert_checkpoint(folder / "c", folder / "m.gguf", type="f32").path


@pytest.mark.parametrize("scale", [1.0, -0.5])
def test_adapters_are_merged_weights(shared, tmp_path, scale):
    """In all matrices of the stored blocks, each of which runs twice."""
    weights = {t.name: np.asarray(t.data) for t in GGUFReader(shared).tensors}
    matrices = {n: w for n, w in weights.items() if w.ndim == 2 and n.startswith("blk.")}
    pairs = {}
    for name, weight in matrices.items():
        pairs |= pair(name, *weight.shape)
    merged = {
        name: weight + scale * ALPHA / RANK * (pairs[f"{name}.lora_b"] @ pairs[f"{name}.lora_a"])
        for name, weight in matrices.items()
    }
    tokens = list(range(1, 40))
    path = rewrite(shared, tmp_path / "merged.gguf", tensors=merged)
    options = {"n_ctx": 64, "n_threads": 1, "type_k": 0, "type_v": 0}
    wanted = MobileLLM(path, **options).logits(tokens)
    llm = MobileLLM(shared, **options)
    before = llm.logits(tokens)
    path = write_adapter(tmp_path / "lora.gguf", pairs)
    Adapters(llm.model).use(llm.ctx, [(path, scale)])
    got = llm.logits(tokens)
    size = np.abs(wanted).max()
    assert np.abs(got - wanted).max() < 1e-4 * size
    assert np.abs(before - wanted).max() > 0.1 * size


def bad_adapters(folder):
    """Files and a part of the sentence."""
    good = pair(Q, 64, 64)

    def adapter(name, sentence, pairs=good, **options):
        return write_adapter(folder / f"{name}.gguf", pairs, **options), sentence

    nan = {**good, f"{Q}.lora_a": np.full((RANK, 64), np.nan, np.float32)}
    half = {f"{Q}.lora_a": good[f"{Q}.lora_a"]}
    integers = {name: array.astype(np.int32) for name, array in good.items()}
    yield adapter(
        "architecture", "architecture 'llama', and this one is 'mobilellm'", architecture="llama"
    )
    yield adapter("no-architecture", "architecture ''", architecture=None)
    yield adapter("number-architecture", "not a text", architecture=7)
    yield adapter("model", "is another kind of GGUF file", general_type="model")
    yield adapter("control", "is another kind of GGUF file", adapter_type="control_vector")
    yield adapter(
        "block",
        "changes 'blk.5.attn_q.weight', which this model does not have",
        pair("blk.5.attn_q.weight", 64, 64),
    )
    yield adapter("executed", "changes 'blk.2.attn_q.weight'", pair("blk.2.attn_q.weight", 64, 64))
    yield adapter(
        "width",
        "has 3 x 32 and 64 x 3 for 'blk.1.attn_q.weight', which is 64 x 64",
        pair(Q, 64, 32),
    )
    yield adapter("rows", "which is 64 x 64 in this model", pair(Q, 32, 64))
    yield adapter(
        "rank",
        "which is 64 x 64",
        {f"{Q}.lora_a": np.ones((3, 64), np.float32), f"{Q}.lora_b": np.ones((64, 4), np.float32)},
    )
    yield adapter("half", "only one half of 'blk.1.attn_q.weight'", half)
    yield adapter("integers", "of type i32, which is not a weight type", integers)
    yield adapter("nan", "holds values that are not numbers", nan)
    yield adapter("empty", "changes nothing", {})
    yield adapter("suffix", "is not half of a LoRA pair", {Q: np.ones((64, 64), np.float32)})
    yield adapter(
        "norm",
        "is not half of a LoRA pair",
        {**good, "blk.0.attn_norm.weight": np.ones(64, np.float32)},
    )
    yield adapter(
        "vector",
        "changes the vector 'blk.0.attn_norm.weight'",
        pair("blk.0.attn_norm.weight", 1, 64),
    )
    yield adapter(
        "tied",
        "which is the output matrix as well",
        {
            f"{EMBED}.lora_a": np.ones((512, 3), np.float32),
            f"{EMBED}.lora_b": np.ones((64, 3), np.float32),
        },
    )
    yield adapter("alpha-nan", "has nan as adapter.lora.alpha", alpha=float("nan"))
    yield adapter("alpha-0", "as adapter.lora.alpha", alpha=0.0)
    yield adapter("alpha-int", "is not a 32-bit float", alpha=4)
    yield adapter("no-alpha", "has no adapter.lora.alpha", alpha=None)
    yield adapter(
        "activated",
        "is an activated LoRA",
        **{"adapter_alora.invocation_tokens": 1},
    )
    whole = write_adapter(folder / "whole.gguf", good).read_bytes()
    for n in (0, 10, 100, 300, 500, len(whole) - 1):
        (folder / f"cut-{n}.gguf").write_bytes(whole[:n])
        yield folder / f"cut-{n}.gguf", ""
    (folder / "page.gguf").write_bytes(b"<!doctype html><title>404</title>" * 50)
    yield folder / "page.gguf", "magic"


TRY = """
import json, sys
from mobilellm_cpp import MobileLLM, ModelError
from mobilellm_cpp.engine.adapters import Adapters
llm = MobileLLM(sys.argv[1], n_ctx=64, n_threads=1)
for path in sys.argv[2:]:
    try:
        Adapters(llm.model).use(llm.ctx, [(path, 1.0)])
        llm.logits([1, 2, 3])
        print(json.dumps("runs"), flush=True)
    except ModelError as error:
        print(json.dumps(str(error)), flush=True)
"""


def test_bad_adapters(shared, tmp_path):
    bad = list(bad_adapters(tmp_path))
    rng = np.random.default_rng(0)
    whole = (tmp_path / "whole.gguf").read_bytes()
    for i in range(200):  # any sentence, or it runs
        spoiled = bytearray(whole)
        for at in rng.integers(0, min(len(whole), 600), rng.integers(1, 4)):
            spoiled[at] = rng.integers(0, 256)
        path = tmp_path / f"spoiled-{i}.gguf"
        path.write_bytes(spoiled)
        bad.append((path, None))
    command = [sys.executable, "-c", TRY, str(shared), *(str(path) for path, _ in bad)]
    done = subprocess.run(command, capture_output=True, text=True, cwd="/", timeout=300)
    got = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, (bad[len(got)], done.stderr[-1000:])
    for (path, sentence), said in zip(bad, got, strict=True):
        if sentence is not None:
            assert said.startswith(str(path)) and sentence in said, (path.name, said)


def test_no_adapter(shared, tmp_path):
    llm = MobileLLM(shared, n_ctx=64, n_threads=1)
    with pytest.raises(ModelError, match="no such file"):
        Adapters(llm.model).load(tmp_path / "none.gguf")
    with pytest.raises(ModelError, match="is a folder"):
        Adapters(llm.model).load(tmp_path)
