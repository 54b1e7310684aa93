"""Tiny random models of any architecture that llama.cpp knows: its loader says what it wants.

    make_tiny("gemma2", folder / "gemma2.gguf")

The loader is asked again and again: it names the key or the tensor that is missing, and the shape
that a tensor should have, until it is content.
"""

import re
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType, GGUFWriter

from mobilellm_cpp.engine.library import lib, llama_cpp, reason

GGML_QUANT_SIZES[GGMLQuantizationType.Q8_1] = (32, 36)  # as ggml has it; gguf-py says 40

VOCAB = 300
WORDS = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
WORDS += [f"w{i}" for i in range(VOCAB - len(WORDS))]

# what most decoders have; a value may be replaced by an architecture's own below
KEYS: dict[str, Any] = {
    "block_count": 2,
    "context_length": 128,
    "embedding_length": 64,
    "feed_forward_length": 96,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "attention.layer_norm_epsilon": 1e-5,
    "rope.dimension_count": 16,
    "attention.sliding_window": 32,
    "vocab_size": VOCAB,
}
OWN: dict[str, dict[str, Any]] = {
    "mamba": {
        "ssm.conv_kernel": 4,
        "ssm.inner_size": 128,
        "ssm.state_size": 16,
        "ssm.time_step_rank": 4,
        "attention.head_count": 0,
    },
    "qwen2moe": {"expert_count": 4, "expert_used_count": 2, "expert_feed_forward_length": 32},
    "gpt2": {"attention.head_count_kv": 4},
    "bert": {"attention.head_count_kv": 4, "attention.causal": False},
    "mpt": {"attention.max_alibi_bias": 8.0, "attention.head_count_kv": 4},
    "bloom": {"attention.head_count_kv": 4},
    "gptneox": {"use_parallel_residual": True, "attention.head_count_kv": 4},
}


def write_tiny(
    architecture: str,
    path: Path,
    tensors: dict[str, Any],
    keys: dict[str, Any] | None = None,
) -> Path:
    """tensors: name to an array, or to its bytes and their type."""
    writer = GGUFWriter(path, architecture)
    for key, value in {**KEYS, **OWN.get(architecture, {}), **(keys or {})}.items():
        kind = {bool: "BOOL", int: "UINT32", float: "FLOAT32"}[type(value)]
        writer.add_key_value(f"{architecture}.{key}", value, GGUFValueType[kind])
    bert = architecture == "bert"
    writer.add_tokenizer_model("bert" if bert else "llama")
    writer.add_token_list(WORDS)
    writer.add_token_scores([0.0] * VOCAB)
    writer.add_token_types([2, 3, 3] + [6] * 256 + [1] * (VOCAB - 259))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for name, value in tensors.items():
        array, kind = value if isinstance(value, tuple) else (value, None)
        writer.add_tensor(name, array, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def complaint(path: Path) -> str:
    """What the loader says of a file; nothing when it takes it."""
    lib.mobilellm_guard_begin(True)
    params = llama_cpp.llama_model_default_params()
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
    lib.mobilellm_guard_end()
    if not model:
        return reason() or "no reason"
    llama_cpp.llama_model_free(model)
    return ""


def make_tiny(architecture: str, path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Writes the file and returns its tensors, and the keys that it needs beside KEYS and OWN."""
    tensors: dict[str, np.ndarray] = {}
    keys: dict[str, Any] = {}
    rng = np.random.default_rng(0)
    for _ in range(400):
        write_tiny(architecture, path, tensors, keys)
        said = complaint(path)
        if not said:
            return tensors, keys
        if match := re.search(r"key not found in model: \S+?\.([\w.]+)", said):
            keys[match[1]] = 1.0
        elif match := re.search(r"tensor '([^']+)' not found", said):
            tensors[match[1]] = np.ones(1, np.float32)
        elif match := re.search(r"tensor '([^']+)' has wrong shape; expected ([\d, ]+), got", said):
            shape = [int(n) for n in match[2].split(",")][::-1]
            tensors[match[1]] = (rng.standard_normal(shape) * 0.1).astype(np.float32)
        else:
            raise AssertionError(f"{architecture}: {said}")
    raise AssertionError(f"{architecture}: {said}")
