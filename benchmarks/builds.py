"""What the benchmarks compare: builds of llama.cpp under one loop, the files that they run, and the
processes in which each measurement is made."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PROMPT, MADE = 64, 64  # tokens of the prompt when a process starts; tokens made in a stream
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
    """The builds to compare and the files to compare them on. stock: the compiler of a stock that
    `make stock STOCK_CXX=...` has built; by default the one that `make stock` builds."""

    def __init__(self, folder: Path, shape: str, rounds: int, stock: str = "") -> None:
        from mobilellm_cpp.engine.library import FOLDER

        fetch = [sys.executable, str(ROOT / "mobilellm_cpp/native/upstream/upstream.py"), "fetch"]
        source = Path(subprocess.run(fetch, capture_output=True, text=True, check=True).stdout[:-1])
        built = source.with_name(f"{source.name}-stock{stock and f'-{stock}'}")
        peer = built / "bin"
        if not (peer / "libllama.so").exists():
            wanted = f"make stock{stock and f' STOCK_CXX={stock}'}"
            sys.exit(f"stock llama.cpp is not built: run `{wanted}` first")
        found = next(built.glob("CMakeFiles/*/CMakeCXXCompiler.cmake")).read_text()
        self.stock_compiler = " ".join(
            re.search(rf'CMAKE_CXX_COMPILER_{part} "(.*?)"', found)[1]  # type: ignore[index]
            for part in ("ID", "VERSION")
        )
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


def decoded_bytes(model: Path) -> int:
    """Bytes of weights that a decoded token reads."""
    from mobilellm_cpp.engine.gguf_file import open_gguf
    from mobilellm_cpp.inspection.benchmark import decoded_bytes

    with open_gguf(model) as file:
        return decoded_bytes(file)
