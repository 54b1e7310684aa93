"""What cannot be converted is refused in one sentence that names file and field or tensor.

The fixture `untouched` checks that an existing output stays and that nothing else is left.
"""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from checkpoints import make_checkpoint, sentences, tokenizer_model
from mobilellm_cpp.convert import convert_checkpoint

from mobilellm_cpp.errors import CheckpointError

UP = "model.layers.1.mlp.up_proj.weight"


def refusal(folder: Path | str, out: Path, **options: Any) -> str:
    """The message of the refusal; it is one sentence."""
    with pytest.raises(CheckpointError) as caught:
        convert_checkpoint(folder, out, **options)
    message = str(caught.value)
    assert "\n" not in message and message.endswith("."), message
    return message


# config.json

BAD_FIELDS = [
    *(
        (name, ...)
        for name in (
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "vocab_size",
            "rms_norm_eps",
            "max_position_embeddings",
        )
    ),
    ("hidden_size", "64"),
    ("hidden_size", 64.0),
    ("hidden_size", True),
    ("hidden_size", 0),
    ("hidden_size", 10**9),
    ("intermediate_size", -128),
    ("intermediate_size", None),
    ("num_hidden_layers", 0),
    ("num_hidden_layers", 513),
    ("num_attention_heads", 3),
    ("num_attention_heads", 0),
    ("num_key_value_heads", 3),
    ("num_key_value_heads", []),
    ("vocab_size", 1 << 40),
    ("max_position_embeddings", -1),
    ("rms_norm_eps", 0),
    ("rms_norm_eps", -1e-5),
    ("rms_norm_eps", float("nan")),
    ("rms_norm_eps", float("inf")),
    ("rms_norm_eps", "1e-5"),
    ("rope_theta", 0),
    ("rope_theta", float("nan")),
    ("rope_theta", False),
    ("rope_theta", 10**400),
    ("rope_scaling", {"type": "linear", "factor": 2.0}),
    ("rope_scaling", "linear"),
    ("rope_parameters", {"rope_type": "llama3", "rope_theta": 10000.0}),
    ("rope_parameters", {"rope_type": "default", "rope_theta": 20000.0}),
    ("rope_parameters", {"rope_type": "default", "rope_theta": "x"}),
    ("head_dim", 15),
    ("head_dim", 0),
    ("hidden_act", "gelu"),
    ("attention_bias", True),
    ("mlp_bias", True),
    ("quantization_config", {"quant_method": "gptq"}),
    ("sliding_window", 512),
    ("layer_sharing", 1),
    ("share_embedding", "yes"),
    ("architectures", ...),
    ("architectures", "MobileLLMForCausalLM"),
    ("architectures", []),
    ("architectures", ["GPT2LMHeadModel"]),
    ("architectures", [["MobileLLMForCausalLM"]]),
]


@pytest.mark.parametrize(("field", "value"), BAD_FIELDS)
def test_bad_field(field: str, value: Any, tmp_path: Path, untouched: Path) -> None:
    folder = make_checkpoint(tmp_path / "m")
    change_config(folder, field, value)
    message = refusal(folder, untouched)
    assert str(folder / "config.json") in message
    assert field in message


def change_config(folder: Path, field: str, value: Any) -> None:
    path = folder / "config.json"
    fields = json.loads(path.read_text())
    fields[field] = value
    path.write_text(json.dumps({k: v for k, v in fields.items() if v is not ...}))


def test_unknown_class_lists_the_known_ones(tmp_path: Path, untouched: Path) -> None:
    folder = make_checkpoint(tmp_path / "m", architecture="GPT2LMHeadModel")
    message = refusal(folder, untouched)
    assert "GPT2LMHeadModel" in message
    assert "MobileLLMForCausalLM, LlamaForCausalLM" in message


def test_odd_head_dim(tmp_path: Path, untouched: Path) -> None:
    folder = make_checkpoint(tmp_path / "m", hidden=60, heads=4, kv_heads=4)
    assert "head_dim must be even" in refusal(folder, untouched)


def test_too_many_shared_layers(tmp_path: Path, untouched: Path) -> None:
    folder = make_checkpoint(tmp_path / "m", sharing=True, num_hidden_layers=257)
    message = refusal(folder, untouched)
    assert "config.json: num_hidden_layers must be at most 256 with layer_sharing" in message


@pytest.mark.parametrize("text", [None, "", "{", "[1]", "null", '"a"', "\xff\xfe", "[" * 100000])
def test_broken_config(text: str | None, tmp_path: Path, untouched: Path) -> None:
    folder = make_checkpoint(tmp_path / "m")
    path = folder / "config.json"
    if text is None:
        path.unlink()
    else:
        path.write_bytes(text.encode("latin-1"))
    assert str(path) in refusal(folder, untouched)


def test_no_folder(tmp_path: Path, untouched: Path) -> None:
    assert "nowhere" in refusal(tmp_path / "nowhere", untouched)
    assert "nowhere/at/all" in refusal("nowhere/at/all", untouched)


def test_unknown_type(tmp_path: Path, untouched: Path) -> None:
    folder = make_checkpoint(tmp_path / "m")
    assert "q5_0" in refusal(folder, untouched, type="q5_0")


# tensors


@pytest.mark.parametrize("container", ["safetensors", "sharded", "bin", "sharded-bin"])
def test_missing_and_extra_tensors(container: str, tmp_path: Path, untouched: Path) -> None:
    folder = make_checkpoint(tmp_path / "missing", container=container, tensors={UP: None})
    message = refusal(folder, untouched)
    assert UP in message and str(folder) in message and "missing" in message

    extra = {"model.layers.1.self_attn.q_proj.bias": np.zeros(64, np.float32)}
    folder = make_checkpoint(tmp_path / "extra", container=container, tensors=extra)
    message = refusal(folder, untouched)
    assert "model.layers.1.self_attn.q_proj.bias" in message and str(folder) in message


def test_more_layers_than_the_config_says(tmp_path: Path, untouched: Path) -> None:
    folder = make_checkpoint(tmp_path / "m", layers=3, num_hidden_layers=2)
    assert "model.layers.2." in refusal(folder, untouched)


@pytest.mark.parametrize("shape", [(128, 32), (64, 128), (128 * 64,), (128, 64, 1)])
def test_misshapen_tensor(shape: tuple[int, ...], tmp_path: Path, untouched: Path) -> None:
    folder = make_checkpoint(tmp_path / "m", tensors={UP: np.zeros(shape, np.float32)})
    message = refusal(folder, untouched)
    assert UP in message and str(list(shape)) in message and "[128, 64]" in message


@pytest.mark.parametrize("shape", [(512, 0), (0, 64), (0, 0)])
def test_empty_tensors(shape: tuple[int, ...], tmp_path: Path, untouched: Path) -> None:
    empty = np.zeros(shape, np.float32)
    tensors = {"model.embed_tokens.weight": empty, "lm_head.weight": empty}
    folder = make_checkpoint(tmp_path / "m", tied=False, tensors=tensors)
    assert "model.embed_tokens.weight" in refusal(folder, untouched)


@pytest.mark.parametrize("dtype", [np.float64, np.int8])
@pytest.mark.parametrize("container", ["safetensors", "bin"])
def test_other_dtypes(dtype: Any, container: str, tmp_path: Path, untouched: Path) -> None:
    tensors = {UP: np.ones((128, 64), dtype)}
    folder = make_checkpoint(tmp_path / "m", container=container, tensors=tensors)
    message = refusal(folder, untouched)
    assert UP in message and "F32, F16 or BF16" in message


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("kind", ["f32", "f16", "q4_0"])
def test_not_finite(value: float, dtype: str, kind: str, tmp_path: Path, untouched: Path) -> None:
    name = "model.layers.1.self_attn.q_proj.weight"
    array = np.zeros((64, 64), np.float32)
    array[37, 5] = value
    folder = make_checkpoint(tmp_path / "m", dtype=dtype, tensors={name: array})
    message = refusal(folder, untouched, type=kind)
    assert str(folder / "model.safetensors") in message and name in message
    assert f"{value} at [37, 5]" in message


def test_not_finite_in_a_vector(tmp_path: Path, untouched: Path) -> None:
    array = np.ones(64, np.float32)
    array[11] = np.nan
    folder = make_checkpoint(tmp_path / "m", tensors={"model.norm.weight": array})
    assert "model.norm.weight holds nan at [11]" in refusal(folder, untouched)


@pytest.mark.parametrize(
    ("kind", "fits", "overflows"),
    [("f16", 65504, 70000), ("q8_0", 65504 * 127, 9e6), ("q4_0", 65504 * 8, 6e5)],
)
def test_too_large(
    kind: str, fits: float, overflows: float, tmp_path: Path, untouched: Path
) -> None:
    array = np.zeros((128, 64), np.float32)
    array[100, 3] = -overflows
    folder = make_checkpoint(tmp_path / "m", dtype="f32", tensors={UP: array})
    message = refusal(folder, untouched, type=kind)
    assert UP in message and "[100, 3]" in message and "bf16" in message
    convert_checkpoint(folder, tmp_path / "bf16.gguf", type="bf16")

    array[100, 3] = fits
    folder = make_checkpoint(tmp_path / "m", dtype="f32", tensors={UP: array})
    convert_checkpoint(folder, tmp_path / "fits.gguf", type=kind)


# safetensors


def test_truncated(tmp_path: Path, untouched: Path) -> None:
    path = make_checkpoint(tmp_path / "m") / "model.safetensors"
    whole = path.read_bytes()
    for size in (0, 7, 8, 500, len(whole) - 1):
        path.write_bytes(whole[:size])
        message = refusal(path.parent, untouched)
        said = str(size) if size else "empty"
        assert str(path) in message and "truncated" in message and said in message
    path.write_bytes(whole + b"\0")
    message = refusal(path.parent, untouched)
    assert str(len(whole)) in message and str(len(whole) + 1) in message


def entry(shape: list[Any], start: Any, end: Any, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


@pytest.mark.parametrize(
    ("header", "needle"),
    [
        (b"", "header"),
        (b"not json", "header"),
        (b"[]", "header"),
        (b"[" * 100000, "header"),
        (b'{"a": {}, "a": {}}', "twice"),
        ({"a": 1}, "a"),
        ({"a": {}}, "a"),
        ({"a": entry([2], 0, 8, "F4")}, "a"),
        ({"a": entry([2], 0, 8, ["F32"])}, "a"),
        ({"a": entry([2], 0, 4)}, "needs 8"),
        ({"a": entry([-2, -1], 0, 8)}, "shape"),
        ({"a": entry([True, 2], 0, 8)}, "shape"),
        ({"a": entry([2.0], 0, 8)}, "shape"),
        ({"a": entry([1 << 62, 1 << 62], 0, 8)}, "needs"),
        ({"a": entry([1] * 70, 0, 4)}, "shape"),
        ({"a": entry([2], 8, 0)}, "a"),
        ({"a": entry([2], -8, 0)}, "data_offsets"),
        ({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, "b"),
        ({"a": entry([2], 0, 8), "b": entry([2], 12, 20)}, "b"),
        ({"a": entry([2], 4, 12)}, "a"),
        ({"a": entry([1 << 40], 0, 4 << 40)}, "truncated"),
    ],
)
def test_hostile_header(header: Any, needle: str, tmp_path: Path, untouched: Path) -> None:
    path = make_checkpoint(tmp_path / "m") / "model.safetensors"
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(16))
    message = refusal(path.parent, untouched)
    assert str(path) in message and needle in message


def test_huge_header_length(tmp_path: Path, untouched: Path) -> None:
    path = make_checkpoint(tmp_path / "m") / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 1 << 60) + bytes(100))
    assert str(path) in refusal(path.parent, untouched)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.model"])
def test_a_pipe_where_a_file_is_due(name: str, tmp_path: Path, untouched: Path) -> None:
    """Opening one would wait for ever."""
    folder = make_checkpoint(tmp_path / "m")
    (folder / name).unlink()
    os.mkfifo(folder / name)
    assert f"{folder / name} is not an ordinary file" in refusal(folder, untouched)


def test_odd_chat_templates_are_left_out(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "m")
    templates = [{"name": ["x"], "template": "y"}, "z", {"name": "default"}]
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": templates}))
    convert_checkpoint(folder, tmp_path / "m.gguf")


# shard indexes


@pytest.mark.parametrize("container", ["sharded", "sharded-bin"])
@pytest.mark.parametrize(
    "target",
    [
        "../x.safetensors",
        "/etc/passwd",
        "sub/x.safetensors",
        "..",
        "",
        7,
        None,
        "a\\b",
        "config.json",
    ],
)
def test_index_points_elsewhere(
    container: str, target: Any, tmp_path: Path, untouched: Path
) -> None:
    folder = make_checkpoint(tmp_path / "m", container=container)
    path = change_index(folder, UP, target)
    message = refusal(folder, untouched)
    assert str(path) in message and UP in message


def change_index(folder: Path, tensor: str, file: Any) -> Path:
    path = next(folder.glob("*.index.json"))
    index = json.loads(path.read_text())
    index["weight_map"][tensor] = file
    path.write_text(json.dumps(index))
    return path


@pytest.mark.parametrize("weight_map", [None, {}, [], "x"])
def test_broken_index(weight_map: Any, tmp_path: Path, untouched: Path) -> None:
    folder = make_checkpoint(tmp_path / "m", container="sharded")
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": weight_map}))
    message = refusal(folder, untouched)
    assert str(path) in message and "weight_map" in message


def test_missing_shard(tmp_path: Path, untouched: Path) -> None:
    folder = make_checkpoint(tmp_path / "m", container="sharded")
    shard = folder / "model-00002-of-00003.safetensors"
    shard.unlink()
    assert f"{shard} is missing" in refusal(folder, untouched)


def test_tensor_in_another_shard(tmp_path: Path, untouched: Path) -> None:
    folder = make_checkpoint(tmp_path / "m", container="sharded")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    others = {f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)}
    wrong = min(others - {index["weight_map"][UP]})
    change_index(folder, UP, wrong)
    message = refusal(folder, untouched)
    assert UP in message and "index" in message


def test_links(tmp_path: Path, untouched: Path) -> None:
    """A shard that is a link out of the folder is refused; the hub cache's own links are not."""
    folder = make_checkpoint(tmp_path / "m", container="sharded")
    shard = folder / "model-00001-of-00003.safetensors"
    elsewhere = tmp_path / "elsewhere.safetensors"
    shard.rename(elsewhere)
    shard.symlink_to(elsewhere)
    message = refusal(folder, untouched)
    assert shard.name in message and "link" in message

    cache = tmp_path / "models--org--name"
    (cache / "snapshots").mkdir(parents=True)
    (cache / "blobs").mkdir()
    shard.unlink()
    elsewhere.rename(shard)
    snapshot = cache / "snapshots" / "0123abcd"
    folder.rename(snapshot)
    for i, path in enumerate(sorted(snapshot.iterdir())):
        path.rename(cache / "blobs" / str(i))
        path.symlink_to(Path("../../blobs") / str(i))
    convert_checkpoint(snapshot, tmp_path / "cached.gguf")


def test_no_weights(tmp_path: Path, untouched: Path) -> None:
    folder = make_checkpoint(tmp_path / "m")
    (folder / "model.safetensors").unlink()
    assert f"{folder} has no weights" in refusal(folder, untouched)


# the tokenizer


def test_no_tokenizer(tmp_path: Path, untouched: Path) -> None:
    folder = make_checkpoint(tmp_path / "m")
    (folder / "tokenizer.model").unlink()
    assert "tokenizer.model and tokenizer.json are missing" in refusal(folder, untouched)
    (folder / "tokenizer.json").write_text("{}")
    assert f"{folder / 'tokenizer.json'}: model is not BPE" in refusal(folder, untouched)


def test_more_pieces_than_embeddings(tmp_path: Path, untouched: Path) -> None:
    folder = make_checkpoint(tmp_path / "m", vocab=500)
    (folder / "tokenizer.model").write_bytes(tokenizer_model(512))
    message = refusal(folder, untouched)
    assert str(folder / "config.json") in message and "vocab_size" in message and "512" in message


@pytest.mark.parametrize("damage", ["empty", "garbage", "truncated", "no UTF-8"])
def test_damaged_tokenizer(damage: str, tmp_path: Path, untouched: Path) -> None:
    folder = make_checkpoint(tmp_path / "m")
    path = folder / "tokenizer.model"
    whole = tokenizer_model(512)
    contents = {
        "empty": b"",
        "garbage": b"\x0a\xff\xff\xff",
        "truncated": whole[:-5],
        "no UTF-8": whole.replace("\u2581".encode(), b"\xe2\x96\xff"),
    }
    path.write_bytes(contents[damage])
    assert str(path) in refusal(folder, untouched)


def test_unigram_model(tmp_path: Path, untouched: Path) -> None:
    """llama.cpp would merge its pieces as those of a BPE model."""
    folder = make_checkpoint(tmp_path / "m")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences()),
        model_prefix=str(folder / "tokenizer"),
        model_type="unigram",
        vocab_size=300,
        minloglevel=2,
    )
    message = refusal(folder, untouched)
    assert str(folder / "tokenizer.model") in message and "BPE" in message


@pytest.mark.parametrize(
    ("file", "content", "needle"),
    [
        ("tokenizer_config.json", "[]", "tokenizer_config.json"),
        ("tokenizer_config.json", '{"added_tokens_decoder": []}', "added_tokens_decoder"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {}}}', "'x'"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"5": {"content": "<s>"}}}', "<s>"),
        ("added_tokens.json", '{"<a>": -1}', "<a>"),
        ("added_tokens.json", '{"<a>": "3"}', "<a>"),
        ("chat_template.jinja", "\xff", "chat_template.jinja"),
    ],
)
def test_broken_tokenizer_files(
    file: str, content: str, needle: str, tmp_path: Path, untouched: Path
) -> None:
    folder = make_checkpoint(tmp_path / "m")
    (folder / file).write_bytes(content.encode("latin-1"))
    message = refusal(folder, untouched)
    assert str(folder) in message and needle in message


# the schedule


@pytest.mark.parametrize(
    ("schedule", "needle"),
    [
        ("twice", "'twice'"),
        ("", "empty"),
        ([], "empty"),
        ("0,1,2", "block 2"),
        ([0, 1, -1], "block -1"),
        ("0,,1", "must be"),
        ([0, 1.0], "block 1.0"),
        ([0, True], "block True"),
        ([0, 0], "never executes block 1"),
        ([0, 1] * 257, "514 layers"),
    ],
)
def test_bad_schedule(schedule: Any, needle: str, tmp_path: Path, untouched: Path) -> None:
    folder = make_checkpoint(tmp_path / "m")
    message = refusal(folder, untouched, schedule=schedule)
    assert "schedule" in message and needle in message
