"""Other engines that pip brings, on the same shapes as ours.

    .venv/bin/python benchmarks/peers                     # all of them: Markdown to stdout
    .venv/bin/python benchmarks/peers openvino --shape 125M --threads 1 --rounds 3

Each engine has a module here, use_NAME.py, and an environment of its own in build/peers, which is
made when it is missing. All convert the same checkpoint of random weights to 4 bits with their own
tools. A round runs all engines one after the other, each in a process of its own (measure.py); a
round in which other programs used more than 5 % of the processors' time is run again. Ratios, ours
to theirs, are taken within a round, and the table has their medians."""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
FOLDER = ROOT / "build/peers"
TORCH = ["torch==2.13.0", "transformers"]  # for their converters
PINS = {
    "openvino": ["openvino==2026.4.1", "nncf", "optimum-intel", *TORCH],
    "onnxruntime": ["onnxruntime-genai==0.18.0", "onnx", "onnx-ir", *TORCH],
    "ctranslate2": ["ctranslate2==4.8.5", *TORCH],
    "ik_llama": ["ik-llama-cpp-python==0.1.5"],
    "mnn": ["MNN==3.6.1", "llmexport==0.0.5", "onnx", *TORCH],
    "executorch": ["executorch==1.5.1", "torchao==0.18.0", *TORCH],
}
FIGURES = {  # larger is better, but for the last two
    "decode": "decode, tokens/s at depth 64",
    "prefill": "prefill of 256, tokens/s",
    "first": "start to first token, s",
    "memory": "memory, MB",
}
QUIET, TRIES = 0.05, 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("peers", nargs="*", metavar="PEER", help=f"of {', '.join(PINS)}")
    parser.add_argument("--shape", action="append", help="125M, 350M; default: both")
    parser.add_argument("--threads", type=int, action="append", help="default: 1 and 2")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    names = arguments.peers or list(PINS)
    if unknown := set(names) - set(PINS):
        parser.error(f"no such engine: {', '.join(sorted(unknown))}; there are {', '.join(PINS)}")
    for shape in arguments.shape or ("125M", "350M"):
        files = {name: prepare(name, shape) for name in ("ours", *names)}
        for threads in arguments.threads or (1, 2):
            found = [measure_all(files, threads) for _ in range(arguments.rounds)]
            print(table(shape, threads, files, found), flush=True)


def python(name: str) -> Path:
    """The Python of an engine's environment."""
    if name == "ours":
        return Path(sys.executable)
    environment = FOLDER / name
    python, done = environment / "bin/python", environment / "done"
    if not done.exists() or done.read_text() != str(PINS[name]):
        print(f"installing {name}", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", environment], check=True)
        pip = [python, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
        subprocess.run([*pip, *PINS[name]], check=True)
        # optimum-intel brings one of another build of torch, with which transformers does not load
        subprocess.run([python, "-m", "pip", "uninstall", "-y", "-q", "torchvision"], check=True)
        done.write_text(str(PINS[name]))
    return python


def prepare(name: str, shape: str) -> Path:
    """An engine's own form of the model of a shape."""
    out = FOLDER / f"{shape}-{name}"
    if not out.exists():
        print(f"converting {shape} for {name}", file=sys.stderr)
        source = FOLDER / f"{shape}-checkpoint"
        if not source.exists():
            run([sys.executable, HERE / "checkpoint.py", shape, source])
        unfinished = out.with_suffix(".part")
        run([python(name), HERE / "measure.py", "convert", name, source, unfinished])
        unfinished.rename(out)
    return out


def run(command: list[object]) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))} failed:\n{done.stderr[-3000:]}")
    return done.stdout


def measure_all(files: dict[str, Path], threads: int) -> dict[str, dict[str, float]]:
    for left in reversed(range(TRIES)):
        start, before = time.monotonic(), busy_seconds()
        ours = sum(os.times()[:4])
        found = {name: measure(name, path, threads) for name, path in files.items()}
        others = busy_seconds() - before - (sum(os.times()[:4]) - ours)
        share = others / (time.monotonic() - start) / (os.cpu_count() or 1)
        if share < QUIET:
            return found
        print(f"others used {share:.0%} of the processors: again", file=sys.stderr)
        if not left:
            sys.exit("this machine is too busy to measure on")
    raise AssertionError


def busy_seconds() -> float:
    """Of all processors and programs since the machine was started."""
    fields = [int(x) for x in Path("/proc/stat").read_text().split("\n")[0].split()[1:9]]
    user, nice, system, _idle, _iowait, irq, softirq, _steal = fields
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def measure(name: str, path: Path, threads: int) -> dict[str, float]:
    start = time.monotonic()
    command = [python(name), HERE / "measure.py", "measure", name, path, threads, start]
    result = json.loads(run(command).splitlines()[-1])
    assert isinstance(result, dict)
    return result


def table(
    shape: str, threads: int, files: dict[str, Path], found: list[dict[str, dict[str, float]]]
) -> str:
    lines = [f"\n{shape}, {threads} thread{'s' * (threads > 1)}; each engine's own figure, and how"]
    lines[0] += " often ours is better\n"
    lines += ["| engine | file, MB | " + " | ".join(FIGURES.values()) + " |"]
    lines += ["|---" * (2 + len(FIGURES)) + "|"]
    for name, path in files.items():
        parts = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
        row = [name, f"{sum(p.stat().st_size for p in parts) / 1e6:.0f}"]
        for figure in FIGURES:
            values = [each[name][figure] for each in found]
            text = f"{statistics.median(values):.{2 if figure == 'first' else 0}f}"
            if name != "ours":
                pairs = [(each["ours"][figure], each[name][figure]) for each in found]
                less = figure in ("first", "memory")
                times = [theirs / ours if less else ours / theirs for ours, theirs in pairs]
                text += f" ({statistics.median(times):.2f}×)"
            row.append(text)
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
