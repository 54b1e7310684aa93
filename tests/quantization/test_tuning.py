"""Tuning of scales and norms: blocks as ggml reads them, and the divergence that it brings down."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from mobilellm_cpp.convert import convert_checkpoint
from mobilellm_cpp.quant.rounding import dequantize
from mobilellm_cpp.quant.types import TensorType

from mobilellm_cpp.quantization import run
from mobilellm_cpp.quantization.calibration import plain
from mobilellm_cpp.quantization.network import Network
from mobilellm_cpp.quantization.source import Source
from mobilellm_cpp.quantization.tuning import PLACES, _Matrix, tuned

torch.set_num_threads(1)  # threads that wait for each other starve on a busy machine

DEMO = Path(sys.modules["mobilellm_cpp"].__file__).parent / "demo"


@pytest.mark.parametrize("kind", PLACES, ids=lambda kind: kind.name)
def test_blocks_are_linear_in_their_numbers(kind: TensorType) -> None:
    rows, columns = 6, 512
    torch.manual_seed(0)
    data = plain(torch.randn(rows, columns).numpy(), kind)
    matrix = _Matrix.read(data, kind, rows, columns)
    values = dequantize(data.reshape(-1), kind.id, columns)
    assert matrix.weights().detach().numpy() == pytest.approx(values, abs=1e-5)
    assert np.array_equal(matrix.packed(), data)
    with torch.no_grad():
        for move in matrix.moves:
            move += 1  # all numbers twice as large, which is exact
    moved = dequantize(matrix.packed().reshape(-1), kind.id, columns)
    assert np.array_equal(moved, 2 * values)


def test_tuned(tmp_path: Path) -> None:
    convert_checkpoint(DEMO, tmp_path / "m.gguf", type="f16")
    source = Source(tmp_path / "m.gguf")
    plan = run.make_plan(source, "q4_0")
    rounded = {
        name: plain(source.values(name), plan.kinds[name])
        for name, info in source.tensors.items()
        if len(info.shape) == 2
    }
    torch.manual_seed(0)
    tokens = torch.randint(3, 2000, (8, 48))
    made, norms, (before, after) = tuned(Network(source), plan.kinds, rounded, tokens, 16)
    assert after < 0.95 * before
    assert set(made) == {name for name in rounded if name.startswith("blk.")}
    assert all(made[name].shape == rounded[name].shape for name in made)
    assert any((norms[name].numpy() != source.values(name)).any() for name in norms)
