"""The forward pass of a file in PyTorch, a block at a time: what calibration collects inputs from.

Weights are handed in, so that a block can be run with the file's own, with rounded ones, or with
ones that are being tuned. Shapes are [sequences, tokens, ...]; every matrix is as it is stored in
GGUF, [out, in], RoPE turning neighbouring rows of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ModelError
from .source import Source

ATTENTION_INPUTS = ("attn_q", "attn_k", "attn_v")
MATRICES = (*ATTENTION_INPUTS, "attn_output", "ffn_gate", "ffn_up", "ffn_down")
NORMS = ("attn_norm", "ffn_norm")

Weights = Mapping[str, Tensor]  # of one block, by part
Watch = Callable[[str, Tensor], None]  # gets the part and its input [tokens, columns]


class Network:
    """The hyperparameters of a llama or mobilellm file, and its forward pass.

    Raises ModelError for other architectures and for what the pass below does not compute.
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        self.schedule = source.schedule
        numbers = source.numbers
        if source.arch not in ("llama", "mobilellm"):
            raise ModelError(
                f"{source.path}: calibration knows the architectures llama and mobilellm, not "
                f"{source.arch}: use --no-calibration"
            )
        self.width = int(numbers["embedding_length"])
        self.heads = _number(source, "attention.head_count")
        self.kv_heads = _number(source, "attention.head_count_kv", self.heads)
        self.head_dim = int(numbers.get("attention.key_length", self.width // self.heads))
        self.eps = float(numbers["attention.layer_norm_rms_epsilon"])
        self.rope_base = float(numbers.get("rope.freq_base", 10000.0))
        self.rope_dim = int(numbers.get("rope.dimension_count", self.head_dim))
        self.qk_norm = bool(numbers.get("attention.qk_norm", False))
        self.window = int(numbers.get("attention.sliding_window", 0) or 0)
        stored = source.blocks
        self.slides = numbers.get("attention.sliding_window_pattern", [False] * stored)
        self.ropes = numbers.get("attention.rope_pattern", [1] * stored)
        self.factors: Tensor | None = None
        expected = {f"blk.{b}.{p}.weight" for b in range(stored) for p in (*MATRICES, *NORMS)}
        expected |= {"token_embd.weight", "output_norm.weight", "output.weight"}
        if "rope_freqs.weight" in source.tensors:
            self.factors = torch.from_numpy(source.values("rope_freqs.weight"))
        unknown = set(source.tensors) - expected - {"rope_freqs.weight"}
        strange = numbers.get("rope.scaling.type", "none") not in ("none", "")
        if unknown or strange:
            what = min(unknown) if unknown else "a scaled RoPE"
            raise ModelError(
                f"{source.path} has {what}, which calibration does not compute: "
                "use --no-calibration"
            )

    def rotation(self, tokens: int) -> tuple[Tensor, Tensor]:
        """cos and sin [tokens, rope_dim / 2]."""
        steps = torch.arange(0, self.rope_dim, 2, dtype=torch.float64) / self.rope_dim
        frequencies = self.rope_base**-steps
        if self.factors is not None:
            frequencies = frequencies / self.factors.double()
        angles = torch.outer(torch.arange(tokens, dtype=torch.float64), frequencies)
        return angles.cos().float(), angles.sin().float()

    def norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), weight, self.eps)

    def block(
        self, x: Tensor, w: Weights, stored: int, watch: Watch = lambda part, inputs: None
    ) -> Tensor:
        """The stream after one execution of stored block `stored`; `watch` sees each input once
        (that of q, k and v as attn_q's, that of gate and up as ffn_gate's)."""
        for part, inputs, stream in self.steps(x, w, stored):
            if part:
                watch(part, inputs.flatten(0, 1))
            x = stream
        return x

    def steps(self, x: Tensor, w: Weights, stored: int) -> Iterator[tuple[str, Tensor, Tensor]]:
        """One execution of a block, stopping before each product: the part (attn_q stands for q, k
        and v, ffn_gate for gate and up), its input, and the stream that the half of the block adds
        to; at the end "" and the new stream. Weights are looked up when they are needed."""
        h = self.norm(x, w["attn_norm"])
        yield "attn_q", h, x
        out = self.attend(h @ w["attn_q"].T, h @ w["attn_k"].T, h @ w["attn_v"].T, stored)
        yield "attn_output", out, x
        x = x + out @ w["attn_output"].T
        h = self.norm(x, w["ffn_norm"])
        yield "ffn_gate", h, x
        inner = F.silu(h @ w["ffn_gate"].T) * (h @ w["ffn_up"].T)
        yield "ffn_down", inner, x
        x = x + inner @ w["ffn_down"].T
        yield "", x, x

    def attend(self, q: Tensor, k: Tensor, v: Tensor, stored: int) -> Tensor:
        """Attention over q, k and v [sequences, tokens, heads * head_dim]."""
        rows, tokens, _ = q.shape
        q, k, v = (part.view(rows, tokens, -1, self.head_dim).transpose(1, 2) for part in (q, k, v))
        if self.ropes[stored]:
            cos, sin = self.rotation(tokens)
            q, k = (_rotated(part, cos, sin) for part in (q, k))
            if self.qk_norm:
                q, k = (F.rms_norm(part, (self.head_dim,), None, self.eps) for part in (q, k))
        mask = torch.ones(tokens, tokens, dtype=torch.bool).tril()
        if self.slides[stored]:
            mask &= ~torch.ones(tokens, tokens, dtype=torch.bool).tril(-self.window)
        groups = self.heads // self.kv_heads
        k, v = (part.repeat_interleave(groups, dim=1) for part in (k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return out.transpose(1, 2).reshape(rows, tokens, -1)

    def weights(self, stored: int) -> dict[str, Tensor]:
        """The file's own weights of a block."""
        return {
            part: torch.from_numpy(self.source.values(f"blk.{stored}.{part}.weight"))
            for part in (*MATRICES, *NORMS)
        }

    def head_name(self) -> str:
        return "token_embd.weight" if self.source.tied else "output.weight"


def _number(source: Source, key: str, default: int | None = None) -> int:
    """A count that all blocks share."""
    value = source.numbers.get(key, default)
    if isinstance(value, list) and len(set(value)) == 1:
        value = value[0]
    if not isinstance(value, int):
        raise ModelError(
            f"{source.path}: {key} differs from block to block, which calibration does not "
            "compute: use --no-calibration"
        )
    return value


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Neighbouring dimensions of each head of x [..., tokens, head_dim] turned."""
    turned, rest = x[..., : 2 * cos.shape[-1]], x[..., 2 * cos.shape[-1] :]
    even, odd = turned[..., 0::2], turned[..., 1::2]
    pairs = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)
    return torch.cat([pairs.flatten(-2), rest], dim=-1)
