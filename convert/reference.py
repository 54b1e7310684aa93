"""The MobileLLM family as one plain PyTorch forward pass: the truth for tests and `verify`.

    x = embedding[tokens]
    for each layer of the schedule:
        x = x + attention(norm(x))
        x = x + feed_forward(norm(x))
    logits = norm(x) @ head.T

It reads config.json and the stored tensors itself and shares no code with `families`, so that a
mistake of the converter cannot hide in both. All is float32, and one block is in memory at a time.
Importing this module without torch raises MobileLLMError.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from mobilellm_cpp.errors import CheckpointError, MobileLLMError

from .checkpoint import Checkpoint
from .config import Config
from .schedule import MAX_LAYERS, parse_schedule
from .tensor import BITS, Tensor

try:
    import torch
except ImportError:
    raise MobileLLMError(
        "the PyTorch reference needs torch: pip install 'mobilellm-cpp[torch]'."
    ) from None

HEAD_ROWS = 2048  # rows of the embedding that are in memory at a time
MAX_TOKENS = 4096

SCALE = ".weight_fake_quantizer.scale"  # of torchao's quantization-aware training

# Each weight's name in a checkpoint; FFN is mlp or, in Llama 4, feed_forward.
BLOCK_PARTS = {
    "attention_norm": "input_layernorm",
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "gate": "FFN.gate_proj",
    "up": "FFN.up_proj",
    "down": "FFN.down_proj",
}


@dataclass(frozen=True)
class Hyperparameters:
    """What config.json says of the computation. `rope` and `windows` have an entry for each stored
    block: whether q and k are rotated, and how many positions a token sees (itself included; None:
    all before it). `schedule` is the stored block of each executed layer."""

    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    context: int
    epsilon: float
    theta: float
    interleaved: bool  # RoPE turns the pairs (0, 1), (2, 3), ...; else (0, head_dim/2), ...
    qk_norm: bool
    rope: tuple[bool, ...]
    windows: tuple[int | None, ...]
    schedule: tuple[int, ...]

    @property
    def blocks(self) -> int:
        return len(self.rope)


Floats = npt.NDArray[np.float32]


class Weights(Protocol):
    """Where the forward pass takes its weights from; parts are those of `Reference.names`."""

    def matrix(self, part: str, block: int | None) -> Floats:
        """A whole weight as float32 [rows, columns], or [n] for a norm."""

    def rows(self, part: str, first: int, last: int) -> Floats:
        """Rows first..last of the embedding or the head as float32 [last - first, hidden]."""

    def input(self, x: torch.Tensor, part: str, block: int | None) -> torch.Tensor:
        """What the multiplication with this weight makes of its input x [tokens, columns]."""


class Reference:
    """A checkpoint's forward pass. Raises CheckpointError for one that it does not know.

    `schedule` overrides the order of the blocks, as in convert_checkpoint. `parts` is the
    checkpoint's tensor for each (part, block); block is None outside of blocks.
    """

    def __init__(self, checkpoint: Checkpoint, schedule: str | Sequence[int] | None = None) -> None:
        self.hyper = read_hyperparameters(checkpoint.config, schedule)
        tensors = checkpoint.tensors()
        self.parts: dict[tuple[str, int | None], Tensor] = {}
        self.scales: dict[str, Tensor] = {}  # of quantization-aware training, by their weights
        for key, name in _names(self.hyper.blocks, tensors).items():
            if name not in tensors:
                raise CheckpointError(f"{checkpoint.folder}: {name} is missing from the weights.")
            self.parts[key] = _checked(tensors.pop(name), _shape(key[0], self.hyper))
            if scale := tensors.pop(name.removesuffix(".weight") + SCALE, None):
                self.scales[self.parts[key].name] = scale
        extra = [name for name in tensors if not name.endswith(".rotary_emb.inv_freq")]
        if extra:
            raise CheckpointError(f"{tensors[extra[0]]} is a tensor that the reference ignores.")

    @property
    def tied(self) -> bool:
        return ("head", None) not in self.parts

    def logits(
        self,
        tokens: Sequence[int],
        positions: Sequence[int] | None = None,
        weights: Weights | None = None,
    ) -> Floats:
        """float32 [positions, vocab]: the logits after the tokens at `positions`, or after all.

        `weights` replaces the checkpoint's own.
        """
        if not 0 < len(tokens) <= MAX_TOKENS:
            raise CheckpointError(
                f"the reference takes 1 to {MAX_TOKENS} tokens, not {len(tokens)}."
            )
        weights = weights or StoredWeights(self.parts)
        with torch.inference_mode():
            x = self._hidden(torch.tensor(tokens), weights)
            x = x[torch.tensor(range(len(tokens)) if positions is None else positions)]
            return self._head(x, weights).numpy()

    def _hidden(self, tokens: torch.Tensor, weights: Weights) -> torch.Tensor:
        """[tokens] -> [tokens, hidden], the input of the head."""
        hyper = self.hyper
        rows = [weights.rows("embedding", token, token + 1) for token in tokens.tolist()]
        x = torch.from_numpy(np.concatenate(rows))
        turns = rotations(len(tokens), hyper.head_dim, hyper.theta)
        loaded = -1
        w: dict[str, torch.Tensor] = {}
        for block in hyper.schedule:
            if block != loaded:
                w.clear()  # before the next one is read
                w = {p: torch.from_numpy(weights.matrix(p, block)) for p in BLOCK_PARTS}
                loaded = block
            a = rms_norm(x, w["attention_norm"], hyper.epsilon)
            x = x + self._attention(a, w, block, turns, weights)
            f = rms_norm(x, w["ffn_norm"], hyper.epsilon)
            x = x + self._feed_forward(f, w, block, weights)
        return rms_norm(x, torch.from_numpy(weights.matrix("final_norm", None)), hyper.epsilon)

    def _attention(
        self,
        x: torch.Tensor,
        w: dict[str, torch.Tensor],
        block: int,
        turns: torch.Tensor,
        weights: Weights,
    ) -> torch.Tensor:
        """[tokens, hidden] -> [tokens, hidden]; `turns` are complex [tokens, head_dim/2]."""
        hyper, n = self.hyper, len(x)
        q = weights.input(x, "q", block) @ w["q"].T  # [tokens, heads * head_dim]
        k = weights.input(x, "k", block) @ w["k"].T  # [tokens, kv_heads * head_dim]
        v = weights.input(x, "v", block) @ w["v"].T
        q = q.view(n, hyper.heads, hyper.head_dim).transpose(0, 1)  # [heads, tokens, head_dim]
        k = k.view(n, hyper.kv_heads, hyper.head_dim).transpose(0, 1)
        v = v.view(n, hyper.kv_heads, hyper.head_dim).transpose(0, 1)
        if hyper.rope[block]:
            q = rotate(q, turns, hyper.interleaved)
            k = rotate(k, turns, hyper.interleaved)
            if hyper.qk_norm:
                q, k = rms_norm(q, None, hyper.epsilon), rms_norm(k, None, hyper.epsilon)
        group = hyper.heads // hyper.kv_heads  # query heads that share a K and V head
        k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
        scores = q @ k.transpose(1, 2) * hyper.head_dim**-0.5  # [heads, tokens, tokens]
        scores.masked_fill_(~visible(n, hyper.windows[block]), -torch.inf)
        y = scores.softmax(-1) @ v  # [heads, tokens, head_dim]
        y = y.transpose(0, 1).reshape(n, hyper.heads * hyper.head_dim)
        return weights.input(y, "o", block) @ w["o"].T

    def _feed_forward(
        self, x: torch.Tensor, w: dict[str, torch.Tensor], block: int, weights: Weights
    ) -> torch.Tensor:
        """[tokens, hidden] -> [tokens, hidden]: down(silu(gate x) * up x)."""
        gate = weights.input(x, "gate", block) @ w["gate"].T  # [tokens, ffn]
        up = weights.input(x, "up", block) @ w["up"].T
        y = torch.nn.functional.silu(gate) * up
        return weights.input(y, "down", block) @ w["down"].T

    def _head(self, x: torch.Tensor, weights: Weights) -> torch.Tensor:
        """[positions, hidden] -> [positions, vocab], a few rows of the head at a time."""
        part = "embedding" if self.tied else "head"
        x = weights.input(x, part, None)
        logits = torch.empty(len(x), self.hyper.vocab)
        for first in range(0, self.hyper.vocab, HEAD_ROWS):
            last = min(first + HEAD_ROWS, self.hyper.vocab)
            logits[:, first:last] = x @ torch.from_numpy(weights.rows(part, first, last)).T
        return logits


class StoredWeights:
    """The weights as the checkpoint holds them."""

    def __init__(self, parts: dict[tuple[str, int | None], Tensor]) -> None:
        self.parts = parts

    def read(self, tensor: Tensor, first: int, last: int) -> Floats:
        """Rows first..last of one of the tensors as float32."""
        return read_rows(tensor, first, last)

    def matrix(self, part: str, block: int | None) -> Floats:
        tensor = self.parts[part, block]
        return self.read(tensor, 0, tensor.shape[0])

    def rows(self, part: str, first: int, last: int) -> Floats:
        return self.read(self.parts[part, None], first, last)

    def input(self, x: torch.Tensor, part: str, block: int | None) -> torch.Tensor:
        return x


@contextmanager
def torch_threads(n: int) -> Iterator[None]:
    """Computing on n threads; 0: as many as torch takes by itself."""
    before = torch.get_num_threads()
    torch.set_num_threads(n or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def rms_norm(x: torch.Tensor, weight: torch.Tensor | None, epsilon: float) -> torch.Tensor:
    """x / sqrt(mean(x^2) + epsilon) over the last dimension, times weight if there is one."""
    y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon)
    return y if weight is None else y * weight


def rotations(n: int, head_dim: int, theta: float) -> torch.Tensor:
    """RoPE's exp(i * position * theta^(-2j/head_dim)) as complex [n, head_dim/2]."""
    frequencies = 1.0 / theta ** (torch.arange(0, head_dim, 2).float() / head_dim)
    angles = torch.outer(torch.arange(n).float(), frequencies)
    return torch.polar(torch.ones_like(angles), angles)


def rotate(x: torch.Tensor, turns: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """Turn the pairs of each head of x [heads, tokens, head_dim]."""
    half = x.shape[-1] // 2
    # the two parts of every pair, last: [heads, tokens, head_dim/2, 2]
    pairs = x.view(*x.shape[:-1], *((half, 2) if interleaved else (2, half)))
    if not interleaved:
        pairs = pairs.mT
    y = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * turns)
    return (y if interleaved else y.mT).flatten(-2)


def visible(n: int, window: int | None) -> torch.Tensor:
    """bool [n, n]: whether the token of a row sees that of a column."""
    row, column = torch.arange(n)[:, None], torch.arange(n)
    causal = column <= row
    return causal if window is None else causal & (column > row - window)


def read_rows(tensor: Tensor, first: int, last: int) -> Floats:
    """Rows first..last as float32, exactly; their file pages leave the process's memory."""
    bits = np.ascontiguousarray(tensor.bits[first:last])
    if tensor.dtype == "BF16":
        values = bits.astype(np.uint32)
        values <<= 16  # a BF16 number is the upper half of a float32
        out = values.view(np.float32)
    elif tensor.dtype == "F16":
        out = bits.view(np.float16).astype(np.float32)
    else:
        out = bits.view(np.float32).copy()
    tensor.release(first, last)
    return out


def fake_quantized(tensor: Tensor, scale: Tensor, first: int, last: int) -> Floats:
    """Rows first..last as torchao's symmetric int4 fake quantizer rounds them, with a scale for
    each row or each group of columns."""
    kinds = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    rows = torch.from_numpy(read_rows(tensor, first, last)).to(kinds[tensor.dtype])
    scales = torch.from_numpy(read_rows(scale, first, last)).to(kinds[scale.dtype])
    scales = scales.reshape(len(rows), -1, 1)
    numbers = (rows.reshape(len(rows), scales.shape[1], -1) * (1.0 / scales)).round().clamp(-8, 7)
    out: Floats = (numbers.float() * scales.float()).reshape(rows.shape).numpy()
    return out


def _names(blocks: int, tensors: dict[str, Tensor]) -> dict[tuple[str, int | None], str]:
    """(part, block) to the name in the checkpoint; the head is left out where there is none."""
    feed_forward = "feed_forward" if any(".feed_forward." in name for name in tensors) else "mlp"
    names: dict[tuple[str, int | None], str] = {
        ("embedding", None): "model.embed_tokens.weight",
        ("final_norm", None): "model.norm.weight",
    }
    for block in range(blocks):
        for part, name in BLOCK_PARTS.items():
            full = f"model.layers.{block}.{name.replace('FFN', feed_forward)}.weight"
            names[part, block] = full
    if "lm_head.weight" in tensors:
        names["head", None] = "lm_head.weight"
    return names


def _shape(part: str, hyper: Hyperparameters) -> tuple[int, ...]:
    q_rows, kv_rows = hyper.heads * hyper.head_dim, hyper.kv_heads * hyper.head_dim
    if part.endswith("norm"):
        return (hyper.hidden,)
    if part in ("o", "down"):
        return (hyper.hidden, q_rows if part == "o" else hyper.ffn)
    rows = {"q": q_rows, "k": kv_rows, "v": kv_rows, "gate": hyper.ffn, "up": hyper.ffn}
    return (rows.get(part, hyper.vocab), hyper.hidden)


def _checked(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    if tensor.dtype not in BITS:
        raise CheckpointError(f"{tensor} is {tensor.dtype}: weights must be F32, F16 or BF16.")
    if tensor.shape != shape:
        raise CheckpointError(
            f"{tensor} has shape {list(tensor.shape)}, but config.json makes it {list(shape)}."
        )
    return tensor


# The classes of the family, as config.json names them.
BASE = ("MobileLLMForCausalLM", "LlamaForCausalLM")
R1 = "Llama4ForCausalLM"
PRO = "MobileLLMP1ForCausalLM"


def read_hyperparameters(
    config: Config, schedule: str | Sequence[int] | None = None
) -> Hyperparameters:
    """The computation that config.json describes. Raises CheckpointError for any other."""
    kind = _class(config)
    for field, neutral in {
        "hidden_act": ("silu", None),
        "attention_bias": (False, None),
        "mlp_bias": (False, None),
        "partial_rotary_factor": (1, None),
    }.items():
        if config.get(field) not in neutral:
            raise config.refusal(field, f"must be {neutral[0]!r}", config.get(field))
    hidden = config.integer("hidden_size", 1 << 16)
    heads = config.integer("num_attention_heads", 1 << 12)
    kv_heads = config.integer("num_key_value_heads", heads, default=heads)
    blocks = config.integer("num_hidden_layers", MAX_LAYERS)
    head_dim = config.integer("head_dim", 1 << 12, default=max(1, hidden // heads))
    if heads % kv_heads:
        raise config.refusal("num_key_value_heads", f"must divide the {heads} heads", kv_heads)
    if head_dim % 2:
        raise config.refusal("head_dim", "must be even, for RoPE turns pairs", head_dim)
    ffn = "intermediate_size_mlp"  # in Llama 4 the other one is the width of the experts
    if kind in BASE or (kind == PRO and config.get(ffn) is None):
        ffn = "intermediate_size"

    if schedule is not None:
        order = parse_schedule(schedule, blocks)
    elif config.flag("layer_sharing"):
        order = tuple(layer // 2 for layer in range(2 * blocks))
    else:
        order = tuple(range(blocks))

    rope: tuple[bool, ...] = (True,) * blocks
    windows: tuple[int | None, ...] = (None,) * blocks
    qk_norm = False
    if kind not in BASE:
        rope = _rope_layers(config, kind, blocks)
        qk_norm = _flag(config, kind, "use_qk_norm", default=True)
        windows = _windows(config, kind, blocks)
        tuning = config.get("attn_temperature_tuning", kind == R1)  # transformers' default
        if not all(rope) and tuning not in (False, 0):
            rule = "must be false where layers go without RoPE"
            raise config.refusal("attn_temperature_tuning", rule, tuning)
    return Hyperparameters(
        hidden=hidden,
        ffn=config.integer(ffn, 1 << 20),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocab=config.integer("vocab_size", 1 << 20),
        context=config.integer("max_position_embeddings", 1 << 28),
        epsilon=config.number("rms_norm_eps", 0.1),
        theta=_theta(config, {R1: 500000.0, PRO: None}.get(kind, 10000.0)),
        interleaved=kind not in BASE,
        qk_norm=qk_norm,
        rope=rope,
        windows=windows,
        schedule=order,
    )


def _class(config: Config) -> str:
    classes = config.get("architectures")
    known = (*BASE, R1, PRO)
    if not isinstance(classes, list) or len(classes) != 1 or classes[0] not in known:
        raise config.refusal("architectures", f"must name one of {', '.join(known)}", classes)
    return str(classes[0])


def _flag(config: Config, kind: str, name: str, *, default: bool) -> bool:
    """A flag that Pro must state; for R1 transformers has a default."""
    if config.get(name) is None and kind == R1:
        return default
    return config.flag(name, required=True)


def _rope_layers(config: Config, kind: str, blocks: int) -> tuple[bool, ...]:
    """Which blocks rotate: no_rope_layers has a 1 for those that do."""
    layers = config.get("no_rope_layers")
    if kind == R1 and not layers:  # transformers' default
        interval = config.integer("no_rope_layer_interval", 1 << 28, default=4)
        return tuple((block + 1) % interval != 0 for block in range(blocks))
    if layers is None:
        raise config.missing("no_rope_layers")
    if not isinstance(layers, list) or len(layers) < blocks or any(x not in (0, 1) for x in layers):
        raise config.refusal("no_rope_layers", f"must be {blocks} numbers 0 or 1", layers)
    return tuple(bool(x) for x in layers[:blocks])


def _windows(config: Config, kind: str, blocks: int) -> tuple[int | None, ...]:
    """How far each block sees: layer_types says full_attention or sliding_attention."""
    layers = config.get("layer_types")
    if layers is None and kind == R1:
        layers = ["chunked_attention"] * blocks  # transformers' default
    if layers is None:
        raise config.missing("layer_types")
    if not isinstance(layers, list) or len(layers) != blocks:
        raise config.refusal("layer_types", f"must name the attention of {blocks} layers", layers)
    low = min(MAX_TOKENS, config.integer("max_position_embeddings", 1 << 28))
    windows: list[int | None] = []
    for layer in layers:
        window = None
        if layer == "sliding_attention":
            window = config.integer("sliding_window", 1 << 28)
        elif layer == "chunked_attention" and kind == R1:  # full where a text fits into a chunk
            config.integer("attention_chunk_size", 1 << 28, low=low, default=8192)
        elif layer != "full_attention":
            raise config.refusal("layer_types", "must hold full or sliding attention", layer)
        windows.append(window)
    return tuple(windows)


ROPE_FIELDS = {"rope_theta", "rope_type", "type", "factor", "partial_rotary_factor"}


def _theta(config: Config, default: float | None) -> float:
    """RoPE's base; older configs have rope_theta, newer ones rope_parameters."""
    theta = config.get("rope_theta")
    for field in ("rope_scaling", "rope_parameters"):
        rope = config.get(field)
        if rope is None:
            continue
        kind = rope.get("rope_type", rope.get("type", "default")) if isinstance(rope, dict) else ""
        if kind != "default" or not set(rope) <= ROPE_FIELDS:
            raise config.refusal(field, "must be absent or of type 'default'", rope)
        theta = rope.get("rope_theta", theta)
    if theta is None:
        theta = default
    if theta is None:
        raise config.missing("rope_theta")
    return config.check_number("rope_theta", theta, 1e12)
