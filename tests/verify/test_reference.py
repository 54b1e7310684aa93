"""The PyTorch reference against transformers, and its memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from checkpoints import executed, make_checkpoint, make_pro, make_r1
from mobilellm_cpp.convert.checkpoint import open_checkpoint
from mobilellm_cpp.convert.reference import Reference
from safetensors.torch import load_file
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.models.llama4 import modeling_llama4 as llama4

from mobilellm_cpp import CheckpointError

TOKENS = np.random.default_rng(0).integers(3, 512, 60).tolist()
BOUND = 1e-5  # of the largest logit


def reference(folder: Path, **arguments: Any) -> np.ndarray:
    return Reference(open_checkpoint(folder), **arguments).logits(TOKENS)


def assert_close(got: np.ndarray, want: np.ndarray) -> None:
    assert got.shape == want.shape and got.dtype == np.float32
    assert np.abs(got - want).max() <= BOUND * np.abs(want).max()


def expected(model: Any, weights: dict[str, torch.Tensor]) -> np.ndarray:
    """transformers' logits; the weights are cast to float32."""
    missing, extra = model.load_state_dict(weights, strict=False)
    assert missing in ([], ["lm_head.weight"]) and not extra
    with torch.no_grad():
        out = model.float().eval()(torch.tensor([TOKENS]), use_cache=False)
    return out.logits[0].numpy()


def llama(folder: Path, layers: int) -> Any:
    fields = json.loads((folder / "config.json").read_text())
    names = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "rms_norm_eps",
    )
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            **{name: fields[name] for name in names},
            num_hidden_layers=layers,
            num_key_value_heads=fields["num_key_value_heads"],
            rope_theta=fields["rope_theta"],
            tie_word_embeddings=fields.get("share_embedding", False),
        )
    )


@pytest.mark.parametrize(
    ("schedule", "config", "order"),
    [
        (None, {}, [0, 1, 2]),
        (None, {"sharing": True}, [0, 0, 1, 1, 2, 2]),
        ("reverse", {}, [0, 1, 2, 2, 1, 0]),
        ("repeat-all-over", {"dtype": "f16"}, [0, 1, 2, 0, 1, 2]),
        ([2, 0, 0, 1], {"dtype": "f32", "rope_theta": 5e5, "rms_norm_eps": 1e-2}, [2, 0, 0, 1]),
        (None, {"tied": False, "container": "sharded", "sharing": True}, [0, 0, 1, 1, 2, 2]),
    ],
)
def test_base_is_llama_of_executed_depth(
    schedule: Any, config: dict[str, Any], order: list[int], tmp_path: Path
) -> None:
    folder = make_checkpoint(tmp_path / "m", layers=3, **config)
    stored: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        stored |= load_file(file)
    want = expected(llama(folder, len(order)), executed(stored, order))
    assert_close(reference(folder, schedule=schedule), want)


def test_logits_of_some_positions(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "m")
    whole = reference(folder)
    some = Reference(open_checkpoint(folder)).logits(TOKENS, [0, 7, 59])
    np.testing.assert_allclose(some, whole[[0, 7, 59]], atol=1e-5)


def llama4_config(folder: Path) -> Any:
    fields = json.loads((folder / "config.json").read_text())
    fields |= fields.pop("text_config", {})
    config = transformers.Llama4TextConfig(
        **{k: v for k, v in fields.items() if k not in ("architectures", "model_type")}
    )
    config._attn_implementation = "eager"
    return config


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"no_rope_layers": [1, 0, 1, 0]},
        {"no_rope_layers": None},  # every fourth layer goes without
        {"use_qk_norm": False},
        {"use_qk_norm": ..., "layer_types": ..., "attention_chunk_size": 8192},
        {"tie_word_embeddings": False, "tied": False, "rms_norm_eps": 1e-2, "dtype": "f32"},
    ],
)
def test_r1_is_llama4(config: dict[str, Any], tmp_path: Path) -> None:
    folder = make_r1(tmp_path / "m", layers=4, **config)
    model = transformers.Llama4ForCausalLM(llama4_config(folder))
    if config.get("tied", True):
        model.tie_weights()
    want = expected(model, load_file(folder / "model.safetensors"))
    assert_close(reference(folder), want)


PRO = {
    "layer_types": ["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
    "sliding_window": 13,
}


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"nested": True, "no_rope_layers": [1, 1, 0, 1]},
        {"sliding_window": 1, "use_qk_norm": False},
        {"sliding_window": 59, "layer_types": ["sliding_attention"] * 3 + ["full_attention"]},
        {"sliding_window": 1000},
    ],
)
def test_pro_is_made_of_llama4s_blocks(config: dict[str, Any], tmp_path: Path) -> None:
    """Llama 4's layers under transformers' own masks, window by window."""
    folder = make_pro(tmp_path / "m", layers=4, **(PRO | config))
    fields = json.loads((folder / "config.json").read_text())
    fields |= fields.get("text_config", {})
    model = transformers.Llama4ForCausalLM(
        transformers.Llama4TextConfig.from_dict(llama4_config(folder).to_dict())
    ).float()
    model.config._attn_implementation = "eager"
    model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    model.tie_weights()
    inner, model_config = model.model.eval(), model.config
    model_config.sliding_window = fields["sliding_window"]
    with torch.no_grad():
        x = inner.embed_tokens(torch.tensor([TOKENS]))
        positions = torch.arange(len(TOKENS))[None]
        turns = inner.rotary_emb(x, positions)
        masks = {
            name: make(model_config, x, None, None, position_ids=positions)
            for name, make in (
                ("full_attention", create_causal_mask),
                ("sliding_attention", create_sliding_window_causal_mask),
            )
        }
        for layer, kind in zip(inner.layers, fields["layer_types"], strict=True):
            assert isinstance(layer, llama4.Llama4TextDecoderLayer)
            x = layer(x, attention_mask=masks[kind], position_embeddings=turns)
        want = model.lm_head(inner.norm(x))[0].numpy()
    assert_close(reference(folder), want)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"rope_theta": ...}, "rope_theta"),
        ({"no_rope_layers": ...}, "no_rope_layers"),
        ({"use_qk_norm": ...}, "use_qk_norm"),
        ({"layer_types": ...}, "layer_types"),
        ({"layer_types": ["chunked_attention"] * 4}, "layer_types"),
        ({"sliding_window": ...}, "sliding_window"),
        ({"no_rope_layers": [1, 1, 0]}, "no_rope_layers"),
        ({"no_rope_layers": [1, 1, 0, 1], "attn_temperature_tuning": True}, "temperature"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8}}, "rope_scaling"),
        ({"hidden_act": "gelu"}, "hidden_act"),
    ],
)
def test_pro_that_leaves_something_unsaid_is_refused(
    config: dict[str, Any], named: str, tmp_path: Path
) -> None:
    folder = make_pro(tmp_path / "m", layers=4, **(PRO | config))
    with pytest.raises(CheckpointError, match=named):
        Reference(open_checkpoint(folder))


def test_unknown_tensors_are_refused(tmp_path: Path) -> None:
    bias = {"model.layers.0.self_attn.q_proj.bias": np.zeros(64, np.float32)}
    with pytest.raises(CheckpointError, match="q_proj.bias"):
        Reference(open_checkpoint(make_checkpoint(tmp_path / "m", tensors=bias)))
    gone = {"model.layers.0.mlp.up_proj.weight": None}
    with pytest.raises(CheckpointError, match="up_proj.weight is missing"):
        Reference(open_checkpoint(make_checkpoint(tmp_path / "n", tensors=gone)))
