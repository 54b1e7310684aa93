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
from ..quant.types import TensorType
from .source import Source

if TYPE_CHECKING:
    import torch

Floats = npt.NDArray[np.float32]
Costs = dict[str, dict[TensorType, float]]
Progress = Callable[[int, int, str], None]

SEQUENCES, TOKENS = 16, 128
NEEDS_TORCH = "calibration needs torch: pip install 'mobilellm-cpp[torch]', or use --no-calibration"

# Without measurements: how much worse an error of the same share is in these than in the others.
FACTORS = {"attn_v": 4.0, "attn_output": 2.0, "ffn_down": 2.0, "token_embd": 2.0, "output": 2.0}


def guessed(source: Source) -> Costs:
    """Costs in arbitrary units: each type's share of error, times the weights, times FACTORS."""
    costs: Costs = {}
    for name, info in source.tensors.items():
        if is_matrix(name, info.shape):
            values = source.values(name)
            factor = FACTORS.get(name.removesuffix(".weight").split(".")[-1], 1.0)
            power = float(np.square(values, dtype=np.float64).sum()) or 1.0
            costs[name] = {
                kind: factor * values.size * float(error.sum(dtype=np.float64)) / power
                for kind, error in _errors(values, None)
            }
    return costs


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


def _errors(values: Floats, importance: Floats | None) -> list[tuple[TensorType, Floats]]:
    """The squared errors of a matrix in each type that it can have."""
    found = []
    if importance is not None:
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
