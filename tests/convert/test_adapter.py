"""Adapter files: equal to what llama.cpp's own converter writes, and what none can hold is refused
by name. PEFT makes the adapters."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import ALL, peft_model
from checkpoints import make_checkpoint, make_r1
from gguf import GGUFReader
from mobilellm_cpp.convert import convert_adapter, convert_checkpoint, open_checkpoint
from safetensors.torch import load_file, save_file

from mobilellm_cpp.errors import CheckpointError


def contents(path: Path) -> tuple[dict[str, Any], dict[str, tuple[int, list[int], bytes]]]:
    reader = GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {
        t.name: (int(t.tensor_type), t.shape.tolist(), t.data.tobytes()) for t in reader.tensors
    }
    return fields, tensors


# Runs llama.cpp's converter several times in one process, for its imports take seconds.
UPSTREAM = """
import os, runpy, sys
script, base, lora, *jobs = sys.argv[1:]
sys.path.insert(0, os.path.dirname(script))
for out in jobs:
    kind = os.path.basename(out).split("-")[0]
    sys.argv = [script, lora, "--base", base, "--outtype", kind, "--outfile", out]
    runpy.run_path(script, run_name="__main__")
"""


def test_equals_llama_cpps_converter(tmp_path: Path, llama_cpp_source: Path) -> None:
    base = make_checkpoint(tmp_path / "base", architecture="LlamaForCausalLM", tied=False)
    model = peft_model(base, target_modules=[*ALL, "lm_head"])
    model.save_pretrained(tmp_path / "lora", save_embedding_layers=False)
    kinds = ("f32", "f16", "bf16")
    command = [sys.executable, "-c", UPSTREAM, str(llama_cpp_source / "convert_lora_to_gguf.py")]
    command += [str(base), str(tmp_path / "lora")]
    done = subprocess.run(
        [*command, *(str(tmp_path / f"{kind}-theirs.gguf") for kind in kinds)],
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for kind in kinds:
        convert_adapter(tmp_path / "lora", tmp_path / "ours.gguf", base=base, type=kind)
        ours, our_tensors = contents(tmp_path / "ours.gguf")
        theirs, their_tensors = contents(tmp_path / f"{kind}-theirs.gguf")
        assert our_tensors == their_tensors
        for key in ("architecture", "type"):
            assert ours[f"general.{key}"] == theirs[f"general.{key}"]
        for key in ("adapter.type", "adapter.lora.alpha"):
            assert ours[key] == theirs[key]


def test_bin_and_wrapped_names(tmp_path: Path) -> None:
    base = make_checkpoint(tmp_path / "base")
    peft_model(base).save_pretrained(tmp_path / "lora")
    convert_adapter(tmp_path / "lora", tmp_path / "a.gguf", base=base)
    weights = tmp_path / "lora" / "adapter_model.safetensors"
    state = {f"module.{name}": tensor for name, tensor in load_file(weights).items()}
    torch.save(state, weights.with_suffix(".bin"))
    weights.unlink()
    convert_adapter(tmp_path / "lora", tmp_path / "b.gguf", base=base)
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_the_base_is_found_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = make_checkpoint(tmp_path / "base")
    peft_model(base).save_pretrained(tmp_path / "lora")
    monkeypatch.chdir(tmp_path)
    (base / "model.safetensors").unlink()  # its config.json is enough
    report = convert_adapter("lora")
    assert report.path == Path("lora-lora-f32.gguf") and report.ranks == (4, 4)
    assert report.n_modules == 14
    change(tmp_path / "lora", base_model_name_or_path="/home/somebody/base")
    with pytest.raises(CheckpointError, match="/home/somebody/base, which is neither .* --base"):
        convert_adapter("lora")
    change(tmp_path / "lora", base_model_name_or_path=None)
    with pytest.raises(CheckpointError, match="names no base: give it with --base"):
        convert_adapter("lora")


def change(folder: Path, **fields: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def rename(old: str, new: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda state: {name.replace(old, new): tensor for name, tensor in state.items()}


A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
ONES = torch.ones(4, 64)
REFUSALS: list[tuple[dict[str, Any], Any, str]] = [
    ({"peft_type": "IA3"}, None, "peft_type must be LORA, not 'IA3'"),
    ({"use_dora": True}, None, "use_dora is set"),
    ({"modules_to_save": ["lm_head"]}, None, r"modules_to_save must be absent.*'lm_head'"),
    ({"bias": "all"}, None, "bias must be none"),
    ({"fan_in_fan_out": True}, None, "fan_in_fan_out must be absent or false"),
    ({"layer_replication": [[0, 2]]}, None, "layer_replication must be absent"),
    ({"trainable_token_indices": [3]}, None, "trainable_token_indices must be absent"),
    ({"alora_invocation_tokens": [3]}, None, "alora_invocation_tokens must be absent"),
    ({"a_later_invention": {"x": 1}}, None, "a_later_invention must be absent"),
    ({"init_lora_weights": "pissa"}, None, "init_lora_weights must be true"),
    ({"init_lora_weights": 2}, None, "init_lora_weights must be true"),
    (
        {"r": 5},
        None,
        r"shapes \[4, 128\] and \[64, 4\], and adapter_config.json makes their rank 5",
    ),
    ({"r": "4"}, None, "r must be a whole number"),
    ({"lora_alpha": 0}, None, "lora_alpha must be a number from"),
    ({"lora_alpha": float("nan")}, None, "lora_alpha must be a number from"),
    ({"rank_pattern": {"q_proj": 3}}, None, "makes their rank 3"),
    ({"rank_pattern": [3]}, None, "rank_pattern must be an object of numbers"),
    ({"rank_pattern": {"q_proj": 2.5}}, None, "rank_pattern must hold whole numbers"),
    ({"alpha_pattern": {"q_proj": "x"}}, None, "alpha_pattern must be a number"),
    ({"alpha_pattern": {"(((a+)+)+)+b": 2}}, None, "must hold plainer expressions"),
    ({"alpha_pattern": {".*" * 9: 2}}, None, "must hold plainer expressions"),
    ({"alpha_pattern": {"(.|.)" * 30: 2}}, None, "must hold plainer expressions"),
    ({"alpha_pattern": {"(?x:(o+) +)": 2}}, None, "must hold plainer expressions"),
    ({"alpha_pattern": {"(": 2}}, None, "must hold regular expressions"),
    ({}, lambda state: {}, "holds no tensors"),
    ({}, lambda s: {n: t for n, t in s.items() if n != A}, "has no lora_A.weight beside it"),
    ({}, lambda s: {**s, A: s[A].to(torch.float64)}, r"lora_A.weight is F64"),
    ({}, lambda s: {**s, A: s[A][:, :60].clone()}, r"shape \[64, 60\], and the base's config.json"),
    ({}, lambda s: {**s, A: s[A].ravel()}, r"have shapes \[256\]"),
    ({}, lambda s: {**s, A: s[A] * float("nan")}, r"lora_A.weight holds nan at \[0, 0\]"),
    ({}, rename("layers.1.", "layers.2."), "adapts block 2, and the base has blocks 0 to 1"),
    ({}, rename("self_attn.q_proj", "self_attn.qkv"), "adapts model.layers.0.self_attn.qkv"),
    ({}, rename("self_attn.q_proj", "input_layernorm"), "adapts model.layers.0.input_layernorm"),
    ({}, rename("model.layers.0.self_attn.q_proj", "lm_head"), "adapts the head, which is the emb"),
    (
        {},
        rename("model.layers.0.self_attn.q_proj", "model.embed_tokens"),
        "model.embed_tokens, a matrix that the graph cannot adapt",
    ),
    ({}, rename("q_proj.lora_A.weight", "q_proj.lora_embedding_A"), "adapts the embedding"),
    ({}, rename("q_proj.lora_A.weight", "q_proj.lora_magnitude_vector"), "is a part of DoRA"),
    ({}, lambda s: {**s, A.replace("_A.weight", "_B.bias"): ONES}, "no adapter file can hold"),
    ({}, lambda s: {**s, "base_model.model.lm_head.weight": ONES}, r"whole weight .*_to_save"),
    ({}, lambda s: {**s, f"module.{A}": ONES.clone()}, "is there twice"),
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lora")
    peft_model(make_checkpoint(folder / "base")).save_pretrained(folder / "lora")
    return folder


@pytest.mark.parametrize("fields, edit, part", REFUSALS)
def test_refusals(
    trained: Path, fields: dict[str, Any], edit: Any, part: str, tmp_path: Path, untouched: Path
) -> None:
    folder = tmp_path / "lora"
    folder.mkdir()
    for file in (trained / "lora").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    change(folder, **fields)
    weights = folder / "adapter_model.safetensors"
    if edit is not None:
        save_file(edit(load_file(weights)), weights)
    with pytest.raises(CheckpointError, match=part) as caught:
        convert_adapter(folder, untouched, base=trained / "base")
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")
    with pytest.raises(CheckpointError):  # and merging sees the same
        convert_checkpoint(trained / "base", untouched, adapter=folder)


def test_an_adapter_of_executed_layers(tmp_path: Path, untouched: Path) -> None:
    unrolled = make_checkpoint(tmp_path / "unrolled", layers=4)
    peft_model(unrolled).save_pretrained(tmp_path / "lora")
    base = make_checkpoint(tmp_path / "base", layers=2, sharing=True)
    with pytest.raises(CheckpointError, match="stores 2 blocks and executes them as 4 layers"):
        convert_adapter(tmp_path / "lora", untouched, base=base)


def test_what_is_no_adapter_and_what_is_no_model(trained: Path, untouched: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a LoRA adapter"):
        convert_adapter(trained / "base", untouched)
    with pytest.raises(CheckpointError, match="is a LoRA adapter and not a model: .*--merge"):
        open_checkpoint(trained / "lora")
    with pytest.raises(CheckpointError, match="must be one of f32, f16, bf16"):
        convert_adapter(trained / "lora", untouched, type="q8_0")
    with pytest.raises(CheckpointError, match="off their lattice"):
        convert_checkpoint(trained / "base", untouched, type="exact", adapter=trained / "lora")
    (trained / "empty").mkdir()
    (trained / "empty" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(CheckpointError, match="has no weights: adapter_model.safetensors and"):
        convert_adapter(trained / "empty", untouched)


def test_what_peft_leaves_beside_an_adapted_head(tmp_path: Path) -> None:
    """Without being asked it saves the head's own matrix, too."""
    base = make_checkpoint(tmp_path / "base", tied=False)
    peft_model(base, target_modules=["lm_head"]).save_pretrained(tmp_path / "lora")
    names = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    assert "base_model.model.lm_head.base_layer.weight" in names
    assert convert_adapter(tmp_path / "lora", tmp_path / "a.gguf", base=base).n_modules == 1


def test_kinds_of_architectures(tmp_path: Path) -> None:
    for name, make, options, architecture in [
        ("base", make_checkpoint, {}, "llama"),
        ("shared", make_checkpoint, {"sharing": True}, "mobilellm"),
        ("r1", make_r1, {}, "mobilellm"),
    ]:
        base = make(tmp_path / name, **options)
        peft_model(base).save_pretrained(tmp_path / "lora")
        report = convert_adapter(tmp_path / "lora", tmp_path / "a.gguf", base=base)
        assert report.architecture == architecture
        assert contents(tmp_path / "a.gguf")[0]["general.architecture"] == architecture
