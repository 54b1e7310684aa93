"""R1 and Pro: what their config.json must say, and `settings` where it does not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import make_checkpoint, make_pro, make_r1
from gguf import GGUFReader
from mobilellm_cpp.convert import convert_checkpoint

from mobilellm_cpp.errors import CheckpointError


def refusal(folder: Path, out: Path, **options: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        convert_checkpoint(folder, out, **options)
    assert not out.exists()
    return str(caught.value)


def fields(path: Path) -> dict[str, Any]:
    return {
        name.removeprefix("mobilellm."): field.contents()
        for name, field in GGUFReader(path).fields.items()
        if name.startswith("mobilellm.")
    }


R1_REFUSALS = [
    ({"num_local_experts": 16, "moe_layers": [0]}, "num_local_experts must be 0"),
    ({"num_local_experts": ..., "moe_layers": ...}, "num_local_experts must be 0"),
    (
        {"use_qk_norm": ...},
        "use_qk_norm is missing (mobilellm convert --set use_qk_norm=VALUE supplies it)",
    ),
    ({"use_qk_norm": "yes"}, "use_qk_norm must be true or false"),
    ({"no_rope_layers": ...}, "no_rope_layers is missing"),
    ({"no_rope_layers": [1, 1]}, "no_rope_layers must be a list of 3"),
    ({"no_rope_layers": [1, 2, 1]}, "no_rope_layers must hold 0 and 1 only, not 2"),
    ({"rope_theta": ...}, "rope_theta is missing"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8}}, "rope_scaling must be absent"),
    (
        {"rope_parameters": {"full_attention": {"rope_type": "yarn", "factor": 8}}},
        "rope_parameters must hold rope_theta, rope_type, type, factor, partial_rotary_factor only",
    ),
    ({"rope_parameters": {"rope_theta": 8e6, "high_freq_factor": 4}}, "not 'high_freq_factor'"),
    ({"vocab_size": 1 << 22}, "vocab_size must be a whole number from 1 to 1048576"),
    ({"intermediate_size_mlp": ...}, "intermediate_size_mlp is missing"),
    ({"attn_temperature_tuning": True, "no_rope_layers": [1, 0, 1]}, "attn_temperature_tuning"),
    ({"attn_temperature_tuning": ..., "no_rope_layers": [1, 0, 1]}, "attn_temperature_tuning"),
    ({"layer_types": ["chunked_attention"] * 3}, "layer_types must all be full_attention"),
    ({"layer_types": ["sliding_attention"] * 3}, "layer_types must all be full_attention"),
    ({"layer_types": ...}, "layer_types must all be full_attention"),
    ({"layer_types": ["full_attention"] * 2}, "layer_types must name 3 layers"),
    ({"hidden_act": "gelu"}, "hidden_act must be 'silu'"),
]


@pytest.mark.parametrize("change, part", R1_REFUSALS)
def test_r1_refusals(tmp_path, change, part):
    checkpoint = make_r1(tmp_path / "c", **change)
    assert part in refusal(checkpoint, tmp_path / "m.gguf")


@pytest.mark.parametrize(
    "change",
    [
        {"moe_layers": [], "num_local_experts": 16},
        {"attn_temperature_tuning": True},  # every layer has RoPE: nothing to tune
        {"layer_types": ["chunked_attention"] * 3, "attention_chunk_size": 2048},
        {"rope_theta": ..., "rope_parameters": {"rope_theta": 8e6, "rope_type": "default"}},
    ],
)
def test_r1_settings_that_change_nothing(tmp_path, change):
    convert_checkpoint(make_r1(tmp_path / "a"), tmp_path / "a.gguf")
    convert_checkpoint(make_r1(tmp_path / "b", **change), tmp_path / "b.gguf")
    assert fields(tmp_path / "a.gguf") == fields(tmp_path / "b.gguf")


def test_r1_metadata(tmp_path):
    convert_checkpoint(make_r1(tmp_path / "c", rope=[1, 0, 1]), tmp_path / "m.gguf")
    found = fields(tmp_path / "m.gguf")
    assert found["attention.qk_norm"] is True
    assert found["attention.rope_pattern"] == [1, 0, 1]
    assert found["feed_forward_length"] == 192
    assert found["rope.freq_base"] == 8e6
    assert "attention.sliding_window" not in found and "block_schedule" not in found


def test_an_r1_that_is_a_llama_is_written_as_one(tmp_path):
    checkpoint = make_r1(tmp_path / "c", qk_norm=False)
    assert convert_checkpoint(checkpoint, tmp_path / "m.gguf").architecture == "llama"


@pytest.mark.parametrize("nested", [False, True])
def test_pro_metadata(tmp_path, nested):
    checkpoint = make_pro(tmp_path / "c", sliding=[0, 1, 1], rope=[1, 1, 0], nested=nested)
    convert_checkpoint(checkpoint, tmp_path / "m.gguf")
    found = fields(tmp_path / "m.gguf")
    assert found["attention.sliding_window"] == 16
    assert found["attention.sliding_window_pattern"] == [False, True, True]
    assert found["attention.rope_pattern"] == [1, 1, 0]
    reader = GGUFReader(tmp_path / "m.gguf")
    assert reader.get_field("tokenizer.ggml.pre").contents() == "mobilellm"
    assert reader.get_field("tokenizer.ggml.eos_token_id").contents() == 509


@pytest.mark.parametrize("mlp", ["mlp", "feed_forward"])
def test_pro_by_either_name_of_its_ffn(tmp_path, mlp):
    convert_checkpoint(make_pro(tmp_path / "c", mlp=mlp), tmp_path / "m.gguf")


@pytest.mark.parametrize("field", ["rope_theta", "no_rope_layers", "use_qk_norm"])
def test_pro_says_what_it_computes_or_a_setting_does(tmp_path, field):
    said = {"rope_theta": 5e5, "no_rope_layers": [1, 0, 1], "use_qk_norm": False}
    whole = make_pro(tmp_path / "a", **said)
    checkpoint = make_pro(tmp_path / "b", **said, nested=True)
    path = checkpoint / "config.json"
    config = json.loads(path.read_text())
    value = config["text_config"].pop(field)
    path.write_text(json.dumps(config))
    message = refusal(checkpoint, tmp_path / "m.gguf")
    assert f"{field} is missing (mobilellm convert --set {field}=VALUE supplies it)" in message
    convert_checkpoint(whole, tmp_path / "a.gguf")
    convert_checkpoint(checkpoint, tmp_path / "b.gguf", settings={field: value})
    assert fields(tmp_path / "a.gguf") == fields(tmp_path / "b.gguf")


PRO_REFUSALS = [
    ({"sliding_window": ...}, "sliding_window is missing"),
    ({"layer_types": ...}, "layer_types is missing"),
    ({"layer_types": ["full_attention", "linear_attention", "full_attention"]}, "layer_types must"),
    ({"num_local_experts": 8, "moe_layers": [1]}, "num_local_experts must be 0"),
    ({"attn_temperature_tuning": True, "no_rope_layers": [1, 0, 1]}, "attn_temperature_tuning"),
]


@pytest.mark.parametrize("change, part", PRO_REFUSALS)
def test_pro_refusals(tmp_path, change, part):
    checkpoint = make_pro(tmp_path / "c", **change)
    assert part in refusal(checkpoint, tmp_path / "m.gguf")


def test_a_tensor_of_another_name_is_refused_by_name(tmp_path):
    name = "model.layers.1.self_attn.q_proj.weight_scale"
    checkpoint = make_pro(tmp_path / "c", tensors={name: np.ones(128, np.float32)})
    assert name in refusal(checkpoint, tmp_path / "m.gguf")


def test_a_setting_that_nothing_reads_is_refused(tmp_path):
    checkpoint = make_checkpoint(tmp_path / "c")
    message = refusal(checkpoint, tmp_path / "m.gguf", settings={"rope_thta": 5e5})
    assert "rope_thta is not a field that this model reads" in message


def test_a_setting_overrides_what_the_file_says(tmp_path):
    checkpoint = make_r1(tmp_path / "c")
    convert_checkpoint(checkpoint, tmp_path / "m.gguf", settings={"rope_theta": 1234})
    assert fields(tmp_path / "m.gguf")["rope.freq_base"] == 1234


def test_layer_sharing_of_an_r1(tmp_path):
    report = convert_checkpoint(make_r1(tmp_path / "c", layer_sharing=True), tmp_path / "m.gguf")
    assert report.schedule == (0, 0, 1, 1, 2, 2)


def test_a_config_whose_class_is_named_inside(tmp_path):
    checkpoint = make_pro(tmp_path / "c", nested=True, num_local_experts=None)
    path = checkpoint / "config.json"
    config = json.loads(path.read_text())
    config["text_config"]["architectures"] = config.pop("architectures")
    path.write_text(json.dumps(config))
    convert_checkpoint(checkpoint, tmp_path / "m.gguf")


@pytest.mark.parametrize("name", ["tie_word_embeddings", "share_embedding"])
def test_a_setting_that_decides_nothing_more_is_read(tmp_path, name):
    checkpoint = make_checkpoint(tmp_path / "c")
    convert_checkpoint(checkpoint, tmp_path / "m.gguf", settings={name: True})
