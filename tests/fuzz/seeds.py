"""The sound inputs that fuzzing starts from. A further one is a line here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from checkpoints import make_checkpoint
from mobilellm_cpp.convert import convert_checkpoint

# Arguments of make_checkpoint: tiny, so that a case takes milliseconds.
TINY: dict[str, Any] = dict(hidden=32, heads=2, kv_heads=1, ffn=64, vocab=340)
CHECKPOINTS: dict[str, dict[str, Any]] = {
    "base": dict(dtype="bf16"),
    "shared": dict(dtype="f32", sharing=True, container="sharded"),
    "untied": dict(dtype="f16", tied=False, architecture="LlamaForCausalLM"),
    "bin": dict(dtype="bf16", container="bin"),
    "sharded-bin": dict(dtype="f16", sharing=True, container="sharded-bin"),
}

# A checkpoint, and the type that it is converted to.
FILES: dict[str, tuple[str, str]] = {
    "llama-f32": ("base", "f32"),
    "mobilellm-f32": ("shared", "f32"),
    "mobilellm-q8_0": ("shared", "q8_0"),
    "untied-q4_0": ("untied", "q4_0"),
}


def make_seeds(folder: Path) -> None:
    """Writes checkpoint/NAME/ and gguf/NAME into `folder`."""
    (folder / "gguf").mkdir(parents=True)
    for name, options in CHECKPOINTS.items():
        make_checkpoint(folder / "checkpoint" / name, **{**TINY, **options})
    for name, (source, type) in FILES.items():
        convert_checkpoint(folder / "checkpoint" / source, folder / "gguf" / name, type=type)
