"""The parameters of the published files: headers of full shape, whose data are holes in a file."""

from __future__ import annotations

import json
import math
import os
import struct
from pathlib import Path
from typing import Any

import pytest
from checkpoints import PUBLISHED, tensor_shapes
from mobilellm_cpp.convert import open_checkpoint
from mobilellm_cpp.convert.families import build_model

R1 = {"architectures": ["Llama4ForCausalLM"], "num_local_experts": 0, "use_qk_norm": True}
R1 |= {"attn_temperature_tuning": False, "rope_theta": 8e6}
PRO = R1 | {"architectures": ["MobileLLMP1ForCausalLM"], "sliding_window": 512}
SHARED = {"layer_sharing": True}
SHAPES: dict[str, dict[str, int]] = PUBLISHED | {
    "R1.5-140M": dict(layers=15, hidden=576, heads=9, kv_heads=3, ffn=2048, vocab=128256),
    "R1.5-360M": dict(layers=15, hidden=1024, heads=16, kv_heads=4, ffn=4096, vocab=128256),
    "R1.5-950M": dict(layers=22, hidden=1536, heads=24, kv_heads=6, ffn=6144, vocab=128256),
    "Pro": dict(layers=30, hidden=1280, heads=20, kv_heads=4, ffn=6144, vocab=202048),
}
PARAMETERS: list[tuple[str, dict[str, Any], int]] = [
    ("125M", {}, 124_635_456),
    ("125M", SHARED, 124_635_456),
    ("350M", {}, 345_355_200),
    ("350M", SHARED, 345_355_200),
    ("600M", {}, 603_188_352),
    ("1B", {}, 1_005_461_760),
    ("1.5B", {"architectures": ["LlamaForCausalLM"], "share_embedding": False}, 1_562_388_800),
    ("R1.5-140M", R1, 140_248_512),
    ("R1.5-360M", R1, 359_431_168),
    ("R1.5-950M", R1, 949_685_760),
    ("Pro", PRO, 1_084_453_120),
]


@pytest.mark.parametrize(("name", "further", "parameters"), PARAMETERS)
def test_parameters(name: str, further: dict[str, Any], parameters: int, tmp_path: Path) -> None:
    shape = SHAPES[name]
    layers, head_dim = shape["layers"], shape["hidden"] // shape["heads"]
    fields = {
        "architectures": ["MobileLLMForCausalLM"],
        "hidden_size": shape["hidden"],
        "intermediate_size": shape["ffn"],
        "intermediate_size_mlp": shape["ffn"],
        "max_position_embeddings": 2048,
        "no_rope_layers": [1] * layers,
        "num_attention_heads": shape["heads"],
        "num_hidden_layers": layers,
        "num_key_value_heads": shape["kv_heads"],
        "rms_norm_eps": 1e-5,
        "share_embedding": True,
        "vocab_size": shape["vocab"],
        **further,
    }
    slides = [further.get("sliding_window", 0) and i % 4 and i < 29 for i in range(layers)]
    fields["layer_types"] = ["sliding_attention" if s else "full_attention" for s in slides]
    (tmp_path / "config.json").write_text(json.dumps(fields))
    rows = [shape[heads] * head_dim for heads in ("heads", "kv_heads")]
    tied, mlp = fields["share_embedding"], "feed_forward" if "use_qk_norm" in fields else "mlp"
    sizes = shape["hidden"], *rows, shape["ffn"], shape["vocab"]
    write_header(tmp_path / "model.safetensors", tensor_shapes(layers, *sizes, tied, mlp))
    checkpoint = open_checkpoint(tmp_path)
    model = build_model(checkpoint.config, checkpoint.tensors, None)
    assert sum(weight.tensor.bits.size for weight in model.weights) == parameters
    assert model.tied == tied
    assert len(model.schedule) == layers * (2 if further == SHARED else 1)


def write_header(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """A safetensors file of BF16 whose data are a hole, but for the very first weight: by that an
    embedding differs from a head."""
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text + b"\x80\x3f")
    os.truncate(path, 8 + len(text) + end)
