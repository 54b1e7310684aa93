"""The sound inputs that fuzzing starts from. A further one is a line here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from checkpoints import (
    characters_json,
    make_checkpoint,
    make_pro,
    make_r1,
    random_tensor,
    tensor_shapes,
    write_characters,
)
from lattices import pareto
from mobilellm_cpp.convert import convert_checkpoint


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
}

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


def make_seeds(folder: Path) -> None:
    """Writes checkpoint/NAME/ and gguf/NAME into `folder`."""
    (folder / "gguf").mkdir(parents=True)
    for name, (make, options) in CHECKPOINTS.items():
        make(folder / "checkpoint" / name, **{**TINY, **options})
    for name, (source, way) in VERIFIED.items():
        convert_checkpoint(folder / "checkpoint" / source, folder / "gguf" / name, **way)
