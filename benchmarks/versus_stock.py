"""Decode and prefill of our build against stock llama.cpp, on the same file, in interleaved rounds.

    make stock && .venv/bin/python benchmarks/versus_stock.py --shape 125M --type q4_0

Weights are random at the published shape. The layer-shared file is compared with the same weights
written out twice, which is all that stock can run. Figures are medians of tokens/s; ratios are
taken round by round. Both sides run the C loop of llama.h, without sampling.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PREFILL, DEPTH, DECODE = 256, 64, 64  # tokens

WORKER = """
import ctypes, json, sys, time
import llama_cpp
path, threads, prefill, depth, decode = json.loads(sys.argv[1])
llm = llama_cpp.Llama(path, n_ctx=1024, n_threads=threads, n_threads_batch=threads,
                      flash_attn=True, verbose=False)
memory = llama_cpp.llama_get_memory(llm.ctx)

def run(n):
    tokens = (llama_cpp.llama_token * n)(*range(5, 5 + n))
    assert llama_cpp.llama_decode(llm.ctx, llama_cpp.llama_batch_get_one(tokens, n)) == 0

def seconds(work):
    start = time.perf_counter()
    work()
    return time.perf_counter() - start

run(prefill)  # warm
llama_cpp.llama_memory_clear(memory, True)
prefilled = prefill / seconds(lambda: run(prefill))
llama_cpp.llama_memory_clear(memory, True)
run(depth)
decoded = decode / seconds(lambda: [run(1) for _ in range(decode)])
print(json.dumps([prefilled, decoded]))
"""


def measure(library: Path, model: Path, threads: int) -> tuple[float, float]:
    """(prefill, decode) in tokens/s, in a process of its own."""
    arguments = json.dumps([str(model), threads, PREFILL, DEPTH, DECODE])
    env = {**os.environ, "LLAMA_CPP_LIB_PATH": str(library)}
    command = [sys.executable, "-c", WORKER, arguments]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    prefill, decode = json.loads(done.stdout)
    return prefill, decode


def build_models(folder: Path, shape: str, type: str) -> dict[str, tuple[Path, Path]]:
    """Row name to (our file, stock's file)."""
    sys.path.insert(0, str(ROOT / "tests"))
    from checkpoints import PUBLISHED, make_checkpoint

    from mobilellm_cpp import convert_checkpoint

    sizes = PUBLISHED[shape]
    base, shared, twice = (folder / f"{name}.gguf" for name in ("base", "shared", "twice"))
    checkpoint = make_checkpoint(folder / "base", **sizes, dtype="f16")
    convert_checkpoint(checkpoint, base, type=type)
    convert_checkpoint(checkpoint, shared, type=type, schedule="immediate")
    deep = make_checkpoint(
        folder / "twice", **{**sizes, "layers": 2 * sizes["layers"]}, dtype="f16"
    )
    convert_checkpoint(deep, twice, type=type)
    return {"base": (base, base), "layer-shared": (shared, twice)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="125M", choices=["125M", "350M", "600M", "1B", "1.5B"])
    parser.add_argument("--type", default="q4_0")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()

    from mobilellm_cpp.library import FOLDER

    fetch = [sys.executable, str(ROOT / "mobilellm_cpp/native/upstream.py"), "fetch"]
    source = subprocess.run(fetch, capture_output=True, text=True, check=True).stdout.strip()
    stock = Path(f"{source}-stock") / "bin"
    if not stock.exists():
        sys.exit("stock llama.cpp is not built: run `make stock` first")

    rows = []
    with tempfile.TemporaryDirectory() as tmp:
        for name, (ours, theirs) in build_models(Path(tmp), args.shape, args.type).items():
            for threads in args.threads:
                pairs = [
                    (measure(FOLDER, ours, threads), measure(stock, theirs, threads))
                    for _ in range(args.rounds)
                ]
                for i, phase in enumerate((f"prefill {PREFILL}", f"decode at depth {DEPTH}")):
                    rows.append(
                        {
                            "model": f"{args.shape} {name}",
                            "type": args.type,
                            "phase": phase,
                            "threads": threads,
                            "ours": statistics.median(pair[0][i] for pair in pairs),
                            "stock": statistics.median(pair[1][i] for pair in pairs),
                            "ratio": statistics.median(p[0][i] / p[1][i] for p in pairs),
                        }
                    )
    if args.json:
        print(json.dumps(rows))
        return
    print("| model | type | phase | threads | ours, tokens/s | stock, tokens/s | ratio |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['model']} | {row['type']} | {row['phase']} | {row['threads']} "
            f"| {row['ours']:.0f} | {row['stock']:.0f} | {row['ratio']:.2f} |"
        )


if __name__ == "__main__":
    main()
