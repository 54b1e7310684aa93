"""Whether a GGUF file is what a checkpoint makes.

Four questions, each answered by itself:

  metadata   does the file describe the computation that config.json describes?
  tensors    is every weight the checkpoint's, but for the rounding of its type?
  tokenizer  does the file cut texts into the checkpoint's tokens?
  graph      does llama.cpp compute from the file's weights what PyTorch computes from them?

How far the file's logits lie from the checkpoint's is told too, but it is no question: they show
what rounding costs. The graph is asked with the file's own weights on both sides, so that what is
left is the rounding of activations, which llama.cpp does in every multiplication; how much that
makes is found by doing the same in PyTorch.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..convert.adapter import Adapter
from ..convert.adapter_conversion import open_adapter
from ..convert.checkpoint import Checkpoint, open_checkpoint
from ..convert.reference import MAX_TOKENS, Reference, StoredWeights, torch_threads
from ..engine.gguf_file import open_gguf
from ..engine.library import llama_cpp
from ..engine.model import MobileLLM
from ..errors import CheckpointError, ModelError
from .file_weights import FileWeights, Floats, TensorCheck
from .merged_weights import MergedWeights
from .metadata_check import check_metadata
from .tokenizer_check import TEXT, TokenizerCheck, check_tokenizer
from .vocabulary_check import check_vocabulary

TOKENS = 256  # of the built-in text; as many more as a window holds
BEYOND = 128  # tokens beyond a window
LOGITS = 1 << 22  # how many are compared, at no fewer positions than this:
POSITIONS = 64

# The graph may differ from PyTorch's by this many times what rounded activations make.
NOISE_FACTOR = 2
STRETCH = 32  # positions that are looked at together
LEAST_NOISE = 1e-6  # of the spread

Doubles = npt.NDArray[np.float64]


@dataclass(frozen=True)
class LogitCheck:
    """The file's logits against the checkpoint's at `positions` of `tokens` tokens. Differences are
    absolute; `spread` is the deviation of the checkpoint's logits about their mean; the divergence
    KL(checkpoint || file) is in nats."""

    tokens: int
    positions: int
    max_difference: float
    mean_difference: float
    spread: float
    kl_divergence: float
    top1_agreement: float


@dataclass(frozen=True)
class GraphCheck:
    """The file's logits against PyTorch's from the file's weights: root mean squares as shares of
    the spread. `difference` is llama.cpp's, `noise` that of activations rounded in PyTorch, and
    `ratio` the largest ratio of the two over any stretch of the text."""

    difference: float
    noise: float
    ratio: float


@dataclass(frozen=True)
class Verification:
    """The answers; `failures` has a sentence for each that is no, and `ok` says that none is.
    `adapter` is the folder of one that is merged into the checkpoint's weights."""

    model: str
    checkpoint: str
    adapter: str | None
    metadata: dict[str, Any]  # what was compared, as the checkpoint has it
    tensors: list[TensorCheck]
    tokenizer: TokenizerCheck
    logits: LogitCheck | None
    graph: GraphCheck | None
    failures: list[str]

    @property
    def ok(self) -> bool:
        return not self.failures


def verify(
    model: str | os.PathLike[str],
    checkpoint: str | Path | Checkpoint,
    *,
    text: str | None = None,
    schedule: str | Sequence[int] | None = None,
    settings: Mapping[str, Any] | None = None,
    chat_template: str | None = None,
    revision: str | None = None,
    adapter: str | Path | Adapter | None = None,
    n_threads: int = 0,
) -> Verification:
    """Compare the GGUF file `model` with the `checkpoint` it was made from, a folder, a hub id or
    an open one.

    `text` replaces the built-in text on which logits are compared. `schedule`, `settings`,
    `chat_template`, `revision` and `adapter` are those of the conversion. Raises ModelError or
    CheckpointError where one of the two cannot be read at all.
    """
    if not isinstance(checkpoint, Checkpoint):
        checkpoint = open_checkpoint(checkpoint, revision, settings)
    reference = Reference(checkpoint, schedule)
    stored = StoredWeights(reference.parts)
    if adapter is not None:
        adapter = open_adapter(adapter)
        stored = MergedWeights(reference, adapter)
    hyper = reference.hyper
    path = os.fspath(model)
    with open_gguf(path) as opened:
        file = FileWeights(path, opened, reference)
        expected, failures = check_metadata(opened, file, hyper)
        vocabulary = check_vocabulary(opened, checkpoint.folder, hyper.vocab)

    # the engine first: what it holds in memory is gone before the reference begins
    window = max((w for w in hyper.windows if w is not None), default=0)
    limit = min(hyper.context, MAX_TOKENS, window + BEYOND if window else TOKENS)
    llm = MobileLLM(
        path,
        n_ctx=limit,
        n_batch=64,  # logits of a whole batch are kept
        n_threads=n_threads,
        type_k=llama_cpp.GGML_TYPE_F32,
        type_v=llama_cpp.GGML_TYPE_F32,
    )
    with closing(llm):
        tokens = _tokens(llm, text, limit)
        positions = _positions(len(tokens), window, hyper.vocab)
        merged = None if adapter is None else adapter.folder
        tokenizer = check_tokenizer(llm, checkpoint, chat_template, merged)
        tokenizer = replace(tokenizer, differences=[*vocabulary, *tokenizer.differences])
        engine: Floats | None = None
        try:
            engine = llm.logits(tokens, positions)
        except ModelError as error:  # weights that are no numbers: the tensors' check names them
            failures.append(f"llama.cpp gives no logits: {error}")

    if unread := checkpoint.config.unread:
        raise CheckpointError(f"the setting {min(unread)} is not a field that this model reads.")

    failures += tokenizer.differences
    tensors = [file.check(*tensor, stored) for tensor in file.pairs()]
    failures += file.problems
    whose = "the checkpoint's" if adapter is None else "the checkpoint's with the adapter merged"
    for tensor in tensors:
        if tensor.outside:
            rounding = "a lattice's step" if file.exact else f"rounding to {tensor.type}"
            failures.append(
                f"{tensor.name} is not {whose}: {tensor.outside} weights are further from "
                f"it than {rounding} moves them, by up to {tensor.max_error:.3g}"
            )
    logits, graph = None, None
    if engine is not None and engine.shape[1] == hyper.vocab:
        with torch_threads(n_threads):
            truth = reference.logits(tokens, positions, stored)
            logits = compare_logits(truth, engine, len(tokens))
            numbers = {"PyTorch's logits": truth, "llama.cpp's logits": engine}
            if not file.problems:
                exact = reference.logits(tokens, positions, file)
                file.round_inputs = True
                rounded = reference.logits(tokens, positions, file)
                graph = compare_graph(exact, rounded, engine)
                numbers["PyTorch's logits from the file's weights"] = exact
                numbers["the same with activations rounded as ggml rounds them"] = rounded
        infinite = [name for name, values in numbers.items() if not np.isfinite(values).all()]
        if infinite:
            failures.append(f"{infinite[0]} are not finite numbers: something is too large")
        elif graph and not graph.ratio <= NOISE_FACTOR:
            failures.append(
                "llama.cpp computes something else from the file's weights than PyTorch: logits "
                f"differ by {graph.difference:.2g} of their spread, where rounded activations make "
                f"{graph.noise:.2g}"
            )
    return Verification(
        model=path,
        checkpoint=str(checkpoint.folder),
        adapter=None if adapter is None else str(adapter.folder),
        metadata=expected,
        tensors=tensors,
        tokenizer=tokenizer,
        logits=logits,
        graph=graph,
        failures=failures,
    )


def compare_logits(truth: Floats, got: Floats, n_tokens: int) -> LogitCheck:
    """Two sets of logits [positions, vocab]; what is not finite makes figures that are not."""
    with np.errstate(all="ignore"):
        difference = np.abs(got - truth)
        return LogitCheck(
            tokens=n_tokens,
            positions=len(truth),
            max_difference=float(difference.max()),
            mean_difference=float(difference.mean()),
            spread=float(truth.std(axis=1).mean()),
            kl_divergence=float(
                np.mean([_divergence(p, q) for p, q in zip(truth, got, strict=True)])
            ),
            top1_agreement=float((truth.argmax(1) == got.argmax(1)).mean()),
        )


def _divergence(p: Floats, q: Floats) -> float:
    """KL(p || q) in nats of two rows of logits."""
    log_p, log_q = (row - np.logaddexp.reduce(row) for row in (p.astype(float), q.astype(float)))
    return float(np.sum(np.exp(log_p) * (log_p - log_q)))


def compare_graph(exact: Floats, rounded: Floats, engine: Floats) -> GraphCheck:
    """llama.cpp's logits and PyTorch's with rounded inputs, both against PyTorch's exact ones. A
    number that is not finite makes the ratio NaN or infinite."""
    with np.errstate(all="ignore"):
        spread = np.sqrt(_variance(exact, np.zeros_like(exact[:, :1])).mean())
        differences, noises = _variance(engine, exact), _variance(rounded, exact)
        ratios = [0.0]
        for stretch in np.array_split(np.arange(len(exact)), max(1, len(exact) // STRETCH)):
            noise = np.maximum(noises[stretch].mean(), (LEAST_NOISE * spread) ** 2)
            ratios.append(_share(differences[stretch].mean(), noise))
        return GraphCheck(
            difference=_share(differences.mean(), spread**2),
            noise=_share(noises.mean(), spread**2),
            ratio=float(np.max(ratios)),  # Python's max passes over NaN
        )


def _share(part: float, whole: float) -> float:
    """The root of part / whole; nothing is no share of nothing."""
    return float(np.sqrt(part / whole)) if part != 0 else 0.0


def _variance(logits: Floats, minus: Floats) -> Doubles:
    """[positions]: of each row of a difference about its mean, which no probability depends on."""
    pairs = zip(logits, minus, strict=True)
    return np.array([np.subtract(row, other, dtype=float).var() for row, other in pairs])


def _tokens(llm: MobileLLM, text: str | None, limit: int) -> list[int]:
    """Tokens of the text; the built-in one is repeated until there are enough."""
    if text is not None:
        tokens = llm.tokenize(text.encode("utf-8", "replace"))
    else:
        tokens = llm.tokenize(TEXT.encode())
        while len(tokens) < limit:
            tokens += llm.tokenize(TEXT.encode(), add_bos=False)
    if not tokens:
        raise ModelError("the text to compare logits on is empty")
    return tokens[:limit]


def _positions(n: int, window: int, vocab: int) -> list[int]:
    """Where logits are compared: everywhere, or evenly spread if the vocabulary is large; half of
    them beyond a window."""
    count = max(POSITIONS, LOGITS // vocab)
    if count >= n:
        return list(range(n))
    starts = [0, window] if window < n else [0]
    spread = [np.linspace(start, n - 1, count // len(starts)) for start in starts]
    return sorted({round(position) for position in np.concatenate(spread).tolist()})
