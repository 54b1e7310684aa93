"""ggml's own rounding stays within the bounds, comes near them, and nothing else fits into them."""

from __future__ import annotations

import numpy as np
import pytest
from mobilellm_cpp.quant.bounds import bound
from mobilellm_cpp.quant.rounding import dequantize, ggml

ROWS, COLUMNS = 400, 512
# ggml's names and numbers
KINDS = {
    "f32": 0,
    "f16": 1,
    "bf16": 30,
    "q8_0": 8,
    "q4_0": 2,
    "q6_K": 14,
    "q2_0": 42,
    "q1_0": 41,
}


RNG = np.random.default_rng(0)
SHAPE = (ROWS, COLUMNS)
NORMAL = RNG.standard_normal(SHAPE)
WEIGHTS = {
    "normal": NORMAL * 0.03,
    "uniform": RNG.uniform(-1, 1, SHAPE),
    "heavy tails": RNG.standard_t(2, SHAPE),
    "blocks of all sizes": NORMAL * np.exp(RNG.normal(0, 2, (ROWS, COLUMNS // 16))).repeat(16, 1),
    "sparse": NORMAL * (RNG.random(SHAPE) < 0.1),
    "two levels": np.where(NORMAL < 0, -1, 1) * RNG.random((ROWS, 1)),
    "few levels": RNG.choice([-1, -0.5, 0, 0.5, 1], SHAPE),
    "near the ends": np.where(NORMAL < 0, -1, 1) * RNG.uniform(0.9, 1, SHAPE),
    "tiny": NORMAL * 1e-6,
    "large": NORMAL * 1e3,
    "zero": NORMAL * 0,
}


def rounded(values: np.ndarray, kind: str) -> np.ndarray:
    """Through ggml's quantizer and back."""
    rows, columns = values.shape
    out = np.zeros(values.size * 4 + 1024, np.uint8)
    size = ggml().ggml_quantize_chunk(
        KINDS[kind], values.ctypes.data, out.ctypes.data, 0, rows, columns, None
    )
    return dequantize(out[:size], KINDS[kind], columns)


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("kind", KINDS)
def test_rounding_is_within_its_bound(kind: str, name: str) -> None:
    values = WEIGHTS[name].astype(np.float32)
    allowed = bound(kind, values)
    error = np.abs(rounded(values, kind) - values)
    assert allowed is not None and allowed.shape == values.shape
    assert (error <= allowed).all()


@pytest.mark.parametrize(
    ("kind", "least"),
    [("q8_0", 0.88), ("q4_0", 0.98), ("q6_K", 0.6), ("q2_0", 0.98), ("q1_0", 0.99)],
)
def test_bounds_are_near(kind: str, least: float) -> None:
    """Rounding comes as near to its bound as `least`, and a number one step off is beyond it."""
    values = WEIGHTS["normal"].astype(np.float32)
    allowed = bound(kind, values)
    assert allowed is not None
    right = rounded(values, kind)
    shares = np.abs(right - values) / allowed
    assert shares.max() >= least
    block = {"q8_0": 32, "q4_0": 32, "q6_K": 16, "q2_0": 64, "q1_0": 128}[kind]
    levels = {"q8_0": 127, "q4_0": 8, "q6_K": 32, "q2_0": 1, "q1_0": 1}[kind]
    sizes = np.abs(values).reshape(ROWS, -1, block)
    step = (sizes.mean(2) if kind == "q1_0" else sizes.max(2)).repeat(block, 1) / levels
    wrong = np.abs(right + 1.3 * np.where(right < values, -1, 1) * step - values)
    inner = np.abs(values) < 0.85 * sizes.max(2).repeat(block, 1)  # the ends have more room
    assert (wrong > allowed)[inner].mean() > 0.9999


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16"])
def test_what_a_float_type_holds_may_not_move(kind: str) -> None:
    values = rounded(WEIGHTS["normal"].astype(np.float32), kind)
    allowed = bound(kind, values)
    assert allowed is not None and not allowed.any()


def test_a_wrong_scale_is_no_excuse() -> None:
    """A file's block may have any scale; the bound does not come from it."""
    values = WEIGHTS["normal"].astype(np.float32)
    allowed = bound("q8_0", values)
    zeros = np.zeros_like(values)  # as a block of huge scale would round them
    assert (np.abs(zeros - values) > allowed).mean() > 0.95


def test_other_types_have_no_bound() -> None:
    assert bound("q4_K", WEIGHTS["normal"].astype(np.float32)) is None
