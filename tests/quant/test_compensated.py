"""Calibrated rounding: its blocks as ggml reads them back, and its error beside ggml's own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from mobilellm_cpp.quant.compensated import _improve_scales, damped, loss, rounded
from mobilellm_cpp.quant.grids import GRIDS
from mobilellm_cpp.quant.packing import packed
from mobilellm_cpp.quant.rounding import Rounder, dequantize
from mobilellm_cpp.quant.types import Q4_0, Q5_1, TensorType

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


@pytest.mark.parametrize("kind", [Q4_0, Q5_1], ids=lambda kind: kind.name)
def test_scales(kind: TensorType) -> None:
    """They are what lstsq finds for the codes, over inputs whose second moments are H."""
    torch.manual_seed(0)
    weights = torch.randn(3, COLUMNS)
    inputs = torch.randn(2000, COLUMNS) @ (
        torch.randn(COLUMNS, COLUMNS) * 0.05 + torch.eye(COLUMNS)
    )
    h = inputs.T @ inputs
    grid = GRIDS[kind]
    result = rounded(weights, h, grid, 0)
    _improve_scales(result, weights, h)
    groups = torch.block_diag(*[torch.ones(grid.group, 1)] * (COLUMNS // grid.group))
    for row in range(len(weights)):
        basis = result.codes[row][:, None] * groups
        basis = torch.cat([basis, groups], 1) if grid.minimum else basis
        found = torch.linalg.lstsq(
            inputs.double() @ basis.double(), inputs.double() @ weights[row].double()
        )
        own = torch.cat([result.scale[row], result.minimum[row]])[: basis.shape[1]]
        torch.testing.assert_close(own, found.solution.float(), rtol=2e-3, atol=2e-4)
