"""Squared gradients that go back a block at a time: what one pass through the whole model finds."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from mobilellm_cpp.convert import convert_checkpoint

from mobilellm_cpp.quantization import sensitivity
from mobilellm_cpp.quantization.network import Network
from mobilellm_cpp.quantization.source import Source

torch.set_num_threads(1)  # threads that wait for each other starve on a busy machine

DEMO = Path(sys.modules["mobilellm_cpp"].__file__).parent / "demo"
TOKENS = [[1, 5, 99, 5, 300, 42, 7, 8], [1, 200, 33, 33, 6, 512, 17, 4]]


def whole(source: Source) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Sums over rows and columns, from autograd alone; the head has a copy of the embedding."""
    network = Network(source)
    weights = {name: torch.from_numpy(source.values(name)) for name in source.tensors}
    head = weights[network.head_name()].clone().requires_grad_(True)
    matrices = {name: weight for name, weight in weights.items() if weight.dim() == 2}
    for weight in matrices.values():
        weight.requires_grad_(True)
    rows = {name: np.zeros(len(weight)) for name, weight in matrices.items()}
    columns = {name: np.zeros(weight.shape[1]) for name, weight in matrices.items()}
    generator = torch.Generator().manual_seed(1)
    for sequence in TOKENS:
        x = weights["token_embd.weight"][torch.tensor([sequence])]
        for stored in network.schedule:
            own = {n.split(".")[2]: w for n, w in weights.items() if n.startswith(f"blk.{stored}.")}
            x = network.block(x, own, stored)
        logits = (network.norm(x, weights["output_norm.weight"]) @ head.T)[0]
        drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
        torch.nn.functional.cross_entropy(logits, drawn, reduction="sum").backward()
        for name, weight in [*matrices.items(), (network.head_name(), head)]:
            if weight.grad is not None:
                rows[name] += weight.grad.square().sum(1).numpy()
                columns[name] += weight.grad.square().sum(0).numpy()
                weight.grad = None
    return rows, columns


def test_a_block_at_a_time(tmp_path: Path) -> None:
    convert_checkpoint(DEMO, tmp_path / "demo.gguf", type="f32")
    source = Source(tmp_path / "demo.gguf")
    assert len(source.schedule) == 2 * source.blocks  # a shared block's gradients are summed first
    rows, columns, count = sensitivity._fisher(source, TOKENS, None)
    assert count == sum(map(len, TOKENS))
    for found, wanted in zip((rows, columns), whole(source), strict=True):
        assert set(found) == set(wanted)
        for name, sums in wanted.items():
            np.testing.assert_allclose(found[name], sums, rtol=1e-3, atol=1e-5 * sums.max())
