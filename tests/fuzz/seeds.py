"""The sound inputs that fuzzing starts from. A further one is a line here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from checkpoints import (
    characters_json,
    make_checkpoint,
    make_pro,
    make_r1,
    random_tensor,
    save_bin,
    save_safetensors,
    tensor_shapes,
    write_characters,
)
from lattices import pareto
from mobilellm_cpp.convert import convert_adapter, convert_checkpoint

from mobilellm_cpp import MobileLLM


def make_lattice(folder: Path, bits: int, **options: Any) -> Path:
    """A checkpoint whose projections are on ParetoQ's lattice of `bits` (0: ternary)."""
    hidden, heads, kv_heads, ffn, vocab = (options[name] for name in TINY)
    shapes = tensor_shapes(2, hidden, hidden, hidden // heads * kv_heads, ffn, vocab, True)
    matrices = {name: shape for name, shape in shapes.items() if "_proj" in name}
    tensors = {n: pareto(random_tensor(n, shape, 0), bits) for n, shape in matrices.items()}
    return make_checkpoint(folder, tensors=tensors, **options)


def make_characters(folder: Path, spaces: str, **options: Any) -> Path:
    """A checkpoint whose only tokenizer is a tokenizer.json of characters, with rules of ours."""
    from tokenizers import AddedToken

    added = [
        AddedToken("<|user|>", special=True, normalized=False, rstrip=True),
        AddedToken("<new>", lstrip=True),
    ]
    vocab = options.pop("vocab")
    path = make_checkpoint(folder, vocab=vocab + len(added), **options)
    write_characters(path, characters_json(vocab, spaces, added))
    return path


def make_qat(folder: Path, **options: Any) -> Path:
    """A checkpoint with scales of quantization-aware training: of rows for q, of groups for k."""
    hidden, heads, kv_heads = (options[name] for name in ("hidden", "heads", "kv_heads"))
    scales = {
        f"model.layers.0.self_attn.{part}_proj.weight_fake_quantizer.scale": np.full(
            shape, 0.05, np.float32
        )
        for part, shape in (("q", (hidden, 1)), ("k", (hidden // heads * kv_heads, 2)))
    }
    return make_checkpoint(folder, tensors=scales, **options)


# Who makes it, and with which arguments: all as small as the packed weights and the fused decoding
# can be, so that a case takes milliseconds.
TINY: dict[str, Any] = dict(hidden=64, heads=2, kv_heads=1, ffn=128, vocab=340)
CHECKPOINTS: dict[str, tuple[Any, dict[str, Any]]] = {
    "base": (make_checkpoint, dict(dtype="bf16")),
    "shared": (make_checkpoint, dict(dtype="f32", sharing=True, container="sharded")),
    "untied": (make_checkpoint, dict(dtype="f16", tied=False, architecture="LlamaForCausalLM")),
    "bin": (make_checkpoint, dict(dtype="bf16", container="bin")),
    "sharded-bin": (make_checkpoint, dict(dtype="f16", sharing=True, container="sharded-bin")),
    "r1": (make_r1, dict(rope=[1, 0, 1])),
    "pro": (make_pro, dict(dtype="f32")),
    "nested-pro": (make_pro, dict(nested=True, container="sharded", rope=[1, 1, 0])),
    "plain-r1": (make_r1, dict(dtype="f16")),
    "plain-pro": (make_pro, dict(qk_norm=False)),
    "characters": (make_characters, dict(spaces="first")),
    "normalizer": (make_characters, dict(spaces="prepend", sharing=True)),
    "lattice-0": (make_lattice, dict(bits=0)),
    "lattice-4": (make_lattice, dict(bits=4, dtype="f32")),
    "lattice-qat": (make_qat, dict(dtype="f32")),
}


def make_adapter(folder: Path, *, blocks: int = 2, container: str = "safetensors") -> Path:
    """A LoRA adapter for the checkpoints of TINY, as PEFT saves it."""
    folder.mkdir(parents=True)
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": "org/base",
        "r": 4,
        "lora_alpha": 8,
        "use_rslora": True,
        "use_dora": False,
        "modules_to_save": None,
        "init_lora_weights": True,
        "rank_pattern": {"o_proj": 2},
        "alpha_pattern": {r"layers\.1\.mlp\..*": 3.5},
        "target_modules": ["q_proj", "o_proj", "down_proj"],
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    arrays = {}
    for block in range(blocks):
        for module, rank, rows, columns in (
            ("self_attn.q_proj", 4, 64, 64),
            ("self_attn.o_proj", 2, 64, 64),
            ("mlp.down_proj", 4, 64, 128),
        ):
            name = f"base_model.model.model.layers.{block}.{module}.lora_"
            arrays[f"{name}A.weight"] = random_tensor(name + "A", (rank, columns), 0)
            arrays[f"{name}B.weight"] = random_tensor(name + "B", (rows, rank), 0)
    save = save_bin if container == "bin" else save_safetensors
    shapes = {name: (array.shape, array.dtype) for name, array in arrays.items()}
    save(folder / f"adapter_model.{container}", shapes, iter(arrays.values()))
    return folder


# An adapter, and the GGUF file and the checkpoint of its base.
ADAPTERS: dict[str, tuple[dict[str, Any], str, str]] = {
    "lora": ({}, "llama-f32", "base"),
    "lora-bin": ({"container": "bin"}, "untied-q4_0", "untied"),
    "lora-shared": ({}, "mobilellm-q8_0", "shared"),
}

# The files of which a state is saved.
STATE_TOKENS = list(range(5, 25))
STATES = ("mobilellm-q8_0", "pro-f32")

# A checkpoint, and how it is converted.
FILES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-f32": ("base", dict(type="f32")),
    "mobilellm-f32": ("shared", dict(type="f32")),
    "mobilellm-q8_0": ("shared", dict(type="q8_0")),
    "untied-q4_0": ("untied", dict(type="q4_0")),
    "r1-f16": ("r1", dict(type="f16")),
    "pro-q4_0": ("pro", dict(type="q4_0")),
    "pro-f32": ("nested-pro", dict(type="f32")),
    "qwen3-f16": ("plain-r1", dict(type="f16", portable=True)),
    "granite_swa-f32": ("plain-pro", dict(type="f32", portable=True)),
    "characters-f16": ("characters", dict(type="f16")),
    "normalizer-q8_0": ("normalizer", dict(type="q8_0")),
    "lattice-exact": ("lattice-0", dict(type="exact")),
}

# Those that `verify` is shown together with their checkpoint.
VERIFIED = FILES | {"lattice-4-exact": ("lattice-4", dict(type="exact"))}
# Those that have an adapter merged into them.
MERGED = {"merged-q8_0": ("lora-shared", "q8_0"), "merged-q4_0": ("lora-bin", "q4_0")}


def make_seeds(folder: Path) -> None:
    """Writes checkpoint/NAME/, adapter/NAME/, gguf/NAME, lora/NAME and state/NAME into `folder`."""
    for kind in ("gguf", "lora", "state"):
        (folder / kind).mkdir(parents=True)
    for name, (make, options) in CHECKPOINTS.items():
        make(folder / "checkpoint" / name, **{**TINY, **options})
    for name, (source, way) in VERIFIED.items():
        convert_checkpoint(folder / "checkpoint" / source, folder / "gguf" / name, **way)
    for name, (options, _, source) in ADAPTERS.items():
        make_adapter(folder / "adapter" / name, **options)
        base = folder / "checkpoint" / source
        convert_adapter(folder / "adapter" / name, folder / "lora" / name, base=base)
    for name, (adapter, kind) in MERGED.items():
        base = folder / "checkpoint" / ADAPTERS[adapter][2]
        way = {"type": kind, "adapter": folder / "adapter" / adapter}
        convert_checkpoint(base, folder / "gguf" / name, **way)
    for name in STATES:
        with MobileLLM(folder / "gguf" / name, n_ctx=64, n_threads=1) as llm:
            llm.eval(STATE_TOKENS)
            (folder / "state" / name).write_bytes(llm.save_state().llama_state)
