"""Every packed type against stock llama.cpp on the same file, and against Q4_0's bytes a second.

    .venv/bin/python benchmarks/each_type.py --rounds 3 [--threads 2] [FILE.gguf ...]

Types with blocks of 32 in the shape of the 125M, K-quants, which its rows do not divide by, in four
blocks of R1-950M's widths; every matrix has the type. Weights are random; files given are measured
as well. A round runs both sides of every file one after the other, stock with flash attention on
and off, of which the better counts; the table has medians.
"""

import argparse
import ctypes
import shutil
import statistics
import sys
import tempfile
from pathlib import Path

from builds import ROOT, Bench, decoded_bytes

from mobilellm_cpp import convert_checkpoint
from mobilellm_cpp.engine.library import llama_cpp

# llama_ftype
NARROW = {"q4_0": 2, "q8_0": 7, "q4_1": 3, "iq4_nl": 25, "q5_0": 8, "q5_1": 9}
WIDE = {"q4_0": 2, "iq4_xs": 30, "q3_K": 11, "q4_K": 14, "q5_K": 16, "q6_K": 18}
R1 = {"layers": 4, "hidden": 1536, "heads": 24, "kv_heads": 6, "ffn": 6144, "vocab": 32000}
PREFILL, DEPTH = 256, 64


def wide_floats(bench: Bench) -> Path:
    path = bench.folder / "wide-f16.gguf"
    if not path.exists():
        sys.path.insert(0, str(ROOT / "tests"))
        from checkpoints import make_checkpoint

        source = make_checkpoint(bench.folder / "checkpoint", **R1, dtype="f16")
        convert_checkpoint(source, path, type="f16")
        shutil.rmtree(source)
    return path


def quantized(source: Path, type: str, ftype: int) -> Path:
    path = source.with_name(source.name.replace("f16", type))
    if not path.exists():
        options = llama_cpp.llama_model_quantize_default_params()
        options.ftype, options.pure = ftype, True
        names = [str(name).encode() for name in (source, path)]
        if llama_cpp.llama_model_quantize(*names, ctypes.byref(options)):
            raise SystemExit(f"{path} could not be written")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="keep the models here; by default removed")
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    try:
        bench = Bench(folder, "125M", options.rounds)
        narrow = bench.model("base", "f16")
        groups = [
            [quantized(narrow, type, ftype) for type, ftype in NARROW.items()] + options.files,
            [quantized(wide_floats(bench), type, ftype) for type, ftype in WIDE.items()],
        ]

        def work() -> dict[str, float]:
            found = {}
            for path in [path for group in groups for path in group]:
                for who, build in (("ours", bench.ours), ("stock", bench.stock)):
                    rates = [
                        build.rates(path, options.threads, flash, "f16", PREFILL, [DEPTH])
                        for flash in {"ours": [True], "stock": [True, False]}[who]
                    ]
                    found[f"{who} prefill {path}"] = max(rate[0] for rate in rates)
                    found[f"{who} {path}"] = max(rate[1] for rate in rates)
            return found

        sizes = {path: decoded_bytes(path) for group in groups for path in group}
        found = {name: statistics.median(x) for name, x in bench.repeat("types", work).items()}
    finally:
        if not options.folder:
            shutil.rmtree(folder)
    print("| file | MB a token | decode, ours : stock | | GB/s, of Q4_0's | prefill | |")
    print("|---|---|---|---|---|---|---|")
    for group in groups:
        rates = {path: found[f"ours {path}"] * sizes[path] / 1e9 for path in group}
        for path in group:
            cells = [path.stem, f"{sizes[path] / 1e6:.0f}"]
            for name in ("", "prefill "):
                ours, stock = (found[f"{who} {name}{path}"] for who in ("ours", "stock"))
                cells += [f"{ours:.0f} : {stock:.0f}", f"{ours / stock:.2f}"]
            cells.insert(4, f"{rates[path]:.1f}, {rates[path] / rates[group[0]]:.2f}")
            print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
