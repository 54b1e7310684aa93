"""What a family makes of a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass

from ..tensor import Tensor


@dataclass(frozen=True)
class Weight:
    """A tensor of the GGUF file. Where `head_rows` is set, the rows of each head of that many
    rows change from split halves to interleaved pairs, which is the order of ggml's RoPE."""

    name: str
    tensor: Tensor
    head_rows: int = 0


@dataclass(frozen=True)
class Model:
    """`metadata` holds encoded GGUF values; `schedule` the stored block of each executed layer."""

    architecture: str
    metadata: dict[str, bytes]
    weights: list[Weight]
    vocab_size: int
    n_stored: int
    schedule: tuple[int, ...]
    tied: bool
    notes: list[str]
