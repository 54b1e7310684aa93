"""How fast models run on this machine, next to what its memory allows.

Decoding reads every weight once a token, so the bandwidth of memory, read in the same run, is the
limit. Two models are measured in turn, A B A B: their ratios stand, where neighbours on the machine
change single figures by half.
"""

import ctypes
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone

from .. import __version__
from ..engine.arguments import MAX_THREADS
from ..engine.gguf_file import GGUFFile, context_length, kv_bytes, open_gguf
from ..engine.library import decode, lib, llama_cpp
from ..engine.model import MobileLLM
from ..errors import ModelError
from ..quant.weight_type import CacheType

PREFILL = (64, 256, 1024)  # tokens of a prompt
DEPTHS = (0, 512, 1536)  # tokens before those that are decoded
STEPS = 32  # tokens decoded in one measurement
PROMPT = 64  # tokens before the first one of a new process
READ = 1 << 30  # bytes read to find the bandwidth

read_bandwidth = lib.mobilellm_read_bandwidth
read_bandwidth.argtypes = [ctypes.c_size_t, ctypes.c_int32]
read_bandwidth.restype = ctypes.c_double
lib.mobilellm_streaming_text.argtypes = []
lib.mobilellm_streaming_text.restype = ctypes.c_char_p
_head_share = lib.mobilellm_head_share
_head_share.argtypes = [
    llama_cpp.llama_cpp.llama_model_p_ctypes,
    llama_cpp.llama_context_params,
    ctypes.c_int32,
    ctypes.c_int32,
]
_head_share.restype = ctypes.c_double


@dataclass(frozen=True)
class Spread:
    """Median, least and largest of repeated measurements."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class ModelFigures:
    """One model: bytes of weights that a decoded token reads (those of blocks that run twice count
    once) and of K and V at each of DEPTHS, seconds from the start of a `mobilellm generate` process
    with prompt_tokens to its first token, and the peak of its resident memory in bytes."""

    path: str
    bytes_per_token: int
    kv_bytes: list[int]
    context: int
    prompt_tokens: int
    first_token_seconds: Spread
    peak_memory: int


@dataclass(frozen=True)
class Limit:
    """What does not depend on the phase, for a number of threads: bytes of memory read a second,
    and for each model the output head's share of a decoded token's time, None if unknown."""

    threads: int
    bandwidth: float
    head_share: list[float | None]


@dataclass(frozen=True)
class Row:
    """One phase, `prefill` of so many tokens or `decode` at that depth. For each model tokens a
    second, and for decode the part of the bandwidth limit they are (weights and the KV cache up to
    there are read once a token); None where the model's context is too short. ratio is the first
    model's rate over the second's, pair by pair."""

    phase: str
    tokens: int
    threads: int
    rates: list[Spread | None]
    of_limit: list[float | None]
    ratio: Spread | None


@dataclass(frozen=True)
class Report:
    """All figures of one run, with what they depend on. streaming: how packed weights are brought
    to the caches, as measured while the models were loaded."""

    date: str
    cpu: str
    version: str
    llama_cpp: str
    repeat: int
    streaming: str
    models: list[ModelFigures]
    limits: list[Limit]
    rows: list[Row]
    skipped: list[str]


def benchmark(
    paths: Sequence[str | os.PathLike[str]],
    threads: Sequence[int],
    *,
    repeat: int = 5,
    cache_type: CacheType | None = None,
    progress: Callable[[str], None] = lambda what: None,
) -> Report:
    """Measures one model, or two in turn. threads: the numbers of threads to measure with.
    Raises ModelError for files that cannot be used and numbers out of bounds."""
    if not threads or not all(1 <= n <= MAX_THREADS for n in threads):
        raise ModelError(f"threads are {list(threads)}; each must be 1 to {MAX_THREADS}")
    if repeat < 1:
        raise ModelError(f"repeat is {repeat}; at least one measurement is needed")
    runners = [Runner(os.fspath(path), max(threads), cache_type) for path in paths]
    models = []
    for runner in runners:
        progress(f"starting processes with {runner.path}")
        models.append(runner.figures(max(threads), repeat))
    skipped = list(_too_long(models))
    limits, rows = [], []
    for n in threads:
        on = f"{n} thread{'s' * (n > 1)}"
        progress(f"{on}: bandwidth of memory and the output head")
        limit = Limit(n, read_bandwidth(READ, n), [r.head_share(n) for r in runners])
        limits.append(limit)
        for phase, sizes in (("prefill", PREFILL), ("decode", DEPTHS)):
            for tokens in sizes:
                progress(f"{on}: {row_name(phase, tokens)}")
                row = _measure(phase, tokens, limit, runners, models, repeat)
                if any(row.rates):
                    rows.append(row)
    return Report(
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        cpu=cpu_name(),
        version=__version__,
        llama_cpp=llama_cpp.__version__,
        repeat=repeat,
        streaming=lib.mobilellm_streaming_text().decode(),
        models=models,
        limits=limits,
        rows=rows,
        skipped=skipped,
    )


def decoded_bytes(file: GGUFFile) -> int:
    """Bytes of weights that a decoded token reads. Those of a block that runs twice count once."""
    sizes = {tensor.name: tensor.n_bytes for tensor in file.tensors()}
    if "output.weight" in sizes:  # then the embedding is read a row at a time
        sizes.pop("token_embd.weight", None)
    return sum(sizes.values())


def spread(values: Sequence[float]) -> Spread:
    """Median, least and largest of at least one value."""
    return Spread(statistics.median(values), min(values), max(values))


def cpu_name() -> str:
    """The processor as Linux calls it, elsewhere as Python does."""
    try:
        with open("/proc/cpuinfo") as file:
            lines = [line.split(":", 1)[1] for line in file if line.startswith("model name")]
    except OSError:
        lines = []
    return lines[0].strip() if lines else platform.processor() or platform.machine()


def row_name(phase: str, tokens: int) -> str:
    """`prefill 64`, `decode at 512`."""
    return f"{phase} {'at ' if phase == 'decode' else ''}{tokens}"


def _positions(phase: str, tokens: int) -> int:
    """Tokens of context that a row needs."""
    return tokens + (STEPS if phase == "decode" else 0)


def _too_long(models: Sequence[ModelFigures]) -> Iterator[str]:
    """A sentence for each row that a model's context is too short for."""
    for model in models:
        for phase, sizes in (("prefill", PREFILL), ("decode", DEPTHS)):
            for tokens in sizes:
                if model.context and _positions(phase, tokens) > model.context:
                    yield (
                        f"{model.path}: {row_name(phase, tokens)} is left out, "
                        f"the context is {model.context} tokens"
                    )


def _measure(
    phase: str,
    tokens: int,
    limit: Limit,
    runners: Sequence["Runner"],
    models: Sequence[ModelFigures],
    repeat: int,
) -> Row:
    fits = [not m.context or _positions(phase, tokens) <= m.context for m in models]
    rates: list[list[float]] = [[] for _ in runners]
    for runner, fit in zip(runners, fits, strict=True):
        if fit:
            runner.prepare(phase, tokens, limit.threads)
    for _ in range(repeat):
        for runner, fit, values in zip(runners, fits, rates, strict=True):
            if fit:
                values.append(runner.rate(phase, tokens, limit.threads))
    spreads = [spread(values) if values else None for values in rates]
    shares = [
        found.median
        * (model.bytes_per_token + model.kv_bytes[DEPTHS.index(tokens)])
        / limit.bandwidth
        if found and phase == "decode" and limit.bandwidth
        else None
        for found, model in zip(spreads, models, strict=True)
    ]
    pairs = [a / b for a, b in zip(*rates, strict=True)] if len(rates) == 2 and all(fits) else []
    return Row(phase, tokens, limit.threads, spreads, shares, spread(pairs) if pairs else None)


class Runner:
    """One loaded model and the C loop over it."""

    def __init__(self, path: str, threads: int, cache_type: CacheType | None = None) -> None:
        self.path = path
        with open_gguf(path) as file:
            self.context = context_length(file)
            self.kv_bytes = [kv_bytes(file, depth, 1, cache_type) for depth in DEPTHS]
            self.bytes = decoded_bytes(file)
        needed = max(_positions("prefill", max(PREFILL)), _positions("decode", max(DEPTHS)))
        n_ctx = min(self.context or needed, needed)
        self.llm = MobileLLM(path, n_ctx=n_ctx, n_threads=threads, cache_type=cache_type)
        self.memory = llama_cpp.llama_get_memory(self.llm.ctx)

    def figures(self, threads: int, repeat: int) -> ModelFigures:
        """Starts processes, and says what else there is to know of the model."""
        prompt = "Once"
        while (n := len(self.llm.tokenize(prompt.encode()))) < min(PROMPT, self.llm.n_ctx() // 2):
            prompt += " and"
        started = [_first_token(self.path, prompt, threads) for _ in range(repeat)]
        return ModelFigures(
            path=self.path,
            bytes_per_token=self.bytes,
            kv_bytes=self.kv_bytes,
            context=self.context,
            prompt_tokens=n,
            first_token_seconds=spread([seconds for seconds, _ in started]),
            peak_memory=max(memory for _, memory in started),
        )

    def head_share(self, threads: int) -> float | None:
        params = type(self.llm.context_params).from_buffer_copy(self.llm.context_params)
        params.n_ctx, params.n_threads = STEPS, threads
        return _head_share(self.llm.model, params, 1, STEPS) or None

    def prepare(self, phase: str, tokens: int, threads: int) -> None:
        """Warms up, and fills the KV cache to the depth."""
        llama_cpp.llama_set_n_threads(self.llm.ctx, threads, threads)
        llama_cpp.llama_memory_clear(self.memory, True)
        self._run(tokens, self.llm.n_batch)
        if phase == "decode":
            self._run(STEPS, 1)

    def rate(self, phase: str, tokens: int, threads: int) -> float:
        """Tokens a second of one measurement."""
        llama_cpp.llama_set_n_threads(self.llm.ctx, threads, threads)
        if phase == "prefill":
            llama_cpp.llama_memory_clear(self.memory, True)
            return tokens / self._run(tokens, self.llm.n_batch)
        if not llama_cpp.llama_memory_seq_rm(self.memory, 0, tokens, -1):
            llama_cpp.llama_memory_clear(self.memory, True)
            self._run(tokens, self.llm.n_batch)
        return STEPS / self._run(STEPS, 1)

    def _run(self, n: int, n_batch: int) -> float:
        """Seconds to decode n tokens, n_batch at a time."""
        vocab = self.llm.n_vocab()
        tokens = (llama_cpp.llama_token * max(n, 1))(*(i % vocab for i in range(n)))
        start = time.perf_counter()
        for at in range(0, n, n_batch):
            place = ctypes.byref(tokens, at * ctypes.sizeof(llama_cpp.llama_token))
            some = ctypes.cast(place, ctypes.POINTER(llama_cpp.llama_token))
            decode(self.llm.ctx, llama_cpp.llama_batch_get_one(some, min(n_batch, n - at)))
        llama_cpp.llama_synchronize(self.llm.ctx)
        return time.perf_counter() - start


# `mobilellm` in a process that says its peak of resident memory as it ends. Linux's getrusage
# would count what this process had before it became that one.
_CHILD = """
import atexit, sys
def say():
    try:
        with open("/proc/self/status") as file:
            peak = next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) * 1024
    except OSError:
        import resource
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        peak *= 1 if sys.platform == "darwin" else 1024
    print(peak, file=sys.stderr)
atexit.register(say)
from mobilellm_cpp.cli import main
main()
"""


def _first_token(path: str, prompt: str, threads: int) -> tuple[float, int]:
    """Seconds from the start of `mobilellm generate` to its first output, and its peak memory."""
    command = [sys.executable, "-c", _CHILD, "generate", os.path.abspath(path), "-n", "1"]
    command += ["-p", prompt, "--temperature", "0", "--threads", str(threads)]
    start = time.perf_counter()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd="/", stdin=subprocess.DEVNULL
    )
    assert process.stdout
    process.stdout.read(1)
    seconds = time.perf_counter() - start
    _, stderr = process.communicate()
    lines = stderr.decode(errors="replace").splitlines()
    if process.returncode or not lines:
        raise ModelError(
            f"{path}: a new process failed: {lines[0] if lines else 'no reason given'}"
        )
    return seconds, int(lines[-1])
