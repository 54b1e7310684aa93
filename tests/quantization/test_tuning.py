"""Tuning of scales and norms: blocks as ggml reads them, and the loss that it brings down."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from mobilellm_cpp.convert import convert_checkpoint
from mobilellm_cpp.quant.rounding import dequantize
from mobilellm_cpp.quant.types import TensorType

from mobilellm_cpp.quantization import run
from mobilellm_cpp.quantization.calibration import plain
from mobilellm_cpp.quantization.network import MATRICES, NORMS, Network
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
    """On text that it never saw, both executions of a block end nearer to the float model's."""
    convert_checkpoint(DEMO, tmp_path / "m.gguf", type="f16")
    source = Source(tmp_path / "m.gguf")
    network = Network(source)
    kinds = run.make_plan(source, "q4_0").kinds
    names = [f"blk.0.{part}.weight" for part in MATRICES]
    found = {name: plain(source.values(name), kinds[name]) for name in names}
    torch.manual_seed(0)
    x = torch.from_numpy(source.values("token_embd.weight"))[torch.randint(3, 2000, (16, 64))]

    def streams(weights: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        with torch.no_grad():
            first = network.block(x, weights, 0)
            return [first, network.block(first, weights, 0)]

    exact = streams(network.weights(0))
    seen = [stream[:8] for stream in exact]
    made = tuned(network, kinds, 0, found, x[:8], seen, 16)
    assert set(made) == {*names, *(f"blk.0.{part}.weight" for part in NORMS)}

    def loss(data: dict[str, npt.NDArray[np.uint8]]) -> list[float]:
        weights = network.weights(0)
        for name, one in data.items():
            values = dequantize(one.reshape(-1), kinds[name].id, source.tensors[name].shape[-1])
            weights[name.split(".")[2]] = torch.from_numpy(values).view(source.tensors[name].shape)
        pairs = zip(streams(weights), exact, strict=True)
        return [float((got - wanted)[8:].square().mean()) for got, wanted in pairs]

    assert all(after < 0.97 * before for after, before in zip(loss(made), loss(found), strict=True))
    assert tuned(network, kinds, 0, found, x[:1], seen, 16).items() >= found.items()
