"""What rounding each matrix to each type costs, in nats of KL divergence a token.

For a small change D of the weights the divergence of the model's predictions is half of D'FD, F
being the Fisher information: the second moments of the gradient of the log-likelihood of tokens
drawn from the model itself. It is taken on the diagonal, and there as rows times columns (as
Adafactor does), so that it takes no memory to speak of. Gradients of a shared block come from all
its executions. Without torch a table of factors stands in.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ..errors import ModelError
from ..quant.budget import candidates
from ..quant.mixes import is_matrix
from ..quant.rounding import Rounder, dequantize
from ..quant.types import (
    IQ4_NL,
    Q2_0,
    Q3_K,
    Q4_0,
    Q4_1,
    Q4_K,
    Q5_0,
    Q5_1,
    Q5_K,
    Q6_K,
    Q8_0,
    TensorType,
)
from .source import Source

if TYPE_CHECKING:
    import torch

Floats = npt.NDArray[np.float32]
Costs = dict[str, dict[TensorType, float]]
Progress = Callable[[int, int, str], None]

SEQUENCES, TOKENS = 16, 128
NEEDS_TORCH = "calibration needs torch: pip install 'mobilellm-cpp[torch]', or use --no-calibration"

# Without measurements: how much more an error of the same share costs in a weight of these than in
# one of ffn_gate (measured on SmolLM2-135M: docs/measurements.md), and each type's share of error
# in numbers with a normal distribution.
FACTORS = {
    "attn_v": 24.0,
    "attn_k": 4.0,
    "ffn_down": 4.0,
    "token_embd": 3.0,
    "output": 3.0,
    "attn_q": 2.0,
    "attn_output": 2.0,
    "ffn_up": 2.0,
}
ERRORS = {
    Q2_0: 0.516,
    Q3_K: 0.0228,
    Q4_0: 0.0074,
    IQ4_NL: 0.0058,
    Q4_K: 0.0051,
    Q4_1: 0.0061,
    Q5_0: 0.0018,
    Q5_K: 0.0013,
    Q5_1: 0.0014,
    Q6_K: 0.00031,
    Q8_0: 0.00003,
}


def guessed(source: Source) -> Costs:
    """Costs in arbitrary units: each type's share of error, times the weights, times FACTORS."""
    return {
        name: {
            kind: FACTORS.get(name.split(".")[-2], 1.0) * info.n_elements * ERRORS[kind]
            for kind in candidates(info.shape[-1])
        }
        for name, info in source.tensors.items()
        if is_matrix(name, info.shape)
    }


def measured(source: Source, tokens: list[list[int]], progress: Progress | None = None) -> Costs:
    """Costs in nats, measured on the tokens [sequences, tokens]."""
    rows, columns, count = _fisher(source, tokens, progress)
    costs: Costs = {}
    for name, row in rows.items():
        values = source.values(name)
        column = columns[name]
        scale = 0.5 / count / max(float(row.sum()), 1e-30)
        costs[name] = {
            kind: scale * float(row @ (error @ column)) for kind, error in _errors(values, column)
        }
    return costs


def _errors(values: Floats, importance: Floats) -> list[tuple[TensorType, Floats]]:
    """The squared errors of a matrix in each type that it can have."""
    found = []
    importance = importance / max(float(importance.mean()), 1e-30) + np.float32(1e-3)
    for kind in candidates(values.shape[-1]):
        bits = values.view(np.uint32)
        data = np.array(Rounder().round(bits, "F32", kind, importance))
        back = dequantize(data.reshape(-1).view(np.uint8), kind.id, values.shape[-1])
        found.append((kind, np.square(values - back)))
    return found


def _fisher(
    source: Source, tokens: list[list[int]], progress: Progress | None
) -> tuple[dict[str, Floats], dict[str, Floats], int]:
    """Sums over rows' and columns' squared gradients of each matrix, and the tokens they are of."""
    try:
        import torch
    except ImportError:
        raise ModelError(NEEDS_TORCH) from None
    from .network import Network

    network = Network(source)
    weights = {name: torch.from_numpy(source.values(name)) for name in source.tensors}
    rows: dict[str, Floats] = {}
    columns: dict[str, Floats] = {}

    def collect(name: str) -> Callable[[torch.Tensor], None]:
        def hook(weight: torch.Tensor) -> None:
            assert weight.grad is not None
            square = weight.grad.square_()
            rows[name] = rows.get(name, np.float32(0)) + square.sum(1).numpy()
            columns[name] = columns.get(name, np.float32(0)) + square.sum(0).numpy()
            weight.grad = None

        return hook

    for name, weight in weights.items():
        if is_matrix(name, tuple(weight.shape)):
            weight.requires_grad_(True)
            weight.register_post_accumulate_grad_hook(collect(name))  # type: ignore[no-untyped-call]
    generator = torch.Generator().manual_seed(1)
    count = 0
    for done, sequence in enumerate(tokens, 1):
        x = weights["token_embd.weight"][torch.tensor([sequence])]
        for stored in network.schedule:
            prefix = f"blk.{stored}."
            own = {
                name.removeprefix(prefix).removesuffix(".weight"): weight
                for name, weight in weights.items()
                if name.startswith(prefix)
            }
            x = network.block(x, own, stored)
        x = network.norm(x, weights["output_norm.weight"])
        logits = (x @ weights[network.head_name()].T)[0]
        drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
        loss = torch.nn.functional.cross_entropy(logits, drawn, reduction="sum")
        loss.backward()  # type: ignore[no-untyped-call]
        count += len(sequence)
        if progress is not None:
            progress(done, len(tokens), "sensitivity")
    return rows, columns, count
