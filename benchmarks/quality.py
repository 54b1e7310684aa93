"""Our quantized files beside llama.cpp's: size, perplexity and KL divergence of the same model.

    python benchmarks/quality.py MODEL.gguf --stock BIN --calibration A.txt --heldout B.txt
        [--types q4_0 iq4_nl small ...] [--chunks 24] [--plot out.png] --work FOLDER

MODEL is a float file that stock llama.cpp reads, or ours with --no-stock-files (a layer-shared one:
then llama-quantize's rounding is made by `mobilellm quantize --no-calibration`, the same bytes).
Files that are in FOLDER already are not made again. Prints a table in Markdown.
"""

from __future__ import annotations

import argparse
import subprocess
from pathlib import Path

from mobilellm_cpp.quant.budget import RECIPES

from mobilellm_cpp.cli.compare import print_comparison
from mobilellm_cpp.inspection.comparison import Comparison, compare_models, plot
from mobilellm_cpp.quantization import imatrix, run
from mobilellm_cpp.quantization.source import Source


def stock_files(options: argparse.Namespace, source: Source) -> list[Path]:
    """Each type as llama-quantize makes it, without and with an importance matrix."""
    text = options.calibration.read_text()
    importance = options.work / "stock.imatrix.gguf"
    if not importance.exists():
        tokens = run.text_tokens(source, text, options.sequences)
        sums, counts = imatrix.collect(source, tokens)
        size = len(tokens[0])
        imatrix.write_imatrix(importance, sums, counts, "text", len(tokens), size)
    made = []
    for kind in options.stock_types:
        for suffix in ("", "-imatrix"):
            out = options.work / f"stock-{kind}{suffix}.gguf"
            made.append(out)
            if out.exists():
                continue
            if options.stock is None:
                weights = imatrix.read_imatrix(importance, source) if suffix else None
                plan = run.make_plan(source, kind, imatrix=bool(suffix))
                run.quantize_file(source, out, plan, imatrix=weights)
            else:
                command = [options.stock / "llama-quantize"]
                command += ["--imatrix", importance] if suffix else []
                command += [options.model, out, kind.upper(), "1"]
                subprocess.run([*map(str, command)], check=True, capture_output=True)
    return made


def our_files(options: argparse.Namespace, source: Source) -> list[Path]:
    """Each type and recipe, calibrated."""
    text = options.calibration.read_text()
    made = []
    for kind in options.types:
        out = options.work / f"ours-{kind}.gguf"
        made.append(out)
        if not out.exists():
            if kind in RECIPES:
                plan = run.best_plan(source, kind, RECIPES[kind], text)
            else:
                plan = run.make_plan(source, kind)
            run.quantize_file(source, out, plan, text=text, sequences=options.sequences)
    return made


def markdown(found: Comparison) -> str:
    lines = ["| file | MB | bits a weight | perplexity | KL, nats | KL 99 % | top-1 |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for file in found.files:
        numbers = f"{file.size / 1e6:.1f} | {file.bits_per_weight:.2f} | {file.perplexity:.3f}"
        kl = f"{file.kl_mean:.4f} ± {file.kl_error:.4f} | {file.kl_99:.3f} | {file.top_1:.1%}"
        lines.append(f"| {Path(file.path).stem} | {numbers} | {kl} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--stock", type=Path, help="folder of llama-quantize")
    parser.add_argument("--no-stock-files", action="store_const", const=None, dest="stock")
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--heldout", type=Path, required=True)
    parser.add_argument("--types", nargs="*", default=["q4_0", "iq4_nl", "small"])
    parser.add_argument("--stock-types", nargs="*", default=["q4_0", "iq4_nl", "q4_k_m"])
    parser.add_argument("--sequences", type=int, default=24)
    parser.add_argument("--chunks", type=int, default=24)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    source = Source(options.model)
    files = [*stock_files(options, source), *our_files(options, source)]
    found = compare_models(
        [options.model, *files],
        options.heldout.read_text(),
        chunks=options.chunks,
        n_threads=options.threads,
        repeat=0,
    )
    print_comparison(found)
    print(markdown(found))
    if options.plot:
        plot(found, options.plot)


if __name__ == "__main__":
    main()
