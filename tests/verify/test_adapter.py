"""`verify` of adapter files: sound ones pass in every type, and planted faults are found."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapters import ALL, peft_model
from checkpoints import make_checkpoint, make_r1
from gguf import GGUFReader
from mobilellm_cpp.convert import convert_adapter, open_source

from mobilellm_cpp import ModelError
from mobilellm_cpp.inspection.adapter_check import AdapterVerification, verify_adapter

KINDS: dict[str, tuple[Any, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "base": (make_checkpoint, {}, {}, {}),
    "untied": (make_checkpoint, {"tied": False}, {"target_modules": [*ALL, "lm_head"]}, {}),
    "rslora": (
        make_checkpoint,
        {"sharing": True},
        {"use_rslora": True, "alpha_pattern": {"o_proj": 3}, "rank_pattern": {"q_proj": 2}},
        {},
    ),
    "portable": (make_checkpoint, {"sharing": True}, {}, {"portable": True}),
    "r1": (make_r1, {"rope": [1, 0, 1]}, {}, {}),
    "portable-r1": (make_r1, {}, {}, {"portable": True, "schedule": "reverse"}),
    "pro": (make_r1, {"qk_norm": False}, {}, {}),
}


def made(name: str, folder: Path, kind: str = "f32") -> tuple[Path, dict[str, Any]]:
    """The adapter file of a kind, and how it was converted."""
    make, options, lora, way = KINDS[name]
    base = make(folder / "base", dtype="f32", **options)
    peft_model(base, **lora).save_pretrained(folder / "lora", save_embedding_layers=False)
    convert_adapter(folder / "lora", folder / "a.gguf", base=base, type=kind, **way)
    return folder / "a.gguf", {"base": base, "schedule": way.get("schedule")}


def check(path: Path, way: dict[str, Any]) -> AdapterVerification:
    adapter = open_source(path.parent / "lora")
    return verify_adapter(path, adapter, **way)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("name", KINDS)
def test_sound_adapters_pass(name: str, kind: str, tmp_path: Path) -> None:
    path, way = made(name, tmp_path, kind)
    found = check(path, way)
    assert found.ok, found.failures
    assert 0 <= max(module.share for module in found.modules) < 1
    tensors = len(GGUFReader(path).tensors)
    assert len(found.modules) == tensors / 2


def change(path: Path, name: str, edit: Callable[[np.ndarray], np.ndarray]) -> None:
    """Replace the values of a tensor in place."""
    tensor = next(t for t in GGUFReader(path).tensors if t.name == name)
    start, values = tensor.data_offset, np.array(tensor.data)
    with open(path, "r+b") as file:
        file.seek(start)
        file.write(np.ascontiguousarray(edit(values)).tobytes())


Q = "blk.1.attn_q.weight.lora_b"
FAULTS: dict[str, tuple[str, Callable[[np.ndarray], np.ndarray]]] = {
    "a changed number": (Q, lambda b: np.where(b == b.max(), b * 1.01, b)),
    "heads not reordered": (
        Q,
        lambda b: b.reshape(4, 8, 2, -1).swapaxes(1, 2).reshape(b.shape),
    ),
    "another scale": ("blk.0.ffn_up.weight.lora_b", lambda b: b * np.float32(2**0.5)),
    "transposed": ("blk.0.attn_output.weight.lora_a", lambda a: a.T.reshape(a.shape)),
    "nothing": ("blk.1.ffn_down.weight.lora_a", np.zeros_like),
    "no numbers": ("blk.1.ffn_down.weight.lora_a", lambda a: a * np.float32("nan")),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults(fault: str, tmp_path: Path) -> None:
    path, way = made("base", tmp_path)
    name, edit = FAULTS[fault]
    change(path, name, edit)
    (sentence,) = check(path, way).failures
    assert sentence.startswith(name.rsplit(".", 1)[0])


def test_swapped_blocks_and_foreign_files(tmp_path: Path) -> None:
    path, way = made("base", tmp_path)
    content = path.read_bytes().replace(b"blk.0.attn_v", b"blk.9.attn_v")
    path.write_bytes(content.replace(b"blk.1.attn_v", b"blk.0.attn_v"))
    failures = check(path, way).failures
    assert "the file has no blk.1.attn_v.weight.lora_a and lora_b" in failures
    assert "the adapter has no blk.9.attn_v.weight.lora_b" in failures
    assert any(text.startswith("blk.0.attn_v.weight is not the adapter's") for text in failures)

    (tmp_path / "shared").mkdir()
    path, way = made("rslora", tmp_path / "shared")
    (sentence,) = check(path, way | {"schedule": [0, 1]}).failures
    assert sentence == "the architecture is mobilellm, and the base's files are llama or llama"


def test_the_command(tmp_path: Path) -> None:
    path, way = made("base", tmp_path)

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "mobilellm_cpp", "verify", path, tmp_path / "lora"]
        return subprocess.run([*map(str, [*command, *arguments])], capture_output=True, text=True)

    done = run("--base", way["base"])
    assert done.returncode == 0 and "verdict    the file matches the adapter" in done.stdout
    assert re.search(r"blk\.1\.ffn_down\.weight +f32   rank 4  max .Δ. 0\.00e\+00", done.stdout)
    change(path, *FAULTS["another scale"])
    done = run("--base", way["base"], "--json")
    assert done.returncode == 1 and json.loads(done.stdout)["ok"] is False
    assert "a.gguf does not match" in done.stderr and "blk.0.ffn_up.weight" in done.stderr
    os.remove(way["base"] / "config.json")
    assert "config.json is missing" in run("--base", way["base"]).stderr


def test_a_model_is_no_adapter(tmp_path: Path) -> None:
    from mobilellm_cpp import convert_checkpoint

    path, way = made("base", tmp_path)
    convert_checkpoint(way["base"], tmp_path / "m.gguf")
    with pytest.raises(ModelError, match="m.gguf is not an adapter file"):
        verify_adapter(tmp_path / "m.gguf", open_source(tmp_path / "lora"), base=way["base"])
