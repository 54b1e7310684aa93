"""LoRA adapters that PEFT itself makes and saves, and its own forward pass: the truth.

model = peft_model(checkpoint, r=4, lora_alpha=8, target_modules=["q_proj"])
model.save_pretrained(folder)
logits(model, tokens, schedule=[0, 0, 1, 1])
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers.masking_utils import create_sliding_window_causal_mask
from transformers.models.llama4 import modeling_llama4

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def transformers_model(checkpoint: Path) -> transformers.PreTrainedModel:
    """The stored blocks of a checkpoint of make_checkpoint, make_r1 or make_pro as transformers'
    own class, each executed once. Pro is a Llama 4 whose chunked layers get a sliding window's mask
    in `logits`: the published class is remote code."""
    fields = json.loads((checkpoint / "config.json").read_text())
    tied = fields.pop("share_embedding", False) or fields["tie_word_embeddings"]
    is_llama4 = "layer_types" in fields
    for name in ("architectures", "model_type", "rope_scaling", "layer_sharing"):
        fields.pop(name, None)
    fields["tie_word_embeddings"] = tied
    if is_llama4:
        kinds = {"sliding_attention": "chunked_attention"}
        fields["layer_types"] = [kinds.get(kind, kind) for kind in fields["layer_types"]]
        config = transformers.Llama4TextConfig(**fields, attn_implementation="eager")
        model = transformers.Llama4ForCausalLM(config)
    else:
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**fields))
    weights = load_file(checkpoint / "model.safetensors")
    missing, extra = model.load_state_dict(weights, strict=False)
    assert missing == (["lm_head.weight"] if tied else []) and not extra
    model.name_or_path = str(checkpoint)
    return model.eval()


def peft_model(checkpoint: Path, seed: int = 0, gain: float = 1.0, **options: Any) -> PeftModel:
    """The model with a random adapter, whose share of a matrix is about a fifth of it."""
    options = {"target_modules": ALL, "r": 4, "lora_alpha": 8, **options}
    model = get_peft_model(transformers_model(checkpoint), LoraConfig(**options))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_A." in name or ".lora_B." in name:
                rank, columns = parameter.shape if ".lora_A." in name else parameter.shape[::-1]
                scale = columns**-0.5 if ".lora_A." in name else 0.2 * gain / rank**0.5
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def logits(model: PeftModel, tokens: list[int], schedule: list[int] | None = None) -> np.ndarray:
    """PEFT's forward pass, with the stored blocks executed in the order of `schedule`."""
    inner = model.base_model.model
    layers, stored = inner.model.layers, inner.config.num_hidden_layers
    if schedule is not None:
        inner.model.layers = torch.nn.ModuleList([layers[block] for block in schedule])
        inner.config.num_hidden_layers = len(schedule)
        if (kinds := getattr(inner.config, "layer_types", None)) is not None:
            inner.config.layer_types = [kinds[block] for block in schedule]
    try:
        with pytest.MonkeyPatch.context() as patch, torch.no_grad():
            if hasattr(inner.config, "sliding_window"):
                sliding = create_sliding_window_causal_mask
                patch.setattr(modeling_llama4, "create_chunked_causal_mask", sliding)
            return model(torch.tensor([tokens]), use_cache=False).logits[0].numpy()
    finally:
        if schedule is not None:
            inner.model.layers, inner.config.num_hidden_layers = layers, stored
            if kinds is not None:
                inner.config.layer_types = kinds
