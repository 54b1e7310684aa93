"""What all families share: a decoder of Llama's shape, its GGUF metadata and its tensors.

A decoder in which every block runs once, with RoPE and full attention in each and no norm of q and
k, is a plain Llama: it is written as architecture `llama`, so that every llama.cpp program runs it.
All others are written as `mobilellm`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mobilellm_cpp.errors import CheckpointError

from .. import keys
from ..config import Config
from ..gguf_file import array_bool, array_u32, boolean, f32, u32
from ..schedule import MAX_LAYERS, parse_schedule
from ..stored_forms import refuse_other_forms
from ..tensor import BITS, Tensor
from .model import Decoder, Model, Weight

EMBEDDING, HEAD, FINAL_NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"

SCALE = ".weight_fake_quantizer.scale"  # of torchao's quantization-aware training

ROPE_FIELDS = ("rope_theta", "rope_type", "type", "factor", "partial_rotary_factor")

# Settings that would change the computation, with the values under which they do not.
NEUTRAL: dict[str, tuple[object, ...]] = {
    "hidden_act": ("silu", None),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "partial_rotary_factor": (1, None),
}


def read_decoder(
    config: Config, ffn_field: str = "intermediate_size", theta: float | None = None
) -> Decoder:
    """The sizes that config.json gives, each checked; `theta` is used where it says none."""
    require(config, NEUTRAL)
    hidden = config.integer("hidden_size", 1 << 16)
    heads = config.integer("num_attention_heads", 1 << 12)
    kv_heads = config.integer("num_key_value_heads", 1 << 12, default=heads)
    if config.get("head_dim") is None and hidden % heads:
        raise config.refusal("num_attention_heads", f"must divide hidden_size {hidden}", heads)
    if heads % kv_heads:
        raise config.refusal("num_key_value_heads", f"must divide the {heads} heads", kv_heads)
    head_dim = config.integer("head_dim", 1 << 12, default=hidden // heads)
    if head_dim % 2:
        raise config.refusal("head_dim", "must be even, for RoPE turns pairs", head_dim)
    return Decoder(
        hidden=hidden,
        ffn=config.integer(ffn_field, 1 << 20),
        blocks=config.integer("num_hidden_layers", MAX_LAYERS),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocab=config.integer("vocab_size", 1 << 20),
        context=config.integer("max_position_embeddings", 1 << 28),
        epsilon=config.number("rms_norm_eps", 0.1),
        theta=rope_theta(config, theta),
    )


def require(config: Config, neutral: dict[str, tuple[object, ...]]) -> None:
    """Refuse every field that has none of its values; None stands for an absent field."""
    for field, values in neutral.items():
        value = config.get(field)
        if value not in values:
            allowed = "absent" if values == (None,) else repr(values[0]).lower()
            raise config.refusal(field, f"must be {allowed}", value)


def execution_order(
    config: Config, blocks: int, schedule: str | Sequence[int] | None
) -> tuple[int, ...]:
    """The stored block of each executed layer: as `schedule` says, or else the config's
    `layer_sharing`, which means each block twice in a row."""
    if config.flag("layer_sharing") and schedule is None:
        schedule = "immediate"
        if 2 * blocks > MAX_LAYERS:
            rule = f"must be at most {MAX_LAYERS // 2} with layer_sharing"
            raise config.refusal("num_hidden_layers", rule, blocks)
    return tuple(range(blocks)) if schedule is None else parse_schedule(schedule, blocks)


def build_decoder(
    config: Config,
    decoder: Decoder,
    tensors: dict[str, Tensor],
    schedule: str | Sequence[int] | None,
) -> Model:
    """Check the tensors against the sizes and give them their GGUF names."""
    refuse_other_forms(tensors.values())
    order = execution_order(config, decoder.blocks, schedule)
    tied, notes = decide_tying(config, tensors)
    weights = []
    missing = []
    mlp = next(
        (m for m in decoder.mlp if any(f".{m}." in name for name in tensors)), decoder.mlp[0]
    )
    expected = tensor_names(decoder, tied, mlp)
    for source, (name, shape, head_rows) in expected.items():
        tensor = tensors.get(source)
        if tensor is None:
            missing.append(source)
            continue
        if tensor.dtype not in BITS:
            raise CheckpointError(f"{tensor} is {tensor.dtype}: weights must be F32, F16 or BF16.")
        if tensor.shape != shape:
            raise CheckpointError(
                f"{tensor} has shape {list(tensor.shape)}, but config.json makes it {list(shape)}."
            )
        scale = tensors.get(source.removesuffix(".weight") + SCALE)
        weights.append(Weight(name, tensor, head_rows, scale=scale))
    for name, tensor in tensors.items():
        of_matrix = name.endswith(SCALE) and name.removesuffix(SCALE) + ".weight" in tensors
        dropped = name == HEAD or name.endswith(".rotary_emb.inv_freq") or of_matrix
        if name not in expected and not dropped:
            raise CheckpointError(f"{tensor} is not a tensor of {config.get('architectures')[0]}.")
    if missing:
        more = f" and {len(missing) - 1} more tensors are" if len(missing) > 1 else " is"
        raise CheckpointError(f"{config.path.parent}: {missing[0]}{more} missing from the weights.")
    arch, metadata = decoder_metadata(decoder, order)
    return Model(arch, metadata, weights, decoder, order, tied, notes)


def decoder_metadata(decoder: Decoder, order: tuple[int, ...]) -> tuple[str, dict[str, bytes]]:
    """The architecture's name and its keys."""
    extra: dict[str, bytes] = {}
    if order != tuple(range(decoder.blocks)):
        extra[keys.BLOCK_SCHEDULE] = array_u32(order)
    if decoder.normed:
        extra[keys.QK_NORM] = boolean(True)
    if not all(decoder.rope):
        extra[keys.ROPE_PATTERN] = array_u32([int(used) for used in decoder.rope])
    if any(decoder.sliding):
        extra[keys.SLIDING_WINDOW] = u32(decoder.window)
        extra[keys.SLIDING_PATTERN] = array_bool(decoder.sliding)
    arch = "mobilellm" if extra else "llama"
    return arch, for_architecture(arch, sizes(decoder, decoder.blocks) | extra)


def for_architecture(arch: str, metadata: dict[str, bytes]) -> dict[str, bytes]:
    """The metadata under the keys of an architecture."""
    return {keys.key(name, arch): value for name, value in metadata.items()}


def sizes(decoder: Decoder, blocks: int) -> dict[str, bytes]:
    """The keys that every Llama-like architecture has, of a file of so many blocks."""
    return {
        keys.BLOCK_COUNT: u32(blocks),
        keys.CONTEXT_LENGTH: u32(decoder.context),
        keys.EMBEDDING_LENGTH: u32(decoder.hidden),
        keys.FEED_FORWARD_LENGTH: u32(decoder.ffn),
        keys.HEAD_COUNT: u32(decoder.heads),
        keys.HEAD_COUNT_KV: u32(decoder.kv_heads),
        keys.KEY_LENGTH: u32(decoder.head_dim),
        keys.VALUE_LENGTH: u32(decoder.head_dim),
        keys.NORM_EPSILON: f32(decoder.epsilon),
        keys.ROPE_DIMENSIONS: u32(decoder.head_dim),
        keys.ROPE_BASE: f32(decoder.theta),
        keys.VOCAB_SIZE: u32(decoder.vocab),
    }


def tensor_names(
    decoder: Decoder, tied: bool, mlp: str
) -> dict[str, tuple[str, tuple[int, ...], int]]:
    """Checkpoint name to GGUF name, shape and, for q and k to reorder, the rows of a head."""
    d = decoder
    q_rows, kv_rows = d.heads * d.head_dim, d.kv_heads * d.head_dim
    head_rows = d.head_dim if d.split_halves else 0
    names: dict[str, tuple[str, tuple[int, ...], int]] = {
        EMBEDDING: ("token_embd.weight", (d.vocab, d.hidden), 0),
    }
    for i in range(d.blocks):
        source, target = f"model.layers.{i}.", f"blk.{i}."
        block: dict[str, tuple[str, tuple[int, ...], int]] = {
            "input_layernorm": ("attn_norm", (d.hidden,), 0),
            "self_attn.q_proj": ("attn_q", (q_rows, d.hidden), head_rows),
            "self_attn.k_proj": ("attn_k", (kv_rows, d.hidden), head_rows),
            "self_attn.v_proj": ("attn_v", (kv_rows, d.hidden), 0),
            "self_attn.o_proj": ("attn_output", (d.hidden, q_rows), 0),
            "post_attention_layernorm": ("ffn_norm", (d.hidden,), 0),
            f"{mlp}.gate_proj": ("ffn_gate", (d.ffn, d.hidden), 0),
            f"{mlp}.up_proj": ("ffn_up", (d.ffn, d.hidden), 0),
            f"{mlp}.down_proj": ("ffn_down", (d.hidden, d.ffn), 0),
        }
        for part, (name, shape, rows) in block.items():
            names[f"{source}{part}.weight"] = (f"{target}{name}.weight", shape, rows)
    names[FINAL_NORM] = ("output_norm.weight", (d.hidden,), 0)
    if not tied:
        names[HEAD] = ("output.weight", (d.vocab, d.hidden), 0)
    return names


def rope_theta(config: Config, default: float | None) -> float:
    """The base of the rotation; any scaling of positions is refused, and no base without a default.

    Older configs have rope_theta and rope_scaling, newer ones rope_parameters for both.
    """
    said = config.get("rope_theta") is not None
    theta = config.number("rope_theta", 1e12) if said else default
    for field in ("rope_scaling", "rope_parameters"):
        rope = config.get(field)
        if rope is None:
            continue
        kind = rope.get("rope_type", rope.get("type", "default")) if isinstance(rope, dict) else ""
        for name in rope if isinstance(rope, dict) else ():
            if name not in ROPE_FIELDS:  # by layer type, or of a scaling
                raise config.refusal(field, f"must hold {', '.join(ROPE_FIELDS)} only", name)
        if kind != "default" or rope.get("factor") not in (None, 1):
            raise config.refusal(field, "must be absent or of type 'default'", rope)
        if rope.get("partial_rotary_factor") not in (None, 1):
            raise config.refusal(f"{field}.partial_rotary_factor", "must be 1", rope)
        inner = rope.get("rope_theta")
        if inner is None:
            continue
        inner = config.check_number(f"{field}.rope_theta", inner, 1e12)
        if said and inner != theta:
            raise config.refusal(f"{field}.rope_theta", f"must equal rope_theta {theta:g}", inner)
        theta = inner
    if theta is None:
        raise config.missing("rope_theta")
    return theta


def decide_tying(config: Config, tensors: dict[str, Tensor]) -> tuple[bool, list[str]]:
    """Whether the head is the embedding, which the tensors say and not the config, and notes."""
    says_tied = any([config.flag("share_embedding"), config.flag("tie_word_embeddings")])
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
