"""The sound inputs that fuzzing starts from. A further one is a line here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from checkpoints import make_checkpoint, make_pro, make_r1
from mobilellm_cpp.convert import convert_checkpoint

# Who makes it, and with which arguments: all tiny, so that a case takes milliseconds.
TINY: dict[str, Any] = dict(hidden=32, heads=2, kv_heads=1, ffn=64, vocab=340)
CHECKPOINTS: dict[str, tuple[Any, dict[str, Any]]] = {
    "base": (make_checkpoint, dict(dtype="bf16")),
    "shared": (make_checkpoint, dict(dtype="f32", sharing=True, container="sharded")),
    "untied": (make_checkpoint, dict(dtype="f16", tied=False, architecture="LlamaForCausalLM")),
    "bin": (make_checkpoint, dict(dtype="bf16", container="bin")),
    "sharded-bin": (make_checkpoint, dict(dtype="f16", sharing=True, container="sharded-bin")),
    "r1": (make_r1, dict(rope=[1, 0, 1])),
    "pro": (make_pro, dict(dtype="f32")),
    "nested-pro": (make_pro, dict(nested=True, container="sharded", rope=[1, 1, 0])),
}

# A checkpoint, and the type that it is converted to.
FILES: dict[str, tuple[str, str]] = {
    "llama-f32": ("base", "f32"),
    "mobilellm-f32": ("shared", "f32"),
    "mobilellm-q8_0": ("shared", "q8_0"),
    "untied-q4_0": ("untied", "q4_0"),
    "r1-f16": ("r1", "f16"),
    "pro-q4_0": ("pro", "q4_0"),
    "pro-f32": ("nested-pro", "f32"),
}


def make_seeds(folder: Path) -> None:
    """Writes checkpoint/NAME/ and gguf/NAME into `folder`."""
    (folder / "gguf").mkdir(parents=True)
    for name, (make, options) in CHECKPOINTS.items():
        make(folder / "checkpoint" / name, **{**TINY, **options})
    for name, (source, type) in FILES.items():
        convert_checkpoint(folder / "checkpoint" / source, folder / "gguf" / name, type=type)
