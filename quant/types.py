"""The tensor and file types of GGUF that this project writes."""

from __future__ import annotations

from dataclasses import dataclass

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType


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


def _of_gguf(kind: GGMLQuantizationType, limit: float | None) -> TensorType:
    """A type as the gguf package describes it."""
    return TensorType(kind.name, int(kind), *GGML_QUANT_SIZES[kind], limit)


F32 = _of_gguf(GGMLQuantizationType.F32, None)
F16 = _of_gguf(GGMLQuantizationType.F16, 65504.0)
BF16 = _of_gguf(GGMLQuantizationType.BF16, None)
# Scales: q4_0 max / 8, q8_0 max / 127, q6_K about max / 4096 (kept well below).
Q4_0 = _of_gguf(GGMLQuantizationType.Q4_0, 65504.0 * 8)
Q8_0 = _of_gguf(GGMLQuantizationType.Q8_0, 65504.0 * 127)
Q6_K = _of_gguf(GGMLQuantizationType.Q6_K, 65504.0 * 1024)
# A file made by `mobilellm quantize` may hold any of these. The scale of a block is its largest
# weight by 8 at most, or the range of its weights by 15: with these limits far below FP16's.
Q4_1 = _of_gguf(GGMLQuantizationType.Q4_1, 65504.0)
Q5_0 = _of_gguf(GGMLQuantizationType.Q5_0, 65504.0 * 8)
Q5_1 = _of_gguf(GGMLQuantizationType.Q5_1, 65504.0)
IQ4_NL = _of_gguf(GGMLQuantizationType.IQ4_NL, 65504.0 * 64)
Q3_K = _of_gguf(GGMLQuantizationType.Q3_K, 65504.0 * 64)
Q4_K = _of_gguf(GGMLQuantizationType.Q4_K, 65504.0 * 64)
Q5_K = _of_gguf(GGMLQuantizationType.Q5_K, 65504.0 * 64)
# Written for type exact only, where scales are taken over and not chosen.
Q1_0 = _of_gguf(GGMLQuantizationType.Q1_0, 65504.0)
Q2_0 = TensorType("Q2_0", 42, 64, 18, 65504.0 * 2)  # gguf 0.19 has neither the type nor its file
MOSTLY_Q2_0 = 41

# Output types by the name that people give: the tensor type, and GGUF's general.file_type.
OUTPUT_TYPES: dict[str, tuple[TensorType, int]] = {
    "f32": (F32, LlamaFileType.ALL_F32),
    "f16": (F16, LlamaFileType.MOSTLY_F16),
    "bf16": (BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": (Q8_0, LlamaFileType.MOSTLY_Q8_0),
    "q4_0": (Q4_0, LlamaFileType.MOSTLY_Q4_0),
}

# Type `exact` chooses for each matrix the first of these that holds it; general.file_type is that
# of the one that holds the most weights.
EXACT = "exact"
EXACT_TYPES: dict[TensorType, int] = {
    Q1_0: LlamaFileType.MOSTLY_Q1_0,
    Q2_0: MOSTLY_Q2_0,
    Q4_0: LlamaFileType.MOSTLY_Q4_0,
    BF16: LlamaFileType.MOSTLY_BF16,
    F16: LlamaFileType.MOSTLY_F16,
    F32: LlamaFileType.ALL_F32,
}
