"""Which type each tensor gets: what llama.cpp's quantizer chooses at its defaults, or for type
`exact` the smallest that holds the tensor as it is."""

from __future__ import annotations

from mobilellm_cpp.errors import CheckpointError

from .lattice import float_holders, holders
from .mixes import type_of_head
from .rounding import Array
from .types import EXACT_TYPES, F16, F32, OUTPUT_TYPES, Q6_K, Q8_0, TensorType

EMBEDDING, HEAD = "token_embd.weight", "output.weight"


def tensor_type(
    output_type: str,
    name: str,
    shape: tuple[int, ...],
    tied: bool,
    head: str | None = None,
) -> TensorType:
    """The type of tensor `name` (GGUF name; shape rows first) in a file of `output_type`.

    Vectors stay F32. In quantized files the output head, which is the embedding where the two
    are `tied`, gets more bits than the rest, or the type `head`; a row that does not divide by the
    block of its type falls back to a type with smaller blocks, in the end to F16. Raises
    CheckpointError for a head of a type that there is not.
    """
    if len(shape) < 2:
        return F32
    chosen, _ = OUTPUT_TYPES[output_type]
    columns = shape[-1]
    is_head = name == HEAD or (tied and name == EMBEDDING)
    if head is not None and is_head:
        return type_of_head(head, columns, CheckpointError).kind
    if chosen.block == 1:
        return chosen
    if is_head:
        chosen = Q6_K if columns % Q6_K.block == 0 and chosen is not Q8_0 else Q8_0
    return chosen if columns % chosen.block == 0 else F16


def exact_types(name: str, bits: Array, source: str) -> set[TensorType]:
    """The types that hold rows `bits` (rows, columns) of matrix `name`, raw bits of type `source`,
    as they are. Embedding and head, which are trained in full precision, stay floats."""
    able = float_holders(bits, source)
    return able if name in (EMBEDDING, HEAD) else able | holders(bits, source)


def smallest(able: set[TensorType]) -> TensorType:
    """The type that `exact` takes of those that hold all of a tensor."""
    return next(kind for kind in EXACT_TYPES if kind in able)
