"""Calibrated rounding: its blocks as ggml reads them back, and its error beside ggml's own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from mobilellm_cpp.quant.compensated import damped, loss, rounded
from mobilellm_cpp.quant.grids import GRIDS
from mobilellm_cpp.quant.packing import packed
from mobilellm_cpp.quant.rounding import Rounder, dequantize
from mobilellm_cpp.quant.types import TensorType

ROWS, COLUMNS = 48, 256


@pytest.mark.parametrize("kind", GRIDS, ids=lambda kind: kind.name)
def test_rounded(kind: TensorType) -> None:
    torch.manual_seed(0)
    weights = torch.randn(ROWS, COLUMNS) * 0.02
    weights[:, 5] *= 8
    weights[3] = 0
    mixing = torch.randn(COLUMNS, COLUMNS) * 0.05 + torch.eye(COLUMNS)
    inputs = torch.randn(2000, COLUMNS) @ mixing
    inputs[:, 9] = 0  # never seen: H alone could not be inverted
    h = damped(inputs.T @ inputs / len(inputs))
    result = rounded(weights, h, GRIDS[kind])
    data = packed(result)
    assert data.shape == (ROWS, kind.row_bytes(COLUMNS))
    assert np.array_equal(dequantize(data.reshape(-1), kind.id, COLUMNS), result.values().numpy())

    bits = weights.numpy().view(np.uint32)
    plain = np.array(Rounder().round(bits, "F32", kind)).reshape(-1).view(np.uint8)
    error = weights - torch.from_numpy(dequantize(plain, kind.id, COLUMNS))
    assert loss(result, weights, h) < 0.6 * float((error @ h * error).sum())
    assert loss(result, weights, h) < loss(rounded(weights, h, GRIDS[kind], 0), weights, h)
