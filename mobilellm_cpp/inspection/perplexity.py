"""How well models predict a text, and how far one model's predictions lie from another's.

The text is cut and counted as llama.cpp's llama-perplexity does it (tools/perplexity): chunks of
`n_ctx` tokens, the first of each replaced by BOS where the vocabulary adds one, and of each chunk
the second half is predicted, so that there is always some context. The KV cache is in f16.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..engine.library import llama_cpp
from ..engine.model import MobileLLM
from ..errors import ModelError

Floats = npt.NDArray[np.float32]
Progress = Callable[[int, int, str], None]

CONTEXT = 512  # tokens of a chunk


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean negative log-likelihood of `tokens` tokens in `chunks` chunks of `n_ctx`, its
    standard error, and the seconds it took."""

    path: str
    perplexity: float
    error: float
    tokens: int
    chunks: int
    n_ctx: int
    seconds: float


def read_text(path: str | os.PathLike[str]) -> str:
    """A text file; bytes that are no UTF-8 are replaced. Raises ModelError if it holds none."""
    with open(path, encoding="utf-8", errors="replace") as file:
        text = file.read()
    if not text.strip():
        raise ModelError(f"{os.fspath(path)} is empty: give a file with text")
    return text


def perplexity(
    path: str | os.PathLike[str],
    text: str,
    *,
    n_ctx: int = CONTEXT,
    chunks: int | None = None,
    n_threads: int = 0,
    progress: Progress | None = None,
) -> Perplexity:
    """The perplexity of a GGUF file on a text; `chunks` limits how many are computed.

    `progress` gets the chunks done, the chunks in all and the file. Raises ModelError for a file
    that cannot be used and for a text of less than two chunks.
    """
    with MobileLLM(path, n_ctx=n_ctx, n_threads=n_threads, cache_type="f16") as llm:
        pieces = text_chunks(llm, text, n_ctx, chunks)
        start = time.monotonic()
        losses = []
        for done, tokens in enumerate(pieces, 1):
            losses.append(-chosen(log_probabilities(llm, tokens), tokens))
            if progress is not None:
                progress(done, len(pieces), os.fspath(path))
    mean, error = mean_and_error(np.concatenate(losses))
    return Perplexity(
        path=os.fspath(path),
        perplexity=math.exp(min(mean, 700.0)),
        error=math.exp(min(mean, 700.0)) * error,
        tokens=sum(map(len, losses)),
        chunks=len(pieces),
        n_ctx=n_ctx,
        seconds=time.monotonic() - start,
    )


def text_chunks(llm: MobileLLM, text: str, n_ctx: int, limit: int | None) -> list[list[int]]:
    """The chunks of a text, each of n_ctx tokens."""
    if n_ctx < 4:
        raise ModelError(f"a context of {n_ctx} tokens is too short: 4 are needed")
    tokens = llm.tokenize(text.encode(), add_bos=True)
    if len(tokens) < 2 * n_ctx:
        raise ModelError(
            f"the text has {len(tokens)} tokens, two chunks of {n_ctx} are needed: "
            "give a longer text or a smaller --ctx"
        )
    count = len(tokens) // n_ctx
    pieces = [tokens[at * n_ctx :][:n_ctx] for at in range(min(count, limit or count))]
    if llama_cpp.llama_vocab_get_add_bos(llama_cpp.llama_model_get_vocab(llm.model)):
        for piece in pieces:
            piece[0] = llm.token_bos()
    return pieces


def log_probabilities(llm: MobileLLM, tokens: list[int]) -> Floats:
    """float32 [n_ctx / 2 - 1, n_vocab]: of what follows each token of a chunk's second half."""
    logits = llm.logits(tokens, range(len(tokens) // 2, len(tokens) - 1))
    logits -= logits.max(axis=1, keepdims=True)
    logits -= np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return logits


def chosen(log_p: Floats, tokens: list[int]) -> Floats:
    """The log-likelihood of each token that log_probabilities predicts."""
    found: Floats = log_p[np.arange(len(log_p)), tokens[-len(log_p) :]]
    return found


def mean_and_error(values: Floats) -> tuple[float, float]:
    """The mean and its standard error."""
    wide = values.astype(np.float64)
    return float(wide.mean()), float(wide.std() / math.sqrt(max(1, len(wide) - 1)))


def divergences(log_p: Floats, log_q: Floats) -> Iterator[Floats]:
    """float64 [n]: for each row the Kullback-Leibler divergence of q from p in nats, then whether
    both have the same likeliest token."""
    difference = log_p - log_q
    difference *= np.exp(log_p)
    yield difference.sum(axis=1, dtype=np.float64)
    yield log_p.argmax(axis=1) == log_q.argmax(axis=1)
