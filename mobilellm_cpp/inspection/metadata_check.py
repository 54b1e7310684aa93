"""Whether a file's metadata describes the computation that config.json describes.

Every key of the architecture counts: one that no model of the family needs may change what
llama.cpp computes by less than the graph's check can see, and is a failure like a wrong value.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..convert import keys
from ..convert.reference import Hyperparameters
from ..engine.gguf_file import GGUFFile, is_count
from .file_weights import FileWeights

# What an architecture of ours or of stock llama.cpp reads of its layers; the others ignore it.
WITH_PATTERNS = ("mobilellm", "granite_swa")
ALWAYS_NORMED = ("qwen3",)  # q and k


def check_metadata(
    file: GGUFFile, weights: FileWeights, hyper: Hyperparameters
) -> tuple[dict[str, Any], list[str]]:
    """What was compared, as config.json has it, and a sentence for each difference."""
    expected = _described(hyper, weights.blocks)
    found = _file_says(file, weights)
    failures = [
        f"{name} is {_shown(found[name])}, but config.json makes it {_shown(value)}"
        for name, value in expected.items()
        if found[name] != value
    ]
    written = {
        keys.key(name, weights.arch)
        for name, (ours, _) in keys.KNOWN.items()
        if ours or name == keys.LOGIT_SCALE
    }
    for key in file.keys:
        if key.startswith(f"{weights.arch}.") and key not in written:
            failures.append(f"{key} is not a key that config.json calls for")
    return expected, failures


def _described(hyper: Hyperparameters, blocks: list[int]) -> dict[str, Any]:
    """What a file must say, by names for people; `blocks` are those of the checkpoint that the
    file's blocks are."""
    return {
        "executed blocks": list(hyper.schedule),
        "width": hyper.hidden,
        "FFN width": hyper.ffn,
        "heads": hyper.heads,
        "KV heads": hyper.kv_heads,
        "head size": hyper.head_dim,
        "V head size": hyper.head_dim,
        "tokens": hyper.vocab,
        "vocabulary": hyper.vocab,
        "context": hyper.context,
        "norm epsilon": float(np.float32(hyper.epsilon)),
        "RoPE base": float(np.float32(hyper.theta)),
        "RoPE dimensions": hyper.head_dim,
        "scale of logits": 1.0,
        "q and k norm": hyper.qk_norm and any(hyper.rope),
        "RoPE": [hyper.rope[block] for block in blocks],
        "windows": [hyper.windows[block] for block in blocks],
    }


def _file_says(file: GGUFFile, weights: FileWeights) -> dict[str, Any]:
    """The same from the file, with llama.cpp's defaults for keys that are absent."""
    arch = weights.arch

    def value(name: str, default: Any = None) -> Any:
        return file.get(keys.key(name, arch), default)

    heads = value(keys.HEAD_COUNT)
    width = value(keys.EMBEDDING_LENGTH)
    size = value(keys.KEY_LENGTH)
    if size is None and is_count(heads) and is_count(width):
        size = width // heads
    tokens = file.get("tokenizer.ggml.tokens")
    blocks = len(weights.blocks)
    rope, slides = [1] * blocks, [False] * blocks
    if arch in WITH_PATTERNS:
        rope = value(keys.ROPE_PATTERN, rope)
        slides = value(keys.SLIDING_PATTERN, slides)
    window = value(keys.SLIDING_WINDOW)
    norm = value(keys.QK_NORM, False) if arch == "mobilellm" else arch in ALWAYS_NORMED
    return {
        "executed blocks": weights.executed,
        "width": width,
        "FFN width": value(keys.FEED_FORWARD_LENGTH),
        "heads": heads,
        "KV heads": value(keys.HEAD_COUNT_KV, heads),
        "head size": size,
        "V head size": value(keys.VALUE_LENGTH, size),
        "tokens": tokens,
        "vocabulary": value(keys.VOCAB_SIZE, tokens),
        "context": value(keys.CONTEXT_LENGTH),
        "norm epsilon": value(keys.NORM_EPSILON),
        "RoPE base": value(keys.ROPE_BASE, 10000.0),
        "RoPE dimensions": value(keys.ROPE_DIMENSIONS, size),
        "scale of logits": value(keys.LOGIT_SCALE, 1.0),
        "q and k norm": norm,
        "RoPE": [bool(used) for used in rope] if isinstance(rope, list) else rope,
        "windows": [window if s else None for s in slides] if isinstance(slides, list) else slides,
    }


def _shown(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else text[:77] + "..."
