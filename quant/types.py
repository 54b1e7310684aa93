"""The tensor and file types of GGUF that this project writes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class TensorType:
    """How a row is stored: blocks of `block` weights in `block_bytes` bytes each.

    `limit` is the largest magnitude that the type can hold: beyond it an FP16 value or scale
    would become infinite. None: everything finite in float32 fits.
    """

    name: str
    id: int
    block: int
    block_bytes: int
    limit: float | None

    def row_bytes(self, columns: int) -> int:
        """Bytes of one row; `columns` divides by the block."""
        return columns // self.block * self.block_bytes


F32 = TensorType("F32", 0, 1, 4, None)
F16 = TensorType("F16", 1, 1, 2, 65504.0)
BF16 = TensorType("BF16", 30, 1, 2, None)
# Scales: q4_0 max / 8, q8_0 max / 127, q6_K about max / 4096 (kept well below).
Q4_0 = TensorType("Q4_0", 2, 32, 18, 65504.0 * 8)
Q8_0 = TensorType("Q8_0", 8, 32, 34, 65504.0 * 127)
Q6_K = TensorType("Q6_K", 14, 256, 210, 65504.0 * 1024)
# Written for type exact only, where scales are taken over and not chosen.
Q1_0 = TensorType("Q1_0", 41, 128, 18, 65504.0)
Q2_0 = TensorType("Q2_0", 42, 64, 18, 65504.0 * 2)

# What people write for the type of the weights.
WeightType = Literal["f32", "f16", "bf16", "q8_0", "q4_0", "exact"]

# Output types by the name that people give: the tensor type, and GGUF's general.file_type.
OUTPUT_TYPES: dict[str, tuple[TensorType, int]] = {
    "f32": (F32, 0),
    "f16": (F16, 1),
    "bf16": (BF16, 32),
    "q8_0": (Q8_0, 7),
    "q4_0": (Q4_0, 2),
}

# Type `exact` chooses for each matrix the first of these that holds it; general.file_type is that
# of the one that holds the most weights.
EXACT = "exact"
EXACT_TYPES: dict[TensorType, int] = {Q1_0: 40, Q2_0: 41, Q4_0: 2, BF16: 32, F16: 1, F32: 0}
