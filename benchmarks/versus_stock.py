"""The tables of docs/measurements.md: our build against stock llama.cpp, on the same files.

    make bench                                             # the whole table
    .venv/bin/python benchmarks/versus_stock.py --shape 125M --rounds 3 --only decode

Weights are random at the published shapes; layer-shared weights are written out twice for stock,
which is all that it can run. Both sides run benchmarks/loop.cpp, the bare loop of llama.h without
sampling, each measurement in a process of its own. A round runs all sides of a figure one after the
other; ratios are taken within a round, the table has their medians and, in brackets, the least and
the largest. Stock has its repacking on, the flags of our build, without --stock its compiler, and
of flash attention on and off the better. Progress goes to stderr, the table (Markdown) to stdout,
and with --write into the section of this processor.
"""

import argparse
import os
import re
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from builds import BANDWIDTH, MADE, PROMPT, STREAM, WATCH, Bench, Build, decoded_bytes, python

SHAPES = ("125M", "350M")
LOADS = 9  # processes a figure of loading is the median of


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
    marked = re.compile("<!-- make bench -->.*?<!-- end -->\n", re.S)
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
    parser.add_argument("--stock", default="", metavar="CXX", help="as in `make stock STOCK_CXX=`")
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
            bench = Bench(folder, shape, options.rounds, options.stock)
            columns[shape] = [figure for part in options.only for figure in PARTS[part](bench)]
    finally:
        if not options.folder:
            shutil.rmtree(folder)
    lines = [
        f"{time.strftime('%Y-%m-%d')}, {os.cpu_count()} cores; "
        f"mobilellm-cpp {__version__}, llama.cpp of llama-cpp-python {llama_cpp.__version__} "
        f"(stock built by {bench.stock_compiler}); "
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
