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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..convert.checkpoint import Checkpoint, open_checkpoint
from ..convert.reference import MAX_TOKENS, Hyperparameters, Reference, read_rows, torch_threads
from ..convert.tensor import Tensor
from ..engine.gguf_file import GGUFFile, TensorInfo, block_schedule, is_count, open_gguf
from ..engine.library import llama_cpp
from ..engine.model import MobileLLM
from ..errors import CheckpointError, ModelError
from ..quant.bounds import bound
from ..quant.rounding import dequantize
from .tokenizer_check import TEXT, TokenizerCheck, check_tokenizer

if TYPE_CHECKING:
    import torch  # the reference imports it, with a sentence where it is missing

Floats = npt.NDArray[np.float32]

TOKENS = 256  # of the built-in text; as many more as a window holds
BEYOND = 128  # tokens beyond a window
LOGITS = 1 << 22  # how many are compared, at no fewer positions than this:
POSITIONS = 64
CHUNK = 1 << 19  # weights that are compared at a time

# The graph may differ from PyTorch's by this many times what rounded activations make.
NOISE_FACTOR = 2
STRETCH = 32  # positions that are looked at together
LEAST_NOISE = 1e-6  # of the spread

# Which pairs of a head's dimensions an architecture's RoPE turns: neighbours, or the two halves.
NEIGHBOURS = ("llama", "mobilellm", "granite_swa")
HALVES = ("qwen3",)

OWN = ("llama", "mobilellm")  # the architectures whose keys are known to the last one

# Constants that stock architectures need where the checkpoint has no weight.
CONSTANTS: dict[str, Callable[[Floats], Any]] = {
    "attn_q_norm.weight": lambda values: values == 1,
    "attn_k_norm.weight": lambda values: values == 1,
    "attn_sinks.weight": lambda values: values < -1e9,  # out of reach
}

FILE_PARTS = {
    "embedding": "token_embd",
    "final_norm": "output_norm",
    "head": "output",
    "attention_norm": "attn_norm",
    "q": "attn_q",
    "k": "attn_k",
    "v": "attn_v",
    "o": "attn_output",
    "ffn_norm": "ffn_norm",
    "gate": "ffn_gate",
    "up": "ffn_up",
    "down": "ffn_down",
}


@dataclass(frozen=True)
class TensorCheck:
    """One tensor of the file against the checkpoint's. `share` is the largest error as a share of
    what rounding to `type` allows there, None where it allows none; `outside` counts the weights
    (for types whose rounding is not known the rows) that are beyond it."""

    name: str
    type: str
    max_error: float
    share: float | None
    outside: int


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
    """The answers; `failures` has a sentence for each that is no, and `ok` says that none is."""

    model: str
    checkpoint: str
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
    n_threads: int = 0,
) -> Verification:
    """Compare the GGUF file `model` with the `checkpoint` it was made from, a folder, a hub id or
    an open one.

    `text` replaces the built-in text on which logits are compared. `schedule`, `settings`,
    `chat_template` and `revision` are those of the conversion. Raises ModelError or
    CheckpointError where one of the two cannot be read at all.
    """
    if not isinstance(checkpoint, Checkpoint):
        checkpoint = open_checkpoint(checkpoint, revision, settings)
    reference = Reference(checkpoint, schedule)
    hyper = reference.hyper
    path = os.fspath(model)
    with open_gguf(path) as opened:
        file = FileWeights(path, opened, reference)
        expected = _described(hyper, file.arch)
        found = _file_says(opened, file)
    failures = [
        f"{name} is {_shown(found[name])}, and config.json makes it {_shown(value)}"
        for name, value in expected.items()
        if found[name] != value
    ]

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
    tokens = _tokens(llm, text, limit)
    positions = _positions(len(tokens), window, hyper.vocab)
    tokenizer = check_tokenizer(llm, checkpoint, chat_template)
    engine = llm.logits(tokens, positions)
    llm.close()

    if unread := checkpoint.config.unread:
        raise CheckpointError(f"the setting {min(unread)} is no field that this model reads.")

    failures += tokenizer.differences
    tensors = [file.check(*tensor) for tensor in file.pairs()]
    failures += file.problems
    for tensor in tensors:
        if tensor.outside:
            failures.append(
                f"{tensor.name} is not the checkpoint's: {tensor.outside} weights are further from "
                f"it than rounding to {tensor.type} moves them, by up to {tensor.max_error:.3g}"
            )
    logits, graph = None, None
    with torch_threads(n_threads):
        if engine.shape[1] == hyper.vocab:
            logits = compare_logits(reference.logits(tokens, positions), engine, len(tokens))
        if logits and not file.problems:
            exact = reference.logits(tokens, positions, file)
            file.round_inputs = True
            rounded = reference.logits(tokens, positions, file)
            graph = compare_graph(exact, rounded, engine)
    if graph and not graph.ratio <= NOISE_FACTOR:
        failures.append(
            "llama.cpp computes something else from the file's weights than PyTorch: logits "
            f"differ by {graph.difference:.2g} of their spread, where rounded activations make "
            f"{graph.noise:.2g}"
        )
    return Verification(
        model=path,
        checkpoint=str(checkpoint.folder),
        metadata=expected,
        tensors=tensors,
        tokenizer=tokenizer,
        logits=logits,
        graph=graph,
        failures=failures,
    )


class FileWeights:
    """The file's weights in the checkpoint's order, as the reference takes them.

    Blocks are numbered as in the checkpoint; a file may hold a block once for each execution.
    With `round_inputs` the inputs of multiplications are rounded as ggml rounds them.
    """

    def __init__(self, path: str, file: GGUFFile, reference: Reference) -> None:
        self.path = path
        self.arch = str(file.get("general.architecture"))
        self.reference = reference
        self.round_inputs = False
        self.problems: list[str] = []  # why these weights cannot be compared
        self.infos = {tensor.name: tensor for tensor in file.tensors()}
        hyper = reference.hyper
        stored = file.get(f"{self.arch}.block_count")
        self.executed = block_schedule(file)
        self.copies = {block: [block] for block in range(hyper.blocks)}  # a block's in the file
        plain = file.get(f"{self.arch}.block_schedule") is None
        if plain and stored == len(hyper.schedule):  # a block for each layer
            self.copies = {
                block: [layer for layer, used in enumerate(hyper.schedule) if used == block]
                for block in range(hyper.blocks)
            }
            self.executed = list(hyper.schedule)
        elif stored != hyper.blocks:
            self.problems.append(f"the file holds {stored} blocks, the checkpoint {hyper.blocks}")
        if self.arch not in NEIGHBOURS + HALVES:
            self.problems.append(f"how the architecture {self.arch} orders q and k is not known")
        self.reordered = hyper.interleaved != (self.arch in NEIGHBOURS)

    def matrix(self, part: str, block: int | None) -> Floats:
        info = self._info(part, block)
        values = self._read(info, part, 0, info.n_elements // info.shape[-1])
        return values.reshape(info.shape)

    def rows(self, part: str, first: int, last: int) -> Floats:
        return self._read(self._info(part, None), part, first, last)

    def input(self, x: torch.Tensor, part: str, block: int | None) -> torch.Tensor:
        return round_input(x, self._info(part, block).type) if self.round_inputs else x

    def pairs(self) -> Iterator[tuple[str, str, Tensor]]:
        """The part, the name in the file and the checkpoint's tensor of all there is to compare;
        what the other side does not have becomes a problem."""
        left = dict(self.infos)
        for (part, block), tensor in self.reference.parts.items():
            for copy in [None] if block is None else self.copies[block]:
                name = self._name(part, copy)
                info = self.infos.get(name)
                left.pop(name, None)
                if info is None:
                    self.problems.append(f"the file has no {name}")
                elif info.shape != tensor.shape:
                    self.problems.append(
                        f"{name} has shape {info.shape}, the checkpoint's {tensor.shape}"
                    )
                else:
                    yield part, name, tensor
        if self.reference.tied and "output.weight" in left:
            del left["output.weight"]
            yield "head", "output.weight", self.reference.parts["embedding", None]
        for name, info in left.items():
            neutral = CONSTANTS.get(name.split(".", 2)[-1])
            if neutral is None:
                self.problems.append(f"the checkpoint has no {name}")
            elif not neutral(self._read(info, "", 0, 1)).all():
                self.problems.append(f"{name} does not hold what leaves attention as it is")

    def check(self, part: str, name: str, tensor: Tensor) -> TensorCheck:
        """All weights of one tensor against the checkpoint's, a few rows at a time."""
        info = self.infos[name]
        rows = info.n_elements // info.shape[-1]
        unit = self.reference.hyper.head_dim if part in ("q", "k") else 1
        step = max(1, CHUNK // (unit * info.shape[-1])) * unit
        largest, share, outside, forbidden = 0.0, 0.0, 0, False
        for first in range(0, rows, step):
            last = min(first + step, rows)
            ours = self._read(info, part, first, last)
            whole = (0, len(tensor.bits)) if len(tensor.shape) == 1 else (first, last)
            theirs = read_rows(tensor, *whole).reshape(ours.shape)
            error = np.abs(ours - theirs)
            largest = max(largest, float(error.max()))
            allowed = bound(info.type, theirs)
            if allowed is None:  # a row's error on the whole
                bits = 8 * info.n_bytes / info.n_elements
                error = np.sqrt(np.square(error).mean(1))
                allowed = 2 ** (2 - bits) * np.sqrt(np.square(theirs).mean(1))
            outside += int(np.count_nonzero(~(error <= allowed)))
            forbidden |= bool((error[allowed == 0] != 0).any())
            shares = np.divide(error, allowed, out=np.zeros_like(error), where=allowed > 0)
            share = max(share, float(shares.max()))
        return TensorCheck(name, info.type, largest, None if forbidden else share, outside)

    def _name(self, part: str, copy: int | None) -> str:
        """The file's name of a part, `copy` being the block of the file."""
        if part == "head" and "output.weight" not in self.infos:
            part = "embedding"  # tied
        return ("" if copy is None else f"blk.{copy}.") + f"{FILE_PARTS[part]}.weight"

    def _info(self, part: str, block: int | None) -> TensorInfo:
        return self.infos[self._name(part, None if block is None else self.copies[block][0])]

    def _read(self, info: TensorInfo, part: str, first: int, last: int) -> Floats:
        """Rows first..last, whole heads of q and k, in the checkpoint's order."""
        row_bytes = info.n_bytes // (info.n_elements // info.shape[-1])
        data = np.fromfile(
            self.path, np.uint8, (last - first) * row_bytes, offset=info.start + first * row_bytes
        )
        values = dequantize(data, info.type_id, info.shape[-1])
        if part not in ("q", "k") or not self.reordered:
            return values
        half = self.reference.hyper.head_dim // 2
        pair = (half, 2) if self.arch in NEIGHBOURS else (2, half)
        heads = values.reshape(-1, *pair, info.shape[-1])
        return np.ascontiguousarray(heads.swapaxes(1, 2)).reshape(values.shape)


def round_input(x: torch.Tensor, kind: str) -> torch.Tensor:
    """x [tokens, columns] as it goes into ggml's multiplication with weights of type `kind`.

    Quantized weights meet int8 numbers with a scale for 32 (K-quants: 256), F16 and BF16 ones
    their own kind; two bits of F16 are left to processors that sum in F16 as well. F32 is not
    rounded: a 2^-17th stands for the order of its sums.
    """
    import torch

    if kind == "f32":
        return ((x.contiguous().view(torch.int32) + 32) & ~63).view(torch.float32)
    if kind == "bf16":
        return x.bfloat16().float()
    if kind == "f16":
        return ((x.half().view(torch.int16) + 2) & ~3).view(torch.float16).float()
    blocks = x.view(len(x), -1, 256 if kind.endswith("_K") else 32)
    scale = blocks.abs().amax(-1, keepdim=True) / 127
    numbers = (blocks / scale.clamp(min=1e-30)).round()
    return (numbers * scale.half().float()).view(x.shape)


def compare_logits(truth: Floats, got: Floats, n_tokens: int) -> LogitCheck:
    """Two sets of logits [positions, vocab]."""
    difference = np.abs(got - truth)
    return LogitCheck(
        tokens=n_tokens,
        positions=len(truth),
        max_difference=float(difference.max()),
        mean_difference=float(difference.mean()),
        spread=float(truth.std(axis=1).mean()),
        kl_divergence=float(np.mean([_divergence(p, q) for p, q in zip(truth, got, strict=True)])),
        top1_agreement=float((truth.argmax(1) == got.argmax(1)).mean()),
    )


def _divergence(p: Floats, q: Floats) -> float:
    """KL(p || q) in nats of two rows of logits."""
    log_p, log_q = (row - np.logaddexp.reduce(row) for row in (p.astype(float), q.astype(float)))
    return float(np.sum(np.exp(log_p) * (log_p - log_q)))


def compare_graph(exact: Floats, rounded: Floats, engine: Floats) -> GraphCheck:
    """llama.cpp's logits and PyTorch's with rounded inputs, both against PyTorch's exact ones."""
    spread = np.sqrt(_variance(exact).mean())
    differences, noises = _variance(engine - exact), _variance(rounded - exact)
    ratio = 0.0
    for stretch in np.array_split(np.arange(len(exact)), max(1, len(exact) // STRETCH)):
        noise = max(float(noises[stretch].mean()), (LEAST_NOISE * spread) ** 2)
        ratio = max(ratio, float(np.sqrt(differences[stretch].mean() / noise)))
    return GraphCheck(
        difference=float(np.sqrt(differences.mean()) / spread),
        noise=float(np.sqrt(noises.mean()) / spread),
        ratio=ratio,
    )


def _variance(logits: Floats) -> Floats:
    """[positions]: of each row about its mean, which no probability depends on."""
    variance: Floats = logits.var(axis=1)
    return variance


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


def _described(hyper: Hyperparameters, arch: str) -> dict[str, Any]:
    """What a file of architecture `arch` must say, by names for people."""
    described: dict[str, Any] = {
        "executed blocks": list(hyper.schedule),
        "width": hyper.hidden,
        "FFN width": hyper.ffn,
        "heads": hyper.heads,
        "KV heads": hyper.kv_heads,
        "head size": hyper.head_dim,
        "vocabulary": hyper.vocab,
        "context": hyper.context,
        "norm epsilon": float(np.float32(hyper.epsilon)),
        "RoPE base": float(np.float32(hyper.theta)),
        "RoPE dimensions": hyper.head_dim,
    }
    if arch in OWN:
        described["q and k norm"] = hyper.qk_norm and any(hyper.rope)
        described["RoPE"] = list(hyper.rope)
        described["windows"] = list(hyper.windows)
    return described


def _file_says(file: GGUFFile, weights: FileWeights) -> dict[str, Any]:
    """The same from the file, with llama.cpp's defaults for keys that are absent."""

    def value(key: str, default: Any = None) -> Any:
        return file.get(f"{weights.arch}.{key}", default)

    heads = value("attention.head_count")
    width = value("embedding_length")
    size = value("attention.key_length")
    if size is None and is_count(heads) and is_count(width):
        size = width // heads
    blocks = len(weights.copies)
    window = value("attention.sliding_window")
    slides = value("attention.sliding_window_pattern", [False] * blocks)
    rope = value("attention.rope_pattern", [1] * blocks)
    return {
        "executed blocks": weights.executed,
        "width": width,
        "FFN width": value("feed_forward_length"),
        "heads": heads,
        "KV heads": value("attention.head_count_kv", heads),
        "head size": size,
        "vocabulary": file.get("tokenizer.ggml.tokens"),
        "context": value("context_length"),
        "norm epsilon": value("attention.layer_norm_rms_epsilon"),
        "RoPE base": value("rope.freq_base", 10000.0),
        "RoPE dimensions": value("rope.dimension_count", size),
        "q and k norm": value("attention.qk_norm", False),
        "RoPE": [bool(used) for used in rope] if isinstance(rope, list) else rope,
        "windows": [window if s else None for s in slides] if isinstance(slides, list) else slides,
    }


def _shown(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else text[:77] + "..."
