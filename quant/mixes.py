"""Which type each tensor of a file gets, where `mobilellm quantize` is given a type of
llama-quantize: its own choices (llama_tensor_get_type_impl of src/llama-quant.cpp), for the
architectures that hold a llama.

K-quant mixes give more bits to some blocks by their number. llama-quantize counts executed layers
there; here it is stored blocks, of which a file holds each once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from gguf.constants import LlamaFileType

from mobilellm_cpp.errors import MobileLLMError

from .types import (
    BF16,
    F16,
    F32,
    IQ4_NL,
    MOSTLY_Q2_0,
    Q2_0,
    Q3_K,
    Q4_0,
    Q4_1,
    Q4_K,
    Q5_0,
    Q5_1,
    Q5_K,
    Q6_K,
    Q8_0,
    TensorType,
)

EMBEDDING, HEAD = "token_embd.weight", "output.weight"

MIXES: dict[str, tuple[TensorType, int]] = {
    "f32": (F32, LlamaFileType.ALL_F32),
    "f16": (F16, LlamaFileType.MOSTLY_F16),
    "bf16": (BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": (Q8_0, LlamaFileType.MOSTLY_Q8_0),
    "q4_0": (Q4_0, LlamaFileType.MOSTLY_Q4_0),
    "q4_1": (Q4_1, LlamaFileType.MOSTLY_Q4_1),
    "iq4_nl": (IQ4_NL, LlamaFileType.MOSTLY_IQ4_NL),
    "q3_k_s": (Q3_K, LlamaFileType.MOSTLY_Q3_K_S),
    "q3_k_m": (Q3_K, LlamaFileType.MOSTLY_Q3_K_M),
    "q3_k_l": (Q3_K, LlamaFileType.MOSTLY_Q3_K_L),
    "q4_k_s": (Q4_K, LlamaFileType.MOSTLY_Q4_K_S),
    "q4_k_m": (Q4_K, LlamaFileType.MOSTLY_Q4_K_M),
    "q5_k_s": (Q5_K, LlamaFileType.MOSTLY_Q5_K_S),
    "q5_k_m": (Q5_K, LlamaFileType.MOSTLY_Q5_K_M),
    "q6_k": (Q6_K, LlamaFileType.MOSTLY_Q6_K),
}

# general.file_type of a file whose weights are mostly of a type.
FILE_TYPES: dict[TensorType, int] = {kind: number for kind, number in MIXES.values()} | {
    Q2_0: MOSTLY_Q2_0,
    Q5_0: LlamaFileType.MOSTLY_Q5_0,
    Q5_1: LlamaFileType.MOSTLY_Q5_1,
    Q3_K: LlamaFileType.MOSTLY_Q3_K_M,
    Q4_K: LlamaFileType.MOSTLY_Q4_K_M,
    Q5_K: LlamaFileType.MOSTLY_Q5_K_M,
}

# What stands in for a type whose blocks do not divide a row.
SMALLER_BLOCKS = {Q3_K: Q4_0, Q4_K: Q5_0, Q5_K: Q5_1, Q6_K: Q8_0}


@dataclass(frozen=True)
class Choice:
    """The type of a tensor, and the one it stands in for where rows do not divide by its block."""

    kind: TensorType
    wanted: TensorType | None = None


def is_matrix(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor is one that is rounded."""
    return len(shape) == 2 and name.endswith("weight") and not name.endswith("_norm.weight")


def mix_types(
    mix: str, shapes: Mapping[str, tuple[int, ...]], blocks: int, grouping: int, imatrix: bool
) -> dict[str, Choice]:
    """The type of each matrix of `shapes` (GGUF names; rows first) in a file of type `mix`.

    `blocks`: how many are stored; `grouping`: heads by KV heads; `imatrix`: whether one is used,
    which changes a few of upstream's choices.
    """
    default = MIXES[mix][0]
    tied = HEAD not in shapes
    chosen: dict[str, Choice] = {}
    for name, shape in shapes.items():
        if not is_matrix(name, shape):
            continue
        kind, columns = default, shape[-1]
        if default.block == 1:
            pass
        elif name == HEAD or (tied and name == EMBEDDING):
            if columns % default.block != 0:
                kind = Q8_0
            elif default is not Q8_0:
                kind = Q6_K
        elif name.startswith("blk."):
            block, part = name.split(".")[1:3]
            kind = _of_block(mix, default, part, int(block), blocks, grouping, imatrix)
        chosen[name] = fitting(kind, columns)
    return chosen


def fitting(kind: TensorType, columns: int) -> Choice:
    """The type itself, or what stands in for it where rows do not divide by its block."""
    if columns % kind.block == 0:
        return Choice(kind)
    smaller = SMALLER_BLOCKS.get(kind, F16)
    return Choice(smaller if columns % smaller.block == 0 else F16, kind)


def type_of_head(name: str, columns: int, error: type[MobileLLMError]) -> Choice:
    """The type that somebody gives the output head (the embedding, where they are one) in place of
    a mix's own, for rows of `columns`. Raises `error` for one that there is not."""
    heads = {kind.name.lower(): kind for kind in FILE_TYPES}
    if name.lower() not in heads:
        raise error(f"{name} is not a type for the head; choose one of {', '.join(heads)}")
    return fitting(heads[name.lower()], columns)


def _of_block(
    mix: str,
    default: TensorType,
    part: str,
    block: int,
    blocks: int,
    grouping: int,
    imatrix: bool,
) -> TensorType:
    eighth = blocks // 8
    more_bits = block < eighth or block >= 7 * blocks // 8 or (block - eighth) % 3 == 2
    if part == "attn_v":
        if mix == "q3_k_m":
            return Q5_K if block < 2 else Q4_K
        if mix == "q3_k_l" or (mix == "iq4_nl" and grouping >= 4):
            return Q5_K
        if mix in ("q4_k_m", "q5_k_m") and more_bits:
            return Q6_K
        if mix == "q4_k_s" and block < 4:
            return Q5_K
    elif part == "ffn_down":
        if mix == "q3_k_m":
            return Q5_K if block < blocks // 16 else Q4_K
        if mix == "q3_k_l":
            return Q5_K
        if mix in ("q4_k_m", "q5_k_m") and more_bits:
            return Q6_K
        if (mix == "iq4_nl" and not imatrix or mix == "q4_k_s") and block < eighth:
            return Q5_K
        if mix == "q4_0" and imatrix and block < eighth:
            return Q4_1
    elif part == "attn_output":
        return {"q3_k_m": Q4_K, "q3_k_l": Q5_K}.get(mix, default)
    return default
