"""The base family, with and without layer sharing.

Without sharing it is a plain Llama, written as architecture `llama`, so that every llama.cpp
program runs it. A schedule that executes blocks more than once is written as `mobilellm`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mobilellm_cpp.errors import CheckpointError

from ..config import Config
from ..gguf_file import array_u32, f32, u32
from ..schedule import MAX_LAYERS, parse_schedule
from ..tensor import BITS, Tensor
from .model import Model, Weight

EMBEDDING, HEAD, FINAL_NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"

# Settings that would change the computation, with the values under which they do not.
NEUTRAL: dict[str, tuple[object, ...]] = {
    "hidden_act": ("silu", None),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "sliding_window": (None,),
    "partial_rotary_factor": (1, None),
    "quantization_config": (None,),
}


def build(
    config: Config, tensors: dict[str, Tensor], schedule: str | Sequence[int] | None
) -> Model:
    """Check config and tensors against each other and give them their GGUF names.

    `schedule` overrides the config's `layer_sharing`, which means each block twice in a row.
    """
    for field, neutral in NEUTRAL.items():
        value = config.get(field)
        if value not in neutral:
            allowed = "absent" if neutral == (None,) else repr(neutral[0]).lower()
            raise config.refusal(field, f"must be {allowed}", value)
    hidden = config.integer("hidden_size", 1 << 16)
    ffn = config.integer("intermediate_size", 1 << 20)
    blocks = config.integer("num_hidden_layers", MAX_LAYERS)
    heads = config.integer("num_attention_heads", 1 << 12)
    kv_heads = config.integer("num_key_value_heads", 1 << 12, default=heads)
    vocab = config.integer("vocab_size", 1 << 24)
    context = config.integer("max_position_embeddings", 1 << 28)
    epsilon = config.number("rms_norm_eps", 0.1)
    if config.get("head_dim") is None and hidden % heads:
        raise config.refusal("num_attention_heads", f"must divide hidden_size {hidden}", heads)
    if heads % kv_heads:
        raise config.refusal("num_key_value_heads", f"must divide the {heads} heads", kv_heads)
    head_dim = config.integer("head_dim", 1 << 12, default=hidden // heads)
    if head_dim % 2:
        raise config.refusal("head_dim", "must be even, for RoPE turns pairs", head_dim)
    theta = rope_theta(config)

    if schedule is None and config.flag("layer_sharing"):
        schedule = "immediate"
        if 2 * blocks > MAX_LAYERS:
            rule = f"must be at most {MAX_LAYERS // 2} with layer_sharing"
            raise config.refusal("num_hidden_layers", rule, blocks)
    order = tuple(range(blocks)) if schedule is None else parse_schedule(schedule, blocks)
    shared = order != tuple(range(blocks))

    tied, notes = decide_tying(config, tensors)
    weights = []
    missing = []
    expected = tensor_names(hidden, ffn, blocks, heads, kv_heads, vocab, head_dim, tied)
    for source, (name, shape, head_rows) in expected.items():
        tensor = tensors.get(source)
        if tensor is None:
            missing.append(source)
            continue
        if tensor.dtype not in BITS:
            raise CheckpointError(f"{tensor} is {tensor.dtype}: weights must be F32, F16 or BF16.")
        if tensor.shape != shape:
            raise CheckpointError(
                f"{tensor} has shape {list(tensor.shape)}, and config.json makes it {list(shape)}."
            )
        weights.append(Weight(name, tensor, head_rows))
    if missing:
        more = f" and {len(missing) - 1} more tensors are" if len(missing) > 1 else " is"
        raise CheckpointError(f"{config.path.parent}: {missing[0]}{more} missing from the weights.")
    for name, tensor in tensors.items():
        dropped = name == HEAD or name.endswith(".rotary_emb.inv_freq")
        if name not in expected and not dropped:
            raise CheckpointError(f"{tensor} is no tensor of {config.get('architectures')[0]}.")

    arch = "mobilellm" if shared else "llama"
    metadata = {
        f"{arch}.block_count": u32(blocks),
        f"{arch}.context_length": u32(context),
        f"{arch}.embedding_length": u32(hidden),
        f"{arch}.feed_forward_length": u32(ffn),
        f"{arch}.attention.head_count": u32(heads),
        f"{arch}.attention.head_count_kv": u32(kv_heads),
        f"{arch}.attention.key_length": u32(head_dim),
        f"{arch}.attention.value_length": u32(head_dim),
        f"{arch}.attention.layer_norm_rms_epsilon": f32(epsilon),
        f"{arch}.rope.dimension_count": u32(head_dim),
        f"{arch}.rope.freq_base": f32(theta),
        f"{arch}.vocab_size": u32(vocab),
    }
    if shared:
        metadata["mobilellm.block_schedule"] = array_u32(order)
    return Model(arch, metadata, weights, vocab, blocks, order, tied, notes)


def tensor_names(
    hidden: int,
    ffn: int,
    blocks: int,
    heads: int,
    kv_heads: int,
    vocab: int,
    head_dim: int,
    tied: bool,
) -> dict[str, tuple[str, tuple[int, ...], int]]:
    """Checkpoint name to GGUF name, shape and, for q and k, the rows of a head."""
    q_rows, kv_rows = heads * head_dim, kv_heads * head_dim
    names: dict[str, tuple[str, tuple[int, ...], int]] = {
        EMBEDDING: ("token_embd.weight", (vocab, hidden), 0),
    }
    for i in range(blocks):
        source, target = f"model.layers.{i}.", f"blk.{i}."
        block: dict[str, tuple[str, tuple[int, ...], int]] = {
            "input_layernorm": ("attn_norm", (hidden,), 0),
            "self_attn.q_proj": ("attn_q", (q_rows, hidden), head_dim),
            "self_attn.k_proj": ("attn_k", (kv_rows, hidden), head_dim),
            "self_attn.v_proj": ("attn_v", (kv_rows, hidden), 0),
            "self_attn.o_proj": ("attn_output", (hidden, q_rows), 0),
            "post_attention_layernorm": ("ffn_norm", (hidden,), 0),
            "mlp.gate_proj": ("ffn_gate", (ffn, hidden), 0),
            "mlp.up_proj": ("ffn_up", (ffn, hidden), 0),
            "mlp.down_proj": ("ffn_down", (hidden, ffn), 0),
        }
        for part, (name, shape, head_rows) in block.items():
            names[f"{source}{part}.weight"] = (f"{target}{name}.weight", shape, head_rows)
    names[FINAL_NORM] = ("output_norm.weight", (hidden,), 0)
    if not tied:
        names[HEAD] = ("output.weight", (vocab, hidden), 0)
    return names


def rope_theta(config: Config) -> float:
    """The base of the rotation; any scaling of positions is refused.

    Older configs have rope_theta and rope_scaling, newer ones rope_parameters for both.
    """
    theta = config.number("rope_theta", 1e12, default=10000.0)
    for field in ("rope_scaling", "rope_parameters"):
        rope = config.get(field)
        if rope is None:
            continue
        kind = rope.get("rope_type", rope.get("type", "default")) if isinstance(rope, dict) else ""
        if kind != "default" or rope.get("factor") not in (None, 1):
            raise config.refusal(field, "must be absent or of type 'default'", rope)
        if rope.get("partial_rotary_factor") not in (None, 1):
            raise config.refusal(f"{field}.partial_rotary_factor", "must be 1", rope)
        inner = rope.get("rope_theta")
        if inner is None:
            continue
        inner = config.check_number(f"{field}.rope_theta", inner, 1e12)
        if config.get("rope_theta") is not None and inner != theta:
            raise config.refusal(f"{field}.rope_theta", f"must equal rope_theta {theta:g}", inner)
        theta = inner
    return theta


def decide_tying(config: Config, tensors: dict[str, Tensor]) -> tuple[bool, list[str]]:
    """Whether the head is the embedding, which the tensors say and not the config, and notes."""
    says_tied = config.flag("share_embedding") or config.flag("tie_word_embeddings")
    head, embedding = tensors.get(HEAD), tensors.get(EMBEDDING)
    if head is None:
        note = f"no {HEAD} in the file: the head is tied to the embedding"
        return True, [] if says_tied else [note]
    if embedding is not None and same_bits(head, embedding):
        return True, [f"{HEAD} equals the embedding: stored once, tied"]
    note = f"{HEAD} differs from the embedding: written as its own head, though config.json ties it"
    return False, [note] if says_tied else []


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same values, compared a few rows at a time."""
    if a.dtype != b.dtype or a.shape != b.shape or a.dtype not in BITS or len(a.shape) != 2:
        return False
    step = max(1, (1 << 20) // max(1, a.shape[1]))
    for first in range(0, a.shape[0], step):
        last = min(first + step, a.shape[0])
        if not np.array_equal(a.bits[first:last], b.bits[first:last]):
            return False
        a.release(first, last)
        b.release(first, last)
    return True
