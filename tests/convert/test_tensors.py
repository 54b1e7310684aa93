"""What reaches the file: values, sharing, tying, config variants. Torch and gguf are the judges."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import make_checkpoint
from gguf import GGUFReader, GGUFValueType
from mobilellm_cpp.convert import convert_checkpoint, open_checkpoint
from transformers import LlamaForCausalLM

from mobilellm_cpp.errors import CheckpointError

CONTAINERS = ["safetensors", "sharded", "bin", "sharded-bin"]
CASTS = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


def raw(path: Path) -> dict[str, tuple[int, list[int], bytes]]:
    """Tensor name to type, shape and bytes."""
    tensors = GGUFReader(path).tensors
    return {t.name: (int(t.tensor_type), t.shape.tolist(), t.data.tobytes()) for t in tensors}


def metadata(path: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in GGUFReader(path).fields.items()}


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("dtype", list(CASTS))
def test_values(container: str, dtype: str, tmp_path: Path) -> None:
    """The bytes are torch's casts of what transformers loads; q and k rows interleave."""
    folder = make_checkpoint(
        tmp_path / "m",
        dtype=dtype,
        container=container,
        tied=False,
        architecture="LlamaForCausalLM",
    )
    model = LlamaForCausalLM.from_pretrained(folder, dtype=CASTS[dtype])
    state = {gguf_name(name): tensor for name, tensor in model.state_dict().items()}
    for name, tensor in state.items():
        if name.endswith(("attn_q.weight", "attn_k.weight")):
            halves = tensor.unflatten(0, (-1, 2, 8))  # heads of 16 rows
            state[name] = torch.stack([halves[:, 0], halves[:, 1]], dim=2).flatten(0, 2)

    for kind, cast in CASTS.items():
        convert_checkpoint(folder, tmp_path / "m.gguf", type=kind)
        written = raw(tmp_path / "m.gguf")
        assert set(written) == set(state)
        for name, tensor in state.items():
            expected = tensor.to(torch.float32 if tensor.ndim == 1 else cast).contiguous()
            _, shape, data = written[name]
            assert shape == list(reversed(tensor.shape))
            assert data == expected.view(torch.uint8).numpy().tobytes(), (name, kind)


def gguf_name(name: str) -> str:
    for old, new in (
        ("model.embed_tokens", "token_embd"),
        ("model.norm", "output_norm"),
        ("lm_head", "output"),
        ("model.layers", "blk"),
        ("input_layernorm", "attn_norm"),
        ("self_attn.o_proj", "attn_output"),
        ("self_attn.", "attn_"),
        ("post_attention_layernorm", "ffn_norm"),
        ("mlp.", "ffn_"),
        ("_proj", ""),
    ):
        name = name.replace(old, new)
    return name


@pytest.mark.parametrize(
    ("schedule", "layers"),
    [
        (None, [0, 0, 1, 1, 2, 2]),
        ("immediate", [0, 0, 1, 1, 2, 2]),
        ("repeat-all-over", [0, 1, 2, 0, 1, 2]),
        ("reverse", [0, 1, 2, 2, 1, 0]),
        ("2, 0,1,1", [2, 0, 1, 1]),
        ((2, 1, 0), [2, 1, 0]),
    ],
)
def test_sharing(schedule: Any, layers: list[int], tmp_path: Path) -> None:
    base = make_checkpoint(tmp_path / "base", layers=3)
    shared = make_checkpoint(tmp_path / "shared", layers=3, sharing=schedule is None)
    plain = convert_checkpoint(base, tmp_path / "base.gguf")
    report = convert_checkpoint(shared, tmp_path / "shared.gguf", schedule=schedule)
    assert (plain.architecture, plain.schedule) == ("llama", (0, 1, 2))
    assert (report.architecture, list(report.schedule)) == ("mobilellm", layers)
    assert (report.n_stored, report.n_executed) == (3, len(layers))

    assert raw(plain.path) == raw(report.path)  # every block is stored once
    field = GGUFReader(report.path).fields["mobilellm.block_schedule"]
    assert field.types == [GGUFValueType.ARRAY, GGUFValueType.UINT32]
    assert field.contents() == layers
    theirs, ours = metadata(plain.path), metadata(report.path)
    assert ours["mobilellm.block_count"] == 3
    keys = {key.removeprefix("llama.") for key in theirs if key.startswith("llama.")}
    assert {key for key in ours if key.startswith("mobilellm.")} == {
        f"mobilellm.{key}" for key in (*keys, "block_schedule")
    }
    assert all(theirs[f"llama.{key}"] == ours[f"mobilellm.{key}"] for key in keys)


@pytest.mark.parametrize("schedule", ["0,1,2", [0, 1, 2]])
def test_each_block_once_is_plain_llama(schedule: Any, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "m", layers=3, sharing=True)
    report = convert_checkpoint(folder, tmp_path / "m.gguf", schedule=schedule)
    assert report.architecture == "llama"
    assert not any("schedule" in key for key in metadata(report.path))


@pytest.mark.parametrize("container", ["safetensors", "bin"])
def test_tying_is_decided_by_the_tensors(container: str, tmp_path: Path) -> None:
    def convert(name: str, **options: Any) -> tuple[bool, bool, str]:
        folder = make_checkpoint(tmp_path / name, container=container, **options)
        report = convert_checkpoint(folder, tmp_path / f"{name}.gguf")
        return report.tied, "output.weight" in raw(report.path), " ".join(report.notes)

    assert convert("plain") == (True, False, "")
    tied, written, note = convert("unsaid", share_embedding=False)
    assert (tied, written) == (True, False) and "no lm_head.weight" in note
    assert convert("untied", tied=False) == (False, True, "")
    for field in ("share_embedding", "tie_word_embeddings"):
        tied, written, note = convert("said", tied=False, **{field: True})
        assert (tied, written) == (False, True) and "differs" in note

    embedding = np.random.default_rng(1).standard_normal((512, 64), dtype=np.float32)
    twice = {"model.embed_tokens.weight": embedding, "lm_head.weight": embedding}
    tied, written, note = convert("equal", tied=False, tensors=twice)
    assert (tied, written) == (True, False) and "equals" in note


def test_rotary_buffers_are_left_out(tmp_path: Path) -> None:
    buffers = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": np.ones(8) for i in range(2)}
    folder = make_checkpoint(tmp_path / "m", tensors=buffers)
    plain = make_checkpoint(tmp_path / "plain")
    ours = convert_checkpoint(folder, tmp_path / "m.gguf").path
    assert raw(ours) == raw(convert_checkpoint(plain, tmp_path / "plain.gguf").path)


@pytest.mark.parametrize(
    ("config", "key", "value"),
    [
        ({"rope_theta": ...}, "rope.freq_base", 10000.0),
        ({"rope_theta": 500000}, "rope.freq_base", 500000.0),
        (
            {"rope_theta": ..., "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}},
            "rope.freq_base",
            500000.0,
        ),
        ({"rope_scaling": {"type": "default"}}, "rope.freq_base", 10000.0),
        ({"num_key_value_heads": ..., "kv_heads": 4}, "attention.head_count_kv", 4),
        ({"head_dim": 16}, "attention.key_length", 16),
        ({"hidden_act": ...}, "embedding_length", 64),
    ],
)
def test_config_variants(config: dict[str, Any], key: str, value: Any, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "m", **config)
    convert_checkpoint(folder, tmp_path / "m.gguf")
    assert metadata(tmp_path / "m.gguf")[f"llama.{key}"] == value


def test_saved_by_transformers(tmp_path: Path) -> None:
    """Its newer versions write dtype and rope_parameters."""
    folder = make_checkpoint(
        tmp_path / "old", architecture="LlamaForCausalLM", tied=False, rope_theta=20000.0
    )
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    new = tmp_path / "new"
    model.save_pretrained(new, max_shard_size="100KB")
    assert "rope_parameters" in json.loads((new / "config.json").read_text())
    assert (new / "model.safetensors.index.json").exists()
    shutil.copy(folder / "tokenizer.model", new)
    ours = convert_checkpoint(folder, tmp_path / "old.gguf").path
    theirs = convert_checkpoint(new, tmp_path / "new.gguf").path
    assert raw(ours) == raw(theirs)
    assert metadata(theirs)["llama.rope.freq_base"] == 20000.0


def test_heads_wider_than_the_model(tmp_path: Path) -> None:
    """A head_dim that is not hidden / heads holds where the tensors have it."""
    wide = {}
    for i in range(2):
        block = f"model.layers.{i}.self_attn."
        for part, shape in (("q", (96, 64)), ("k", (48, 64)), ("v", (48, 64)), ("o", (64, 96))):
            wide[f"{block}{part}_proj.weight"] = np.ones(shape, np.float32)
    folder = make_checkpoint(tmp_path / "m", head_dim=24, tensors=wide)
    convert_checkpoint(folder, tmp_path / "m.gguf")
    assert metadata(tmp_path / "m.gguf")["llama.rope.dimension_count"] == 24
    assert raw(tmp_path / "m.gguf")["blk.0.attn_q.weight"][1] == [64, 96]


def test_report_and_progress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_checkpoint(tmp_path / "tiny-model", sharing=True)
    monkeypatch.chdir(tmp_path)
    calls: list[tuple[int, int, str]] = []
    report = convert_checkpoint(str(folder), type="q8_0", progress=lambda *call: calls.append(call))
    assert report.path == Path("tiny-model-q8_0.gguf")
    assert report.size_bytes == report.path.stat().st_size
    tensors = GGUFReader(report.path).tensors
    assert report.n_params == sum(int(t.n_elements) for t in tensors)
    size = sum(int(t.n_bytes) for t in tensors)
    assert report.bits_per_weight == pytest.approx(8 * size / report.n_params)
    assert metadata(report.path)["general.name"] == "Tiny Model"

    done = [call[0] for call in calls]
    assert done == sorted(done) and done[-1] == size
    assert {call[1] for call in calls} == {size}
    assert [*dict.fromkeys(call[2] for call in calls)] == [t.name for t in tensors]


def test_fingerprint(tmp_path: Path) -> None:
    """It follows the content of every file that a conversion reads, and nothing else."""
    folder = make_checkpoint(tmp_path / "a", container="sharded")
    (folder / "added_tokens.json").write_text("{}")
    seen = {open_checkpoint(folder).fingerprint()}
    again = make_checkpoint(tmp_path / "b", container="sharded")
    (again / "added_tokens.json").write_text("{}")
    (again / "README.md").write_text("x")
    assert open_checkpoint(str(again)).fingerprint() in seen
    for path in sorted(folder.iterdir()):
        content = bytearray(path.read_bytes())
        if path.name == "config.json":
            content = bytearray(json.dumps(json.loads(content)).encode())
        elif path.name.endswith(".index.json") or path.suffix == ".json":
            content += b" "
        else:
            content[-1] ^= 1
        path.write_bytes(content)
        key = open_checkpoint(folder).fingerprint()
        assert key not in seen, path.name
        seen.add(key)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match="config.json"):
        open_checkpoint(folder).fingerprint()
