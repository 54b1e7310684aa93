"""Quantized files equal, byte for byte, what llama.cpp's quantizer makes of the exact file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import make_checkpoint
from gguf import GGMLQuantizationType as Type
from gguf import GGUFReader, dequantize
from mobilellm_cpp.convert import convert_checkpoint
from peer import assert_same_tensors

FILE_TYPES = {"q4_0": 2, "q8_0": 7}

# Runs the stock library's quantizer on all files in one process.
QUANTIZE = """
import ctypes, json, sys
import llama_cpp
quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
llama_cpp.llama_log_set(quiet, ctypes.c_void_p())
for source, out, file_type in json.loads(sys.argv[1]):
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = file_type
    assert llama_cpp.llama_model_quantize(source.encode(), out.encode(), params) == 0, source
"""

# Rows of 64 and 48 do not divide by 256, rows of 48 not even by 32.
MODELS: dict[str, dict[str, Any]] = {
    "tied": {},
    "untied": {"tied": False},
    "wide": {"hidden": 256, "ffn": 512, "layers": 1},
    "wide-untied": {"hidden": 256, "ffn": 512, "layers": 1, "tied": False},
    "narrow": {"hidden": 48, "ffn": 96, "heads": 3, "kv_heads": 3},
    "narrow-untied": {"hidden": 48, "ffn": 80, "heads": 3, "kv_heads": 1, "tied": False},
}
CASES = [(name, dtype) for name in MODELS for dtype in ("f32", "f16", "bf16")]


@pytest.fixture(scope="module")
def quantized(
    tmp_path_factory: pytest.TempPathFactory, stock_lib: Path
) -> dict[tuple[str, str, str], tuple[Path, Path]]:
    """Model, dtype and type to the checkpoint and to the file from llama.cpp's quantizer."""
    home = tmp_path_factory.mktemp("quantized")
    jobs = []
    made = {}
    for name, dtype in CASES:
        folder = make_checkpoint(home / f"{name}-{dtype}", dtype=dtype, **MODELS[name])
        exact = convert_checkpoint(folder, home / f"{name}-{dtype}.gguf", type=dtype).path
        for kind, file_type in FILE_TYPES.items():
            out = home / f"{name}-{dtype}-{kind}.gguf"
            jobs.append((str(exact), str(out), file_type))
            made[name, dtype, kind] = (folder, out)
    done = subprocess.run(
        [sys.executable, "-c", QUANTIZE, json.dumps(jobs)],
        env=os.environ | {"LLAMA_CPP_LIB_PATH": str(stock_lib)},
        cwd=home,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return made


@pytest.mark.parametrize("kind", list(FILE_TYPES))
@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_same_as_llama_quantize(
    name: str,
    dtype: str,
    kind: str,
    quantized: dict[tuple[str, str, str], tuple[Path, Path]],
    tmp_path: Path,
) -> None:
    folder, theirs_path = quantized[name, dtype, kind]
    ours = GGUFReader(convert_checkpoint(folder, tmp_path / "m.gguf", type=kind).path)
    theirs = GGUFReader(theirs_path)
    assert {f.name: (f.types, f.contents()) for f in ours.fields.values()} == {
        f.name: (f.types, f.contents()) for f in theirs.fields.values()
    }
    assert_same_tensors(ours, theirs)


@pytest.mark.parametrize(
    ("name", "kind", "embedding", "head", "others"),
    [
        ("tied", "q4_0", Type.Q8_0, None, Type.Q4_0),
        ("untied", "q4_0", Type.Q4_0, Type.Q8_0, Type.Q4_0),
        ("wide", "q4_0", Type.Q6_K, None, Type.Q4_0),
        ("wide-untied", "q4_0", Type.Q4_0, Type.Q6_K, Type.Q4_0),
        ("wide", "q8_0", Type.Q8_0, None, Type.Q8_0),
        ("narrow", "q4_0", Type.F16, None, Type.F16),
        ("narrow", "q8_0", Type.F16, None, Type.F16),
    ],
)
def test_recipe(
    name: str, kind: str, embedding: Type, head: Type | None, others: Type, tmp_path: Path
) -> None:
    folder = make_checkpoint(tmp_path / "m", **MODELS[name])
    reader = GGUFReader(convert_checkpoint(folder, tmp_path / "m.gguf", type=kind).path)
    types = {tensor.name: tensor.tensor_type for tensor in reader.tensors}
    assert types["token_embd.weight"] == embedding
    assert types.get("output.weight") == head
    assert types["blk.0.attn_q.weight"] == others
    assert types["blk.0.attn_norm.weight"] == types["output_norm.weight"] == Type.F32


@pytest.mark.parametrize(("kind", "bits"), [("q8_0", 8), ("q4_0", 4)])
def test_rounding_error(kind: str, bits: int, tmp_path: Path) -> None:
    """No weight moves by more than a step of its block of 32."""
    folder = make_checkpoint(tmp_path / "m", dtype="f32")
    exact = GGUFReader(convert_checkpoint(folder, tmp_path / "e.gguf", type="f32").path)
    rounded = GGUFReader(convert_checkpoint(folder, tmp_path / "r.gguf", type=kind).path)
    name = "blk.1.ffn_down.weight"
    before = next(t for t in exact.tensors if t.name == name).data.reshape(-1, 32)
    twin = next(t for t in rounded.tensors if t.name == name)
    after = dequantize(twin.data, twin.tensor_type).reshape(-1, 32)
    step = np.abs(before).max(axis=1) / (2 ** (bits - 1) - 1)
    assert (np.abs(after - before).max(axis=1) <= 1.01 * step).all()
    assert not np.array_equal(after, before)
