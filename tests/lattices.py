"""Weights as low-bit training publishes them: the quantizers of ParetoQ (arXiv 2502.02631, section
3; facebookresearch/ParetoQ, models/utils_quant.py) and int4 in groups of 32."""

from __future__ import annotations

import numpy as np
from checkpoints import cast

FLOOR = np.float32(1e-5)  # of a scale
WIDTHS = {"1": 1, "1.58": 0, "2": 2, "3": 3, "4": 4}  # 0 is how ParetoQ numbers ternary


def pareto(weights: np.ndarray, bits: int, alpha: np.ndarray | None = None) -> np.ndarray:
    """Float32 rows (rows, columns) on the lattice of `bits`, one alpha (rows, 1) each; without
    alpha one near the width of the row, a BF16 value as in training."""
    if alpha is None:
        largest = np.abs(weights).max(axis=1, keepdims=True)
        share = {0: 0.8, 1: 0.3, 2: 0.7, 3: 0.22, 4: 0.12}[bits]
        alpha = as_floats(cast(largest * np.float32(share), "bf16"), "bf16")
    alpha = np.maximum(alpha, FLOOR)
    if bits == 1:
        return np.sign(weights) * alpha
    if bits in (0, 2):
        levels, shift = (1.5, 0.0) if bits == 0 else (2.0, 0.5)
        clipped = np.clip(weights / alpha, -0.99, 0.99) * np.float32(levels)
        whole = np.rint(clipped - np.float32(shift)) + np.float32(shift)
        return (whole / np.float32(levels)) * alpha
    half = 2 ** (bits - 1)
    return np.clip(np.rint(weights / alpha), -half, half - 1) * alpha


def int4_groups(weights: np.ndarray, size: int = 32) -> np.ndarray:
    """Symmetric int4, one BF16 scale for each group of neighbours in a row."""
    groups = weights.reshape(-1, size)
    scale = np.abs(groups).max(axis=1, keepdims=True) / np.float32(7.5)
    scale = as_floats(cast(scale, "bf16"), "bf16")
    codes = np.clip(np.rint(groups / np.where(scale > 0, scale, 1)), -8, 7)
    return (codes * scale).reshape(weights.shape)


def as_floats(stored: np.ndarray, dtype: str) -> np.ndarray:
    """Stored bits as float32."""
    if dtype == "bf16":
        return (stored.astype(np.uint32) << 16).view(np.float32)
    return stored.astype(np.float32)
