"""What rounding each matrix to each type costs, in nats of KL divergence a token.

For a small change D of the weights the divergence of the model's predictions is half of D'FD, F
being the Fisher information: the second moments of the gradient of the log-likelihood of tokens
drawn from the model itself. It is taken on the diagonal, and there as rows times columns (as
Adafactor does), so that it takes no memory to speak of. Gradients of a shared block come from all
its executions. Without torch a table of factors stands in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ..errors import ModelError
from ..quant.budget import candidates
from ..quant.mixes import EMBEDDING, is_matrix
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

    from .network import Weights

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


def _errors(values: Floats, importance: Floats) -> Iterator[tuple[TensorType, Floats]]:
    """The squared errors of a matrix in each type that it can have, one type after the other."""
    importance = importance / max(float(importance.mean()), 1e-30) + np.float32(1e-3)
    for kind in candidates(values.shape[-1]):
        bits = values.view(np.uint32)
        data = np.array(Rounder().round(bits, "F32", kind, importance))
        back = dequantize(data.reshape(-1).view(np.uint8), kind.id, values.shape[-1])
        back -= values.reshape(back.shape)
        yield kind, np.square(back, out=back).reshape(values.shape)


def _fisher(
    source: Source, tokens: list[list[int]], progress: Progress | None
) -> tuple[dict[str, Floats], dict[str, Floats], int]:
    """Sums over rows' and columns' squared gradients of each matrix, and the tokens they are of.

    The gradients go back a block at a time, each block computed anew, so that only one is in
    memory. A tied embedding's gradients as head and as embedding are squared apart."""
    try:
        import torch
    except ImportError:
        raise ModelError(NEEDS_TORCH) from None
    from .calibration import runs
    from .network import MATRICES, Network

    network = Network(source)
    schedule = runs(network.schedule)
    rows: dict[str, Floats] = {}
    columns: dict[str, Floats] = {}

    def collect(name: str, gradient: torch.Tensor | None) -> None:
        assert gradient is not None
        square = gradient.square_()
        rows[name] = rows.get(name, np.float32(0)) + square.sum(1).numpy()
        columns[name] = columns.get(name, np.float32(0)) + square.sum(0).numpy()

    def executed(x: torch.Tensor, weights: Weights, stored: int, times: int) -> torch.Tensor:
        for _ in range(times):
            x = network.block(x, weights, stored)
        return x

    def tell(done: int, stored: int) -> None:
        if progress is not None:
            progress(done, 2 * len(schedule), f"sensitivity of block {stored}")

    embedding = torch.from_numpy(source.values(EMBEDDING))
    streams = [embedding[torch.tensor([sequence])] for sequence in tokens]
    starts = []
    with torch.no_grad():
        for done, (stored, times) in enumerate(schedule, 1):
            starts.append(streams)
            own = network.weights(stored)
            streams = [executed(x, own, stored, times) for x in streams]
            tell(done, stored)

    name = network.head_name()
    head = embedding if source.tied else torch.from_numpy(source.values(name))
    head.requires_grad_(True)
    norm = torch.from_numpy(source.values("output_norm.weight"))
    generator = torch.Generator().manual_seed(1)
    for x in streams:
        x.requires_grad_(True)
        logits = (network.norm(x, norm) @ head.T)[0]
        drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
        loss = torch.nn.functional.cross_entropy(logits, drawn, reduction="sum")
        loss.backward()  # type: ignore[no-untyped-call]
        collect(name, head.grad)
        head.grad = None
    gradients = [x.grad for x in streams]

    for done, (stored, times) in enumerate(reversed(schedule), 1):
        own = network.weights(stored)
        for part in MATRICES:
            own[part].requires_grad_(True)
        for i, start in enumerate(starts.pop()):
            start.requires_grad_(True)
            executed(start, own, stored, times).backward(gradients[i])  # type: ignore[no-untyped-call]
            gradients[i] = start.grad
            for part in MATRICES:
                collect(f"blk.{stored}.{part}.weight", own[part].grad)
                own[part].grad = None
        tell(len(schedule) + done, stored)

    for sequence, gradient in zip(tokens, gradients, strict=True):
        assert gradient is not None
        seen, at = np.unique(sequence, return_inverse=True)
        summed = torch.zeros(len(seen), network.width)
        square = summed.index_add_(0, torch.from_numpy(at), gradient[0]).square_()
        if EMBEDDING not in rows:
            count, width = embedding.shape
            rows[EMBEDDING] = np.zeros(count, np.float32)
            columns[EMBEDDING] = np.zeros(width, np.float32)
        rows[EMBEDDING][seen] += square.sum(1).numpy()
        columns[EMBEDDING] += square.sum(0).numpy()
    return rows, columns, sum(map(len, tokens))
