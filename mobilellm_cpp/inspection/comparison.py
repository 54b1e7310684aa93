"""Several model files on one text: size, quality and speed, each beside the first file.

KV caches are in f16, as llama-perplexity's are, so that only the weights make a difference.
All files are loaded at once and see each chunk of the text in turn, so that no log-probabilities
have to be kept; speeds are measured in turn, too (inspection/benchmark.py).
"""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..engine.gguf_file import open_gguf
from ..engine.threads import default_threads
from ..errors import MobileLLMError, ModelError
from .benchmark import Runner
from .perplexity import (
    CONTEXT,
    Progress,
    chosen,
    divergences,
    log_probabilities,
    mean_and_error,
    text_chunks,
)

PREFILL, DEPTH = 256, 64  # tokens of the prompt, and before the decoded ones
MB = 1e6


@dataclass(frozen=True)
class Compared:
    """One file. kl_* are the Kullback-Leibler divergence from the first file in nats: the mean over
    all predicted tokens, its standard error, and the value that 99 % of them stay below;
    top_1 is the share of tokens where both files think the same token likeliest. Speeds are tokens
    a second, None where they were not measured."""

    path: str
    size: int
    bits_per_weight: float
    perplexity: float
    perplexity_error: float
    kl_mean: float
    kl_error: float
    kl_99: float
    top_1: float
    decode: float | None
    prefill: float | None


@dataclass(frozen=True)
class Comparison:
    """What was compared, on how much text, with how many threads."""

    n_ctx: int
    chunks: int
    tokens: int
    threads: int
    files: list[Compared]


def compare_models(
    paths: Sequence[str | os.PathLike[str]],
    text: str,
    *,
    n_ctx: int = CONTEXT,
    chunks: int | None = None,
    n_threads: int = 0,
    repeat: int = 3,
    progress: Progress | None = None,
) -> Comparison:
    """Compares files on a text. repeat: measurements of each speed; 0 measures none.

    Raises ModelError for files that cannot be used, have other vocabularies than the first, or were
    trained for a shorter context than `n_ctx`, and for a text of less than two chunks.
    """
    names = [os.fspath(path) for path in paths]
    threads = n_threads or default_threads()
    with ExitStack() as open_models:
        runners = [Runner(name, threads, "f16") for name in names]
        for runner in runners:
            open_models.enter_context(runner.llm)
            if runner.llm.n_ctx() < n_ctx:
                raise ModelError(f"{runner.path} has a context of {runner.llm.n_ctx()} tokens only")
        pieces = text_chunks(runners[0].llm, text, n_ctx, chunks)
        for runner in runners[1:]:
            same_size = runner.llm.n_vocab() == runners[0].llm.n_vocab()
            if not same_size or text_chunks(runner.llm, text, n_ctx, chunks) != pieces:
                raise ModelError(
                    f"{runner.path} cuts the text into other tokens than {names[0]}: "
                    "only files of the same vocabulary can be compared"
                )
        losses: list[list[Any]] = [[] for _ in names]
        distances: list[list[Any]] = [[] for _ in names]
        agreed: list[list[Any]] = [[] for _ in names]
        for done, tokens in enumerate(pieces):
            first = None
            for i, runner in enumerate(runners):
                log_p = log_probabilities(runner.llm, tokens)
                first = log_p if first is None else first
                losses[i].append(-chosen(log_p, tokens))
                kl, same = divergences(first, log_p)
                distances[i].append(kl)
                agreed[i].append(same)
                if progress is not None:
                    progress(done * len(names) + i + 1, len(pieces) * len(names), runner.path)
        speeds = [(None, None)] * len(names) if repeat < 1 else _speeds(runners, threads, repeat)
    files = []
    for i, name in enumerate(names):
        with open_gguf(name) as file:
            tensors = file.tensors()
        weights = sum(tensor.n_elements for tensor in tensors)
        loss, loss_error = mean_and_error(np.concatenate(losses[i]))
        kl_all = np.concatenate(distances[i])
        kl_mean, kl_error = mean_and_error(kl_all)
        files.append(
            Compared(
                path=name,
                size=os.path.getsize(name),
                bits_per_weight=8 * sum(tensor.n_bytes for tensor in tensors) / weights,
                perplexity=math.exp(min(loss, 700.0)),
                perplexity_error=math.exp(min(loss, 700.0)) * loss_error,
                kl_mean=max(0.0, kl_mean),
                kl_error=kl_error,
                kl_99=max(0.0, float(np.quantile(kl_all, 0.99))),
                top_1=float(np.concatenate(agreed[i]).mean()),
                decode=speeds[i][0],
                prefill=speeds[i][1],
            )
        )
    return Comparison(n_ctx, len(pieces), sum(map(len, losses[0])), threads, files)


def _speeds(
    runners: Sequence[Runner], threads: int, repeat: int
) -> Sequence[tuple[float | None, float | None]]:
    """Medians of decode and prefill for each file, measured in turn."""
    found: dict[str, list[float | None]] = {}
    for phase, tokens in (("decode", DEPTH), ("prefill", PREFILL)):
        rates: list[list[float]] = [[] for _ in runners]
        for runner in runners:
            runner.prepare(phase, tokens, threads)
        for _ in range(repeat):
            for runner, values in zip(runners, rates, strict=True):
                values.append(runner.rate(phase, tokens, threads))
        found[phase] = [statistics.median(values) for values in rates]
    return list(zip(found["decode"], found["prefill"], strict=True))


def plot(comparison: Comparison, path: Path) -> None:
    """Draws quality against size, a dot for each file but the first, which has no distance from
    itself. Raises MobileLLMError where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MobileLLMError("--plot needs matplotlib: pip install matplotlib") from None
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    others = comparison.files[1:]
    axes.scatter([file.size / MB for file in others], [file.kl_mean for file in others])
    for file in others:
        name = Path(file.path).stem
        at = (file.size / MB, file.kl_mean)
        axes.annotate(name, at, xytext=(4, 4), textcoords="offset points", fontsize=8)
    if any(file.kl_mean > 0 for file in others):
        axes.set_yscale("log")
    axes.set_xlabel("size, MB")
    axes.set_ylabel(f"mean KL divergence from {Path(comparison.files[0].path).stem}, nats")
    axes.grid(alpha=0.3)
    axes.margins(x=0.2)  # room for the names
    figure.savefig(path, dpi=150)
