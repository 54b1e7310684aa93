"""Names and files as people have them: wrapped tensor names, lone files, forms of weights that are
no plain floats. Torch and safetensors write them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoints import make_checkpoint, make_pro
from mobilellm_cpp.convert import convert_checkpoint
from safetensors.torch import load_file, save_file

from mobilellm_cpp.cache import resolve
from mobilellm_cpp.errors import CheckpointError

WRAPPED: dict[str, Callable[[str], str]] = {
    "_orig_mod.": lambda name: f"_orig_mod.{name}",
    "module.": lambda name: f"module.{name}",
    "model.": lambda name: f"model.{name}",
    "base_model.model.": lambda name: f"base_model.model.{name}",
    "module._orig_mod.": lambda name: f"module._orig_mod.{name}",
    "model.module.": lambda name: f"model.module.{name}",
    "inside": lambda name: name.replace("model.layers.1.", "model.layers.1._orig_mod."),
}


def refusal(source: Path, out: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        convert_checkpoint(source, out)
    return str(caught.value)


@pytest.mark.parametrize("wrapper", list(WRAPPED))
def test_wrapped_names(wrapper: str, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "m", tied=False)
    assert convert_checkpoint(folder, tmp_path / "plain.gguf").notes == []
    wrap = WRAPPED[wrapper]
    path = folder / "model.safetensors"
    state = {wrap(name): tensor for name, tensor in load_file(path).items()}
    save_file(state, path)
    report = convert_checkpoint(folder, tmp_path / "wrapped.gguf")
    assert (tmp_path / "wrapped.gguf").read_bytes() == (tmp_path / "plain.gguf").read_bytes()
    assert "names are wrapped: " in report.notes[0] and " is read as " in report.notes[0]


def test_a_name_that_two_wrappers_hide(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "m")
    path = folder / "model.safetensors"
    state = load_file(path)
    state["module.model.norm.weight"] = state["model.norm.weight"].clone()
    save_file(state, path)
    assert "model.norm.weight is there twice" in refusal(folder, tmp_path / "m.gguf")


def one_shard(folder: Path) -> Path:
    return (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")


def own_name(folder: Path) -> Path:
    return (folder / "model.safetensors").rename(folder / "step-4000.safetensors")


def shard_of_some(folder: Path) -> Path:
    make_checkpoint(folder, container="sharded")
    (folder / "model.safetensors").unlink()
    return folder / "model-00002-of-00003.safetensors"


def shard_without_index(folder: Path) -> Path:
    path = shard_of_some(folder)
    (folder / "model.safetensors.index.json").unlink()
    return path


@pytest.mark.parametrize(
    "rename",
    [lambda f: f / "model.safetensors", one_shard, own_name, shard_of_some, shard_without_index],
)
def test_a_file_is_taken_with_its_folder(
    rename: Callable[[Path], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_checkpoint(tmp_path / "tiny")
    convert_checkpoint(folder, tmp_path / "plain.gguf")
    file = rename(folder)
    monkeypatch.chdir(tmp_path)
    report = convert_checkpoint(file)
    assert report.path.name == ("step-4000" if rename is own_name else "tiny") + "-f16.gguf"
    if rename is not own_name:
        assert report.path.read_bytes() == (tmp_path / "plain.gguf").read_bytes()
        convert_checkpoint(folder, tmp_path / "again.gguf")  # the folder is enough
        assert (tmp_path / "again.gguf").read_bytes() == (tmp_path / "plain.gguf").read_bytes()


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    file = shard_without_index(make_checkpoint(tmp_path / "m"))
    file.with_name("model-00003-of-00003.safetensors").unlink()
    for source in (file, file.parent):
        message = refusal(source, tmp_path / "m.gguf")
        assert "one of 3 shards, and model-00003-of-00003.safetensors is missing" in message


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    out = tmp_path / "m.gguf"
    folder = make_checkpoint(tmp_path / "c")
    convert_checkpoint(folder, out)
    (tmp_path / "nothing").mkdir()
    assert "nothing is empty" in refusal(tmp_path / "nothing", out)
    (tmp_path / "ggufs").mkdir()
    shutil.copy(out, tmp_path / "ggufs" / "a.gguf")
    message = refusal(tmp_path / "ggufs", out)
    assert "ggufs holds GGUF files" in message and "a.gguf" in message
    assert "a.gguf is a GGUF file" in refusal(tmp_path / "ggufs" / "a.gguf", out)
    assert "give the folder that holds config.json" in refusal(folder / "config.json", out)

    weights = folder / "model.safetensors"
    for content, part in [
        (b"", "model.safetensors is truncated: it is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "Git LFS"),
        (b"<!DOCTYPE html><html>404</html>", "a web page"),
        (out.read_bytes(), "a GGUF file by its content"),
    ]:
        weights.write_bytes(content)
        for source in (folder, weights):
            assert part in refusal(source, tmp_path / "n.gguf")


def test_weights_in_f8(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "m")
    path = folder / "model.safetensors"
    name = "model.layers.0.mlp.up_proj.weight"
    for kind, shown in [(torch.float8_e4m3fn, "F8_E4M3"), (torch.float8_e5m2, "F8_E5M2")]:
        state = {**load_file(path), name.replace("weight", "weight_scale"): torch.ones(1)}
        state[name] = state[name].to(kind)
        save_file(state, tmp_path / "f8.safetensors")
        torch.save(state, tmp_path / "f8.bin")
        for file in ("f8.safetensors", "f8.bin"):
            shutil.copy(folder / "config.json", tmp_path)
            message = refusal(tmp_path / file, tmp_path / "m.gguf")
            assert (
                f"{name} is {shown}, a weight in F8 form" in message
                and "save_pretrained" in message
            )


@pytest.mark.parametrize(
    "added, part",
    [
        (["qweight", "qzeros", "scales", "g_idx"], "GPTQ form"),
        (["qweight", "qzeros", "scales"], "AWQ form"),
        (["weight", "weight.absmax", "weight.quant_state.bitsandbytes__nf4"], "bitsandbytes form"),
        (["weight", "SCB"], "bitsandbytes form"),
        (["base_layer.weight", "lora_A.weight", "lora_B.weight"], "unmerged LoRA form"),
    ],
)
def test_quantized_tensors(added: list[str], part: str, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "m")
    path = folder / "model.safetensors"
    state = load_file(path)
    del state["model.layers.0.mlp.up_proj.weight"]
    state |= {
        f"model.layers.0.mlp.up_proj.{name}": torch.ones(4, dtype=torch.uint8) for name in added
    }
    save_file(state, path)
    message = refusal(folder, tmp_path / "m.gguf")
    assert part in message and "up_proj" in message


@pytest.mark.parametrize(
    "settings, part",
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "in bitsandbytes form"),
        ({"quant_method": "gptq", "bits": 4}, "in GPTQ form"),
        ({"quant_method": "awq"}, "in AWQ form"),
        ({"quant_method": "fp8"}, "in F8 form"),
        ({"quant_method": "hqq"}, "must be absent"),
        ({"quant_method": ["fp8"]}, "must be absent"),
        (["fp8"], "must be absent"),
    ],
)
def test_quantized_configs(settings: object, part: str, tmp_path: Path) -> None:
    folder = make_pro(tmp_path / "m")
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**fields, "quantization_config": settings}))
    message = refusal(folder, tmp_path / "m.gguf")
    assert part in message and "quantization_config" in message


def test_other_commands_take_a_weight_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOBILELLM_CACHE", str(tmp_path / "cache"))
    folder = make_checkpoint(tmp_path / "m")
    assert resolve(str(folder / "model.safetensors")) == resolve(str(folder))
