"""Which type each tensor gets: the same as llama.cpp's quantizer chooses at its defaults."""

from __future__ import annotations

from .types import F16, F32, OUTPUT_TYPES, Q6_K, Q8_0, TensorType


def tensor_type(output_type: str, name: str, shape: tuple[int, ...], tied: bool) -> TensorType:
    """The type of tensor `name` (GGUF name; shape rows first) in a file of `output_type`.

    Vectors stay F32. In quantized files the output head, which is the embedding where the two
    are `tied`, gets more bits than the rest; a row that does not divide by the block of its type
    falls back to a type with smaller blocks, in the end to F16.
    """
    if len(shape) < 2:
        return F32
    chosen, _ = OUTPUT_TYPES[output_type]
    columns = shape[-1]
    if chosen.block == 1:
        return chosen
    if name == "output.weight" or (tied and name == "token_embd.weight"):
        chosen = Q6_K if columns % Q6_K.block == 0 and chosen is not Q8_0 else Q8_0
    return chosen if columns % chosen.block == 0 else F16
