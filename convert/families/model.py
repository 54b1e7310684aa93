"""What a family makes of a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass

from ..adapter import LowRank
from ..tensor import Tensor


@dataclass(frozen=True)
class Weight:
    """A tensor of the GGUF file. Where `head_rows` is set, the rows of each head of that many
    rows change from split halves to interleaved pairs, which is the order of ggml's RoPE for
    Llama; with `to_halves` the other way round. `added` is what an adapter adds to the tensor as
    it is stored, `scale` the checkpoint's scale of quantization-aware training for it."""

    name: str
    tensor: Tensor
    head_rows: int = 0
    to_halves: bool = False
    added: LowRank | None = None
    scale: Tensor | None = None


@dataclass(frozen=True)
class Decoder:
    """The sizes of a model, what its blocks do, and what the checkpoint calls them; `rope` and
    `sliding` have an entry for each stored block.

    With `split_halves` RoPE turns the halves of a head as the checkpoint stores them, and the rows
    of q and k are reordered; without, neighbouring pairs. `mlp` are the names that the
    feed-forward part may have.
    """

    hidden: int
    ffn: int
    blocks: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    context: int
    epsilon: float
    theta: float
    qk_norm: bool = False
    rope: tuple[bool, ...] = ()  # whether the block applies RoPE; empty: all do
    sliding: tuple[bool, ...] = ()  # whether it sees only the last `window` tokens; empty: none
    window: int = 0
    split_halves: bool = True
    mlp: tuple[str, ...] = ("mlp",)

    @property
    def normed(self) -> bool:
        """Whether any block norms q and k: only those with RoPE do."""
        return self.qk_norm and (any(self.rope) or not self.rope)


@dataclass(frozen=True)
class Model:
    """`metadata` holds encoded GGUF values; `schedule` the stored block of each executed layer."""

    architecture: str
    metadata: dict[str, bytes]
    weights: list[Weight]
    decoder: Decoder
    schedule: tuple[int, ...]
    tied: bool
    notes: list[str]
