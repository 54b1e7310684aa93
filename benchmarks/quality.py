"""Our quantized files beside llama.cpp's: size, perplexity and KL divergence of the same model.

    python benchmarks/quality.py MODEL.gguf --stock BIN --calibration A.txt --heldout B.txt
        [--types q4_0 iq4_nl small 4.5 ...] [--chunks 24] [--plot out.png] --work FOLDER

MODEL is a float file that stock llama.cpp reads, or ours with --no-stock-files (a layer-shared
one: then llama-quantize's rounding is made by `mobilellm quantize --no-calibration`, the same
bytes). One in Q4_1, as SmolLM2's, is first written as F16, with noise of half a step added from a
fixed seed: without it, its weights would lie on the lattice of some of the types compared.
A type is one of llama-quantize, a recipe, or a number of bits a weight; how sensitive the tensors
are is measured once for all. Of llama-quantize's, `iq4_nl@q4_0` has its embedding in Q4_0. With
--only ffn_down only these matrices are rounded, and all others stay in F16.
Files that are in FOLDER already are not made again. Prints a table in Markdown.
"""

from __future__ import annotations

import argparse
import functools
import json
import subprocess
from pathlib import Path

import numpy as np
from gguf.constants import LlamaFileType
from mobilellm_cpp.convert.gguf_file import GGUFFile, u32
from mobilellm_cpp.quant import types
from mobilellm_cpp.quant.budget import RECIPES
from mobilellm_cpp.quant.mixes import Choice, is_matrix

from mobilellm_cpp.cli.compare import print_comparison
from mobilellm_cpp.inspection.comparison import Comparison, compare_models, plot
from mobilellm_cpp.quantization import calibration, imatrix, run, sensitivity
from mobilellm_cpp.quantization.source import Source


def float_file(model: Path, work: Path) -> Path:
    """The model itself, or what it is in F16 with noise where it is in Q4_1."""
    source = Source(model)
    if all(info.type_id != types.Q4_1.id for info in source.tensors.values()):
        return model
    out = work / f"{model.stem}-noisy-f16.gguf"
    if out.exists():
        return out
    random = np.random.default_rng(1)
    infos = [
        (name, info.shape, types.F16 if is_matrix(name, info.shape) else types.F32)
        for name, info in source.tensors.items()
    ]
    metadata = dict(source.metadata)
    metadata["general.file_type"] = u32(LlamaFileType.MOSTLY_F16)
    with GGUFFile(out, metadata, infos) as file:
        for name, _, kind in infos:
            values = source.values(name)
            if source.tensors[name].type_id == types.Q4_1.id:
                blocks = source.raw(name).reshape(-1, types.Q4_1.block_bytes)
                step = np.abs(blocks[:, :2].copy().view("<f2").astype(np.float32))
                noise = random.uniform(-0.5, 0.5, (len(step), types.Q4_1.block))
                values = values + (noise * step).astype(np.float32).reshape(values.shape)
            data = values.astype("<f2" if kind is types.F16 else "<f4")
            file.write(name, 0, data.reshape(-1).view(np.uint8).data)
    return out


def stock_files(options: argparse.Namespace, source: Source) -> list[Path]:
    """Each type as llama-quantize makes it, without and with an importance matrix."""
    text = options.calibration.read_text()
    importance = options.work / "stock.imatrix.gguf"
    if not importance.exists():
        tokens = run.text_tokens(source, text, options.imatrix_sequences)
        sums, counts = imatrix.collect(source, tokens)
        size = len(tokens[0])
        imatrix.write_imatrix(importance, sums, counts, "text", len(tokens), size)
    made = []
    for kind in options.stock_types:
        for suffix in ("-imatrix",) if options.only_imatrix else ("", "-imatrix"):
            out = options.work / f"stock-{kind}{suffix}.gguf"
            made.append(out)
            if out.exists():
                continue
            if options.stock is None:
                weights = imatrix.read_imatrix(importance, source) if suffix else None
                plan = plan_of(options, source, kind, bool(suffix))
                run.quantize_file(source, out, plan, imatrix=weights)
            else:
                command = [options.stock / "llama-quantize"]
                command += ["--imatrix", importance] if suffix else []
                mix, _, embedding = kind.partition("@")
                command += ["--token-embedding-type", embedding] if embedding else []
                command += [source.path, out, mix.upper(), "1"]
                subprocess.run([*map(str, command)], check=True, capture_output=True)
    return made


def our_files(options: argparse.Namespace, source: Source) -> list[Path]:
    """Each type and recipe, calibrated."""
    text = options.calibration.read_text()
    made = []
    for kind in options.types:
        out = options.work / f"{'first' if options.first_only else 'ours'}-{kind}.gguf"
        made.append(out)
        if not out.exists():
            if kind in RECIPES or kind[0].isdigit():
                bits = RECIPES[kind] if kind in RECIPES else float(kind)
                plan = run.plan_mix(source, kind, bits, costs(options.work, source, text))
            else:
                plan = plan_of(options, source, kind)
            print(f"{out.name}: {plan.bits_per_weight:.2f} bits, {dict(plan.counts())}", flush=True)
            run.quantize_file(source, out, plan, text=text, sequences=options.sequences)
    return made


def plan_of(
    options: argparse.Namespace, source: Source, kind: str, weighted: bool = False
) -> run.Plan:
    if not options.only:
        return run.make_plan(source, kind, imatrix=weighted)
    rounded = getattr(types, kind.upper())
    choices = {
        name: Choice(rounded if options.only in name else types.F16)
        for name, info in source.tensors.items()
        if is_matrix(name, info.shape)
    }
    return run.plan_of(source, kind, choices, LlamaFileType.MOSTLY_F16, fallback=True)


def costs(work: Path, source: Source, text: str) -> sensitivity.Costs:
    """What each tensor costs in each type; FOLDER keeps it."""
    kept = work / "costs.json"
    if not kept.exists():
        tokens = run.text_tokens(source, text, sensitivity.SEQUENCES)
        found = sensitivity.measured(source, [row[: sensitivity.TOKENS] for row in tokens])
        named = {name: {kind.name: c for kind, c in of.items()} for name, of in found.items()}
        kept.write_text(json.dumps(named))
    named = json.loads(kept.read_text())
    return {name: {getattr(types, k): c for k, c in of.items()} for name, of in named.items()}


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
    parser.add_argument("--only-imatrix", action="store_true", help="no stock file without one")
    parser.add_argument("--only", metavar="PART", help="round the matrices named so alone")
    parser.add_argument("--sequences", type=int, default=24)
    parser.add_argument(
        "--first-only", action="store_true", help="calibrate on a block's first execution alone"
    )
    parser.add_argument("--imatrix-sequences", type=int, default=40)
    parser.add_argument("--chunks", type=int, default=24)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    if options.first_only:
        calibration.Calibration = functools.partial(calibration.Calibration, first_only=True)
    source = Source(float_file(options.model, options.work))
    files = [*stock_files(options, source), *our_files(options, source)]
    found = compare_models(
        [source.path, *files],
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
