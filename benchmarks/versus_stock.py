"""The tables of docs/measurements.md: our build against stock llama.cpp, on the same files.

    make bench                                             # the whole table
    .venv/bin/python benchmarks/versus_stock.py --shape 125M --rounds 3 --only decode

Weights are random at the published shapes; layer-shared weights are written out twice for stock,
which is all that it can run. Both sides run benchmarks/loop.cpp, the bare loop of llama.h without
sampling, each measurement in a process of its own. A round runs all sides of a figure one after the
other; ratios are taken within a round, the table has their medians and, in brackets, the least and
the largest. Stock has its repacking on, the compiler and flags of our build, and of flash attention
on and off the better. Progress goes to stderr, the table (Markdown) to stdout, and with --write
into the section of this processor.
"""

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SHAPES = ("125M", "350M")
PROMPT, MADE = 64, 64  # tokens of the prompt when a process starts; tokens made in a stream
LOADS = 9  # processes a figure of loading is the median of
STEPS = {64: 64, 512: 32, 1536: 32}  # depth: tokens decoded there

# What a user of Python sees: tokens/s of the bare loop of llama.h, and of MobileLLM.stream, each
# for MADE tokens after a prompt of PROMPT, three times in turn.
STREAM = """
import ctypes, json, statistics, sys, time
path, threads, prompt, made = json.loads(sys.argv[1])
from mobilellm_cpp import MobileLLM
from mobilellm_cpp.engine.library import llama_cpp
llm = MobileLLM(path, n_threads=threads)
memory = llama_cpp.llama_get_memory(llm.ctx)
text = "Once"
while len(llm.tokenize(text.encode())) < prompt:
    text += " and"

def bare():
    tokens = (llama_cpp.llama_token * prompt)(*range(5, 5 + prompt))
    one = (llama_cpp.llama_token * 1)(7)
    llama_cpp.llama_memory_clear(memory, True)
    llama_cpp.llama_decode(llm.ctx, llama_cpp.llama_batch_get_one(tokens, prompt))
    llama_cpp.llama_decode(llm.ctx, llama_cpp.llama_batch_get_one(one, 1))
    start = time.perf_counter()
    for _ in range(made):
        llama_cpp.llama_decode(llm.ctx, llama_cpp.llama_batch_get_one(one, 1))
    llama_cpp.llama_synchronize(llm.ctx)
    return made / (time.perf_counter() - start)

def stream():
    pieces = llm.stream(text, max_tokens=made + 2, temperature=0.8, seed=1)
    next(pieces), next(pieces)
    first = pieces.usage["completion_tokens"]
    start = time.perf_counter()
    for _ in pieces:
        pass
    return (pieces.usage["completion_tokens"] - first) / (time.perf_counter() - start)

bare(), stream()
pairs = [(bare(), stream()) for _ in range(3)]
print(json.dumps([statistics.median(pair[i] for pair in pairs) for i in (0, 1)]))
"""

# Seconds from the start of a command to its first byte, and tokens/s of what follows. `mobilellm
# generate` and the loop say on stderr how many tokens they decoded, prompt included; the last they
# only print.
WATCH = """
import json, os, subprocess, sys, time
command, prompt = json.loads(sys.argv[1])
start = time.perf_counter()
process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
os.read(process.stdout.fileno(), 1)
first = last = time.perf_counter()
while os.read(process.stdout.fileno(), 1 << 16):
    last = time.perf_counter()
error = process.stderr.read().decode()
assert process.wait() == 0, error
tokens = int(error.split()[0]) - prompt if error else 0
print(json.dumps([first - start, tokens / (last - first) if tokens > 0 else 0]))
"""

BANDWIDTH = """
import json, sys
from mobilellm_cpp.inspection.benchmark import READ, read_bandwidth
print(read_bandwidth(READ, json.loads(sys.argv[1])))
"""


def output(command: list[str], **env: str) -> str:
    """What a measuring process prints. Every measurement comes through here."""
    # OpenMP's spinning as the package sets it, for both sides: see docs/architecture.md
    environment = {**os.environ, "GOMP_SPINCOUNT": "1000", **env}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)[:300]} failed:\n{done.stderr[-2000:]}")
    return done.stdout


def python(script: str, argument: Any) -> Any:
    return json.loads(output([sys.executable, "-c", script, json.dumps(argument)]))


@dataclass
class Build:
    """The loop over one libllama, with its environment."""

    loop: Path
    env: dict[str, str] = field(default_factory=dict)

    def rates(
        self, model: Path, threads: int, flash: bool, kv: str, prefill: int, depths: list[int]
    ) -> list[float]:
        """Tokens/s of prefill, unless 0, and at each depth."""
        pairs = [f"{depth}={STEPS[depth]}" for depth in depths]
        command = [str(self.loop), str(model), str(threads), "time", str(int(flash)), kv]
        return [float(x) for x in output([*command, str(prefill), *pairs], **self.env).split()]

    def first_tokens(self, model: Path, threads: int) -> list[float]:
        """Seconds from the start of a process to the first token after a prompt, and tokens/s of
        those that follow, in a process as fresh."""
        command = [str(self.loop), str(model), str(threads), "first", str(PROMPT), str(MADE)]
        return [float(x) for x in python(WATCH, [command, PROMPT])]

    def load(self, model: Path, threads: int) -> list[float]:
        """Seconds until the model is loaded, and from the same start until a token is decoded, with
        the file in the page cache."""
        with model.open("rb") as file:
            while file.read(1 << 20):
                pass
        command = [str(self.loop), str(model), str(threads), "load"]
        return [float(x) for x in output(command, **self.env).split()]


class Bench:
    """The builds to compare and the files to compare them on."""

    def __init__(self, folder: Path, shape: str, rounds: int) -> None:
        from mobilellm_cpp.engine.library import FOLDER

        fetch = [sys.executable, str(ROOT / "mobilellm_cpp/native/upstream/upstream.py"), "fetch"]
        source = Path(subprocess.run(fetch, capture_output=True, text=True, check=True).stdout[:-1])
        peer = source.with_name(f"{source.name}-stock") / "bin"
        if not (peer / "libllama.so").exists():
            sys.exit("stock llama.cpp is not built: run `make stock` first")
        self.folder, self.shape, self.rounds = folder, shape, rounds
        self.stock_libraries = peer
        self.ours = Build(self._build(source, FOLDER, "ours"))
        self.plain = Build(self.ours.loop, {"MOBILELLM_KERNELS": "0"})
        self.stock = Build(self._build(source, peer, "stock"))

    def _build(self, source: Path, libraries: Path, name: str) -> Path:
        program = self.folder / f"loop-{name}"
        if not program.exists():
            command = [os.environ.get("CXX", "c++"), "-std=c++17", "-O2"]
            command += [f"-I{source / 'include'}", f"-I{source / 'ggml/include'}"]
            command += [str(ROOT / "benchmarks/loop.cpp"), "-o", str(program)]
            command += [f"-L{libraries}", "-lllama"]
            command += [f"-Wl,-rpath,{libraries}", f"-Wl,-rpath-link,{libraries}"]
            subprocess.run(command, check=True)
        return program

    def model(self, kind: str, type: str) -> Path:
        """base; shared: its blocks run twice; twice: those blocks written out twice; cached: one
        block run as often as shared runs blocks, so that it never leaves the cache."""
        from mobilellm_cpp import convert_checkpoint

        path = self.folder / f"{self.shape}-{kind}-{type}.gguf"
        if path.exists():
            return path
        sys.path.insert(0, str(ROOT / "tests"))
        from checkpoints import PUBLISHED, make_checkpoint

        sizes = dict(PUBLISHED[self.shape])
        depth = sizes["layers"]
        sizes["layers"] = {"twice": 2 * depth, "cached": 1}.get(kind, depth)
        schedule = {"shared": "immediate", "cached": ",".join(["0"] * 2 * depth)}.get(kind)
        source = make_checkpoint(self.folder / "checkpoint", **sizes, dtype="f16")
        convert_checkpoint(source, path, type=type, schedule=schedule)
        shutil.rmtree(source)
        return path

    def repeat(self, what: str, work: Callable[[], dict[str, float]]) -> dict[str, list[float]]:
        """The figures of each round, by name."""
        results = []
        for number in range(self.rounds):
            print(f"{self.shape} {what}: round {number + 1} of {self.rounds}", file=sys.stderr)
            results.append(work())
        return {name: [result[name] for result in results] for name in results[0]}

    def versus(
        self, what: str, type: str, threads: int, kv: str, prefill: int, depths: list[int]
    ) -> dict[str, list[float]]:
        """Rates of base: `ours 64`, `stock 64`, ...; prefill goes by the name 0."""
        model = self.model("base", type)
        names = [0] * (prefill > 0) + depths

        def work() -> dict[str, float]:
            ours = self.ours.rates(model, threads, True, kv, prefill, depths)
            stock = self.stock.rates(model, threads, True, kv, prefill, depths)
            if kv == "f16":  # a quantized V needs flash attention
                off = self.stock.rates(model, threads, False, kv, prefill, depths)
                stock = [max(pair) for pair in zip(stock, off, strict=True)]
            found = {f"ours {name}": rate for name, rate in zip(names, ours, strict=True)}
            return found | {f"stock {name}": rate for name, rate in zip(names, stock, strict=True)}

        return self.repeat(what, work)


@dataclass
class Figure:
    """One row of the table for one shape: the value of each round, and how to read it."""

    name: str
    goal: str
    values: list[float]
    note: str = ""

    def text(self) -> str:
        middle = statistics.median(self.values)
        return f"{middle:.2f} ({min(self.values):.2f}–{max(self.values):.2f}){self.note}"


def ratios(a: list[float], b: list[float]) -> list[float]:
    return [x / y for x, y in zip(a, b, strict=True)]


def rate_note(found: dict[str, list[float]], name: int) -> str:
    """Our and stock's tokens/s."""
    ours, stock = (statistics.median(found[f"{who} {name}"]) for who in ("ours", "stock"))
    return f", {ours:.0f} : {stock:.0f}"


def decode(bench: Bench) -> Iterator[Figure]:
    """Base against stock at the depths and types of the goals."""
    weights = {type: decoded_bytes(bench.model("base", type)) for type in ("q4_0", "q8_0")}
    bandwidth: dict[int, list[float]] = {}
    found = {}
    for type, threads, depths in [
        ("q4_0", 1, [64]),
        ("q4_0", 2, [64, 512, 1536]),
        ("q8_0", 1, [64]),
        ("q8_0", 2, [64]),
    ]:
        what = f"base {type}, {threads} threads"
        found[type, threads] = bench.versus(what, type, threads, "f16", 256, depths)
        bandwidth.setdefault(threads, []).extend(
            float(python(BANDWIDTH, threads)) for _ in range(2)
        )
    for threads, goal in ((1, "≥ 1.9"), (2, "≥ 2.3")):
        rates = found["q4_0", threads]
        yield Figure(
            f"decode, base Q4_0, depth 64, {threads_text(threads)}",
            goal,
            ratios(rates["ours 64"], rates["stock 64"]),
            note=rate_note(rates, 64),
        )
    for threads in (1, 2):
        rates = found["q8_0", threads]
        limit = max(bandwidth[threads]) / weights["q8_0"]
        share = statistics.median(rates["ours 64"]) / limit
        yield Figure(
            f"decode, base Q8_0, depth 64, {threads_text(threads)}",
            "≥ 1.5, or 0.80 of the limit",
            ratios(rates["ours 64"], rates["stock 64"]),
            note=f"{rate_note(rates, 64)}; {share:.2f} of the limit",
        )
    limit = max(bandwidth[2]) / weights["q4_0"]
    yield Figure(
        "share of the bandwidth limit, decode, base Q4_0, depth 64, 2 threads",
        "≥ 0.80",
        [rate / limit for rate in found["q4_0", 2]["ours 64"]],
        note=f" of {max(bandwidth[2]) / 1e9:.1f} GB/s",
    )
    quantized = bench.versus("base, q8_0 KV", "q4_0", 2, "q8_0", 0, [512, 1536])
    for kv, rates in (("f16", found["q4_0", 2]), ("q8_0", quantized)):
        for depth in (512, 1536):
            yield Figure(
                f"decode, base Q4_0, {kv} KV, depth {depth}, 2 threads",
                "≥ 2.3",
                ratios(rates[f"ours {depth}"], rates[f"stock {depth}"]),
                note=rate_note(rates, depth),
            )
    for type in ("q4_0", "q8_0"):
        for threads in (1, 2):
            rates = found[type, threads]
            yield Figure(
                f"prefill 256, base {type.upper()}, {threads_text(threads)}",
                "≥ 2.0",
                ratios(rates["ours 0"], rates["stock 0"]),
                note=rate_note(rates, 0),
            )


def sharing(bench: Bench) -> Iterator[Figure]:
    """Layer-shared, 2 threads, depth 64: against stock, our own build without kernels, base, and
    the same with its weights in cache."""
    kinds = ("base", "shared", "cached", "twice")
    base, shared, cached, twice = (bench.model(kind, "q4_0") for kind in kinds)

    def rate(build: Build, model: Path, flash: bool = True) -> float:
        return build.rates(model, 2, flash, "f16", 0, [64])[0]

    found = bench.repeat(
        "layer-shared",
        lambda: {
            "shared": rate(bench.ours, shared),
            "stock": max(rate(bench.stock, twice), rate(bench.stock, twice, False)),
            "plain": rate(bench.plain, shared),
            "base": rate(bench.ours, base),
            "cached": rate(bench.ours, cached),
        },
    )
    medians = {name: statistics.median(rates) for name, rates in found.items()}
    where = "decode, layer-shared Q4_0, depth 64, 2 threads"
    for name, text in (
        ("stock", "against the weights written out twice in stock"),
        ("plain", "against ours with `MOBILELLM_KERNELS=0`"),
    ):
        yield Figure(
            f"{where}, {text}",
            "≥ 2.5",
            ratios(found["shared"], found[name]),
            note=f", {medians['shared']:.0f} : {medians[name]:.0f}",
        )
    for name, goal, text in (
        ("base", "≤ 1.50", "layer-shared against base, both ours: time of a token"),
        ("cached", "≤ 1.15", "the same against the floor, all weights in cache"),
    ):
        yield Figure(
            text,
            goal,
            ratios(found[name], found["shared"]),
            note=f", {1e3 / medians['shared']:.2f} : {1e3 / medians[name]:.2f} ms",
        )


def load(bench: Bench) -> Iterator[Figure]:
    """Loading, each time in a fresh process."""
    for type in ("q4_0", "q8_0"):
        model = bench.model("base", type)

        def work(model: Path = model) -> dict[str, float]:
            pairs = [(bench.ours.load(model, 2), bench.stock.load(model, 2)) for _ in range(LOADS)]
            return {
                f"{who} {i}": statistics.median(pair[side][i] for pair in pairs)
                for side, who in enumerate(("ours", "stock"))
                for i in (0, 1)
            }

        found = bench.repeat(f"load {type}", work)
        for i, (name, goal) in enumerate(
            [
                (f"load base {type.upper()}: time, ours / stock", "≤ 1.5 at 125M"),
                ("the same, and decode one token", ""),
            ]
        ):
            ours, stock = found[f"ours {i}"], found[f"stock {i}"]
            note = (
                f", {1e3 * statistics.median(ours):.0f} : {1e3 * statistics.median(stock):.0f} ms"
            )
            yield Figure(name, goal, ratios(ours, stock), note=note)


def start(bench: Bench) -> Iterator[Figure]:
    """From the start of a process to its first token, and Python's loop against C's."""
    from mobilellm_cpp import MobileLLM

    model = bench.model("base", "q4_0")
    llm = MobileLLM(model, n_threads=1)
    text = "Once"
    while (n := len(llm.tokenize(text.encode()))) < PROMPT:
        text += " and"
    del llm
    program = str(Path(sys.executable).with_name("mobilellm"))
    command = [program, "generate", str(model), "-p", text, "-n", str(MADE), "--threads", "2"]

    def work() -> dict[str, float]:
        whole, generated = python(WATCH, [[*command, "--seed", "1"], n])
        bare, streamed = python(STREAM, [str(model), 2, PROMPT, MADE])
        ours, fresh = bench.ours.first_tokens(model, 2)
        stock, _ = bench.stock.first_tokens(model, 2)
        return {
            "ours": ours,
            "stock": stock,
            "whole": whole,
            "bare": bare,
            "stream": streamed,
            "fresh": fresh,
            "generate": generated,
        }

    found = bench.repeat("start and stream", work)
    medians = {name: statistics.median(values) for name, values in found.items()}
    yield Figure(
        f"start of a process to its first token, prompt of {PROMPT}, C++ part: time, ours / stock",
        "≤ 1.0",
        ratios(found["ours"], found["stock"]),
        note=f", {medians['ours']:.2f} : {medians['stock']:.2f} s",
    )
    goal = "< 0.8 s" if bench.shape == "125M" else ""
    yield Figure("the same, `mobilellm generate` whole, seconds", goal, found["whole"])
    for name, loop, title in (
        ("stream", "bare", "`MobileLLM.stream` against the bare C loop"),
        ("generate", "fresh", "`mobilellm generate` against the bare C loop, both from the start"),
    ):
        yield Figure(
            f"{title}, Q4_0, 2 threads, tokens/s",
            "≥ 0.9",
            ratios(found[name], found[loop]),
            note=f", {medians[name]:.0f} : {medians[loop]:.0f}",
        )


PARTS = {"decode": decode, "sharing": sharing, "load": load, "start": start}


def threads_text(n: int) -> str:
    return f"{n} thread{'s' * (n > 1)}"


def decoded_bytes(model: Path) -> int:
    """Bytes of weights that a decoded token reads."""
    from mobilellm_cpp.engine.gguf_file import open_gguf
    from mobilellm_cpp.inspection.benchmark import decoded_bytes

    with open_gguf(model) as file:
        return decoded_bytes(file)


def processor() -> str:
    """The heading of this processor's section: some names stand for several generations."""
    from mobilellm_cpp.inspection import benchmark

    try:
        cpuinfo = Path("/proc/cpuinfo").read_text()
    except OSError:
        cpuinfo = ""
    found = [re.search(rf"^{key}\s*: (\d+)$", cpuinfo, re.M) for key in ("cpu family", "model")]
    if not all(found):
        return benchmark.cpu_name()
    family, model = (match[1] for match in found if match)
    return f"{benchmark.cpu_name()} (family {family}, model {model})"


def with_section(text: str, heading: str, table: str) -> str:
    """text with the table in the section of that heading, a new one if there is none. What a
    section holds outside the marks stays."""
    block = f"<!-- make bench -->\n{table}\n<!-- end -->\n"
    start = f"{text}\n".find(f"## {heading}\n")
    if start < 0:
        return f"{text.rstrip()}\n\n## {heading}\n\n{block}"
    end = text.find("\n## ", start) + 1 or len(text)
    section = text[start:end]
    marked = re.compile("<!-- make bench -->\n.*?<!-- end -->\n", re.S)
    if marked.search(section):
        section = marked.sub(lambda _: block, section, count=1)
    else:
        title, rest = section.split("\n", 1)
        section = f"{title}\n\n{block}{rest}"
    return text[:start] + section + text[end:]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--folder", type=Path, help="keep the models here; by default removed")
    parser.add_argument(
        "--write", type=Path, help="the file whose section of this processor to write"
    )
    options = parser.parse_args()

    from mobilellm_cpp import __version__
    from mobilellm_cpp.engine.library import llama_cpp

    folder = options.folder or Path(tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    columns: dict[str, list[Figure]] = {}
    try:
        for shape in options.shape:
            bench = Bench(folder, shape, options.rounds)
            columns[shape] = [figure for part in options.only for figure in PARTS[part](bench)]
    finally:
        if not options.folder:
            shutil.rmtree(folder)
    lines = [
        f"{time.strftime('%Y-%m-%d')}, {os.cpu_count()} cores; "
        f"mobilellm-cpp {__version__}, llama.cpp of llama-cpp-python {llama_cpp.__version__}; "
        f"median of {options.rounds} rounds (least–largest), then ours : the other, tokens/s.",
        "",
        f"| ours / stock llama.cpp, same file | goal | {' | '.join(columns)} |",
        "|" + "---|" * (2 + len(columns)),
    ]
    for row in zip(*columns.values(), strict=True):
        lines.append(f"| {row[0].name} | {row[0].goal} | {' | '.join(f.text() for f in row)} |")
    print("\n".join(lines))
    if options.write:
        text = options.write.read_text()
        options.write.write_text(with_section(text, processor(), "\n".join(lines)))


if __name__ == "__main__":
    main()
