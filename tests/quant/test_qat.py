"""Scales of quantization-aware training: torchao makes them, its fake quantizer is the truth."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import make_checkpoint, make_pro
from dequantize import read_weights
from mobilellm_cpp.convert import convert_checkpoint
from safetensors.torch import load_file, save_file
from torchao.quantization import PerAxis, PerGroup
from torchao.quantization.qat import IntxFakeQuantizeConfig, IntxFakeQuantizer

from mobilellm_cpp import verify
from mobilellm_cpp.errors import CheckpointError

SCALE = ".weight_fake_quantizer.scale"
NAMES = {
    **{f"self_attn.{part}_proj": f"attn_{part}" for part in "qkv"},
    "self_attn.o_proj": "attn_output",
    **{
        f"{mlp}.{part}_proj": f"ffn_{part}"
        for mlp in ("mlp", "feed_forward")
        for part in ("gate", "up", "down")
    },
}


def train(
    folder: Path, granularity: Any, dtype: torch.dtype, rounded: bool
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Put torchao's scales into a checkpoint; its fake-quantized weights and the scale of each
    weight, by the names of the checkpoint."""
    path = folder / "model.safetensors"
    state = load_file(path)
    made = {}
    for name in [name for name in state if "_proj" in name]:
        config = IntxFakeQuantizeConfig(
            torch.int4, granularity, is_symmetric=True, is_dynamic=False
        )
        quantizer = IntxFakeQuantizer(config)
        weight = state[name].to(dtype)
        quantizer(weight)  # chooses scales
        quantizer.scale = (quantizer.scale * 0.83).to(dtype)  # which training moves
        fake = quantizer(weight)
        scale, groups = quantizer.scale, quantizer.scale.shape[-1]
        made[name] = fake.float(), scale.float().repeat_interleave(weight.shape[1] // groups, 1)
        state[name] = fake if rounded else weight
        stem = name.removesuffix(".weight")
        state[stem + SCALE] = scale.squeeze(-1) if groups == 1 and "q_proj" in name else scale
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
    return made


def gguf_name(name: str) -> str:
    _, _, block, part = name.removesuffix(".weight").split(".", 3)
    return f"blk.{block}.{NAMES[part]}.weight"


@pytest.mark.parametrize("make", [make_pro, make_checkpoint])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("granularity", [PerAxis(0), PerGroup(32), PerGroup(64)])
@pytest.mark.parametrize("rounded", [False, True])
def test_exact_takes_the_scales(
    make: Any, dtype: torch.dtype, granularity: Any, rounded: bool, tmp_path: Path
) -> None:
    folder = make(tmp_path / "m", hidden=128, dtype="f32")
    made = train(folder, granularity, dtype, rounded)
    report = convert_checkpoint(folder, tmp_path / "m.gguf", type="exact")
    n = len(made)
    assert f"{n} matrices are on the checkpoint's own scales (fake quantizer)" in report.notes
    assert report.lattice is not None and report.lattice.off_lattice == ()
    assert report.lattice.n_weights == sum(fake.numel() for fake, _ in made.values())
    assert report.lattice.deviation <= 2**-11
    written = read_weights(tmp_path / "m.gguf")
    for name, (fake, scale) in made.items():
        if make is make_checkpoint and ("q_proj" in name or "k_proj" in name):
            fake, scale = (
                x.unflatten(0, (-1, 2, 16)).transpose(1, 2).flatten(0, 2) for x in (fake, scale)
            )
        kind, values = written[gguf_name(name)]
        assert kind == "q4_0"
        step = scale.half().float().numpy()
        codes = torch.round(fake / scale).numpy()
        assert codes.min() >= -8 and codes.max() <= 7 and len(np.unique(codes)) == 16
        assert np.array_equal(values, codes * step), name


def test_other_types_leave_them_out(tmp_path: Path) -> None:
    folder = make_pro(tmp_path / "m")
    convert_checkpoint(folder, tmp_path / "plain.gguf")
    state = load_file(folder / "model.safetensors")
    for name in [name for name in state if "_proj" in name]:
        state[name.removesuffix(".weight") + SCALE] = torch.full((len(state[name]), 1), 0.01)
    save_file(state, folder / "model.safetensors")
    report = convert_checkpoint(folder, tmp_path / "m.gguf")
    assert (tmp_path / "m.gguf").read_bytes() == (tmp_path / "plain.gguf").read_bytes()
    note = "21 scales of quantization-aware training are left out: type exact takes them"
    assert note in report.notes


@pytest.mark.parametrize(
    "scale",
    [
        torch.full((128, 1), 0.0),
        torch.full((128, 1), -0.05),
        torch.full((128, 1), float("nan")),
        torch.full((128, 1), 1e-9),  # no FP16 number is near
        torch.full((128, 1), 1e-3),  # eight bits
        torch.full((128, 3), 0.05),
        torch.full((128, 8), 0.05),  # groups of 16
        torch.full((127, 1), 0.05),
        torch.full((128, 1), 0.05, dtype=torch.float64),
        torch.zeros(0),
        torch.tensor(0.05),
    ],
)
def test_scales_that_no_block_can_hold(scale: torch.Tensor, tmp_path: Path) -> None:
    """The matrix stays the floats it is, and is named."""
    folder = make_pro(tmp_path / "m", hidden=128, dtype="f32")
    train(folder, PerAxis(0), torch.float32, rounded=False)
    state = load_file(folder / "model.safetensors")
    name = "model.layers.1.self_attn.q_proj"
    state[name + SCALE] = scale
    save_file(state, folder / "model.safetensors")
    report = convert_checkpoint(folder, tmp_path / "m.gguf", type="exact")
    assert report.lattice is not None
    assert report.lattice.off_lattice == ("blk.1.attn_q.weight",)
    assert read_weights(tmp_path / "m.gguf")["blk.1.attn_q.weight"][0] == "f32"
    assert "1 scales of quantization-aware training are left out" in report.notes


def test_a_scale_of_nothing_is_refused(tmp_path: Path) -> None:
    folder = make_pro(tmp_path / "m")
    state = load_file(folder / "model.safetensors")
    save_file(
        {**state, "model.layers.9.q_proj" + SCALE: torch.ones(1)}, folder / "model.safetensors"
    )
    with pytest.raises(CheckpointError, match="q_proj.weight_fake_quantizer.scale is not a tensor"):
        convert_checkpoint(folder, tmp_path / "m.gguf")


@pytest.mark.parametrize("granularity", [PerAxis(0), PerGroup(32)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_verify_knows_the_scales(granularity: Any, dtype: torch.dtype, tmp_path: Path) -> None:
    folder = make_pro(tmp_path / "m", hidden=128, dtype="f32")
    train(folder, granularity, dtype, rounded=False)
    for kind in ("exact", "f16"):
        convert_checkpoint(folder, tmp_path / f"{kind}.gguf", type=kind)
        found = verify(tmp_path / f"{kind}.gguf", folder, n_threads=1)
        assert found.ok, found.failures
    state = load_file(folder / "model.safetensors")
    state["model.layers.1.self_attn.q_proj" + SCALE] *= 1.02
    save_file(state, folder / "model.safetensors")
    (sentence, *_) = verify(tmp_path / "exact.gguf", folder, n_threads=1).failures
    assert sentence.startswith("blk.1.attn_q.weight is not the checkpoint's")
