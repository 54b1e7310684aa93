"""`verify` of models with an adapter merged: right ones pass in every type, and what a converter
could do wrong with an adapter is found."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from adapters import ALL, peft_model
from checkpoints import make_checkpoint, make_pro, make_r1
from gguf import GGUFReader
from mobilellm_cpp.convert import convert_adapter
from safetensors.torch import load_file, save_file

from mobilellm_cpp import CheckpointError, convert_checkpoint, verify
from mobilellm_cpp.inspection.verification import NOISE_FACTOR, Verification

TYPES = ("f32", "f16", "bf16", "q8_0", "q4_0")
SHAPE: dict[str, Any] = {"layers": 3, "hidden": 128, "ffn": 192, "heads": 4, "kv_heads": 2}

# How the base is made, its adapter trained, and both converted.
KINDS: dict[str, tuple[Any, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "shared": (make_checkpoint, {"sharing": True}, {"use_rslora": True}, {}),
    "base": (make_checkpoint, {"tied": False}, {"target_modules": [*ALL, "lm_head"]}, {}),
    "r1": (make_r1, {"rope": [1, 0, 1]}, {"alpha_pattern": {"v_proj": 5}}, {}),
    "pro": (make_pro, {"sliding": [0, 1, 1], "window": 40}, {"rank_pattern": {"up_proj": 7}}, {}),
    "portable": (make_r1, {}, {}, {"portable": True}),
}


@pytest.fixture(scope="module", params=KINDS)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The folder of a base and its adapter, and how to convert them."""
    make, options, lora, way = KINDS[request.param]
    folder = tmp_path_factory.mktemp("merged")
    make(folder / "base", dtype="f16" if request.param == "base" else "bf16", **SHAPE, **options)
    model = peft_model(folder / "base", **lora)
    model.save_pretrained(folder / "lora", save_embedding_layers=False)
    return folder, way


def merge(folder: Path, out: Path, adapter: str = "lora", **way: Any) -> Path:
    return convert_checkpoint(folder / "base", out, adapter=folder / adapter, **way).path


def check(path: Path, folder: Path, **options: Any) -> Verification:
    return verify(path, folder / "base", adapter=folder / "lora", n_threads=1, **options)


@pytest.mark.parametrize("kind", TYPES)
def test_a_right_file_passes(kind: Any, made: Any, tmp_path: Path) -> None:
    folder, way = made
    found = check(merge(folder, tmp_path / "m.gguf", type=kind, **way), folder)
    assert found.ok, found.failures
    assert found.graph is not None and found.graph.ratio < NOISE_FACTOR
    # the logits are compared with those of the merged weights, from which only rounding parts them
    if limit := {"f32": 1e-5, "f16": 1e-3, "bf16": 1e-2}.get(kind):
        assert found.logits is not None and found.logits.kl_divergence < limit
    # what sums are allowed is no more than they need: some come to a hundredth of it
    if kind == "f32":
        assert 0.01 < max(tensor.share for tensor in found.tensors) < 1  # type: ignore[type-var]


def without(name: str) -> Callable[[Path], None]:
    """An adapter one of whose modules is missing."""

    def change(folder: Path) -> None:
        path = folder / "adapter_model.safetensors"
        tensors = load_file(path)
        kept = {key: value for key, value in tensors.items() if name not in key}
        assert len(kept) == len(tensors) - 2
        save_file(kept, path)

    return change


def swapped(one: str, other: str, part: str = "v_proj") -> Callable[[Path], None]:
    """An adapter of two blocks, each in the other's place."""

    def change(folder: Path) -> None:
        path = folder / "adapter_model.safetensors"
        renamed = {}
        for key, value in load_file(path).items():
            if part in key:
                key = key.replace(one, "#").replace(other, one).replace("#", other)
            renamed[key] = value
        save_file(renamed, path)

    return change


def setting(**fields: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))

    return change


def heads_as_stored(folder: Path) -> None:
    """B of q in the order of the file: as if only the base's rows were put in order."""
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    (name,) = [key for key in tensors if "layers.1.self_attn.q_proj.lora_B" in key]
    b = tensors[name]
    tensors[name] = b.reshape(4, 16, 2, -1).swapaxes(1, 2).reshape(b.shape).contiguous()
    save_file(tensors, path)


# What stands in the file that is merged, and the tensors that must be named.
ATTENTION = ("q", "k", "v", "output")
FAULTS: dict[str, tuple[Callable[[Path], None], set[str]]] = {
    "alpha ignored": (
        setting(lora_alpha=2),
        {f"blk.{i}.{part}" for i in range(3) for part in
         (*(f"attn_{p}" for p in ATTENTION), "ffn_gate", "ffn_up", "ffn_down")},
    ),
    "rslora ignored": (
        setting(use_rslora=False),
        {f"blk.{i}.{part}" for i in range(3) for part in
         (*(f"attn_{p}" for p in ATTENTION), "ffn_gate", "ffn_up", "ffn_down")},
    ),
    "another scale in one place": (
        setting(alpha_pattern={"layers.1.mlp.up_proj": 4}),
        {"blk.1.ffn_up"},
    ),
    "a missing module": (without("layers.2.mlp.down_proj"), {"blk.2.ffn_down"}),
    "swapped blocks": (swapped("layers.0", "layers.1"), {"blk.0.attn_v", "blk.1.attn_v"}),
    "heads not in order": (heads_as_stored, {"blk.1.attn_q"}),
}  # fmt: skip


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faults")
    make_checkpoint(folder / "base", sharing=True, **SHAPE)
    peft_model(folder / "base", use_rslora=True).save_pretrained(folder / "lora")
    return folder


@pytest.mark.parametrize("kind", ["f32", "f16", "q8_0", "q4_0"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_fails(fault: str, kind: Any, shared: Path, tmp_path: Path) -> None:
    change, wrong = FAULTS[fault]
    shutil.copytree(shared / "lora", tmp_path / "other")
    change(tmp_path / "other")
    path = merge(shared, tmp_path / "m.gguf", tmp_path / "other", type=kind)  # type: ignore[arg-type]
    found = check(path, shared, text="a few words are enough")
    assert {t.name for t in found.tensors if t.outside} == {f"{name}.weight" for name in wrong}
    assert len(found.failures) == len(wrong)
    assert "with the adapter merged" in found.failures[0]


def test_neither_without_nor_twice(shared: Path, tmp_path: Path) -> None:
    """The base's own file is none with the adapter, and the merged one not the base's."""
    convert_checkpoint(shared / "base", tmp_path / "base.gguf", type="q4_0")
    assert len(check(tmp_path / "base.gguf", shared).failures) == 21
    path = merge(shared, tmp_path / "m.gguf", type="q4_0")
    assert len(verify(path, shared / "base", n_threads=1).failures) == 21


@pytest.mark.parametrize("place", ["chat_template.jinja", "tokenizer_config.json"])
def test_the_adapters_chat_template(place: str, shared: Path, tmp_path: Path) -> None:
    """The tokenizer that was saved beside an adapter has the template that was trained on."""
    shutil.copytree(shared / "lora", tmp_path / "lora")
    text = "{{ messages[0].content }}"
    said = text if place.endswith("jinja") else json.dumps({"chat_template": text})
    (tmp_path / "lora" / place).write_text(said)
    path = merge(shared, tmp_path / "m.gguf", tmp_path / "lora")  # type: ignore[arg-type]
    assert GGUFReader(path).fields["tokenizer.chat_template"].contents() == text
    assert verify(path, shared / "base", adapter=tmp_path / "lora", n_threads=1).ok
    assert check(path, shared).failures == ["the chat template is not the checkpoint's"]


def test_an_adapter_of_another_base(shared: Path, tmp_path: Path) -> None:
    path = merge(shared, tmp_path / "m.gguf")
    for options, sentence in (
        ({**SHAPE, "ffn": 256}, "do not fit .*: model.layers.0.mlp.gate_proj.weight"),
        (
            {**SHAPE, "layers": 2},
            r"layers\.2\..* adapts something that is not a matrix of the base",
        ),
    ):
        make_checkpoint(tmp_path / "base", sharing=True, **options)
        with pytest.raises(CheckpointError, match=sentence):
            verify(path, tmp_path / "base", adapter=shared / "lora")


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mobilellm_cpp", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_the_commands(shared: Path, tmp_path: Path) -> None:
    base = ("--base", shared / "base")
    path = tmp_path / "m.gguf"
    done = run("convert", shared / "lora", *base, "--merge", "-o", path, "--verify")
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("verdict    the file matches the checkpoint\n")
    done = run("verify", path, shared / "lora", *base, "--json")
    found = json.loads(done.stdout)
    assert done.returncode == 0 and found["ok"] and found["adapter"] == str(shared / "lora")
    done = run("verify", path, shared / "base")
    assert done.returncode == 1 and "is not the checkpoint's: " in done.stderr
    done = run("verify", path, shared / "base", *base)
    assert done.returncode == 1 and "base is not an adapter, but --base needs one" in done.stderr

    done = run("convert", shared / "lora", *base, "-o", tmp_path / "a.gguf", "--verify")
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("verdict    the file matches the adapter\n")


def test_memory(tmp_path: Path) -> None:
    """Rows are merged a few at a time: no whole matrix is ever held in double precision."""
    sizes = {"layers": 1, "hidden": 1024, "heads": 8, "kv_heads": 8, "ffn": 8192}
    make_checkpoint(tmp_path / "base", vocab=512, dtype="f16", **sizes)
    peft_model(tmp_path / "base").save_pretrained(tmp_path / "lora")
    convert_adapter(tmp_path / "lora", tmp_path / "a.gguf", base=tmp_path / "base")
    worker = """
import sys, tracemalloc
from mobilellm_cpp.convert import open_checkpoint, open_source
from mobilellm_cpp.convert.reference import Reference
from mobilellm_cpp.inspection.merged_weights import MergedWeights
reference = Reference(open_checkpoint(sys.argv[1]))
weights = MergedWeights(reference, open_source(sys.argv[2]))
tracemalloc.start()
weights.matrix("up", 0)
print(tracemalloc.get_traced_memory()[1])
"""
    command = [sys.executable, "-c", worker, tmp_path / "base", tmp_path / "lora"]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=True)
    matrix = 4 * 1024 * 8192
    assert matrix < int(done.stdout) < 1.5 * matrix
