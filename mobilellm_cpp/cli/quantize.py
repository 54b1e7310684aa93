"""mobilellm quantize: a file or a checkpoint becomes a smaller file."""

import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .common import Head, Revision, check_head, checkpoint_name, print_json, printable, progress_bar

if TYPE_CHECKING:
    from ..quantization.run import Plan
    from ..quantization.source import Source

UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9}


def quantize(
    source: Annotated[
        str, typer.Argument(metavar="IN", help="A GGUF file, a checkpoint folder or a hub id.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The file to write.")],
    type: Annotated[
        str,
        typer.Option(
            help="A recipe (tiny, small, balanced, best: 3.5, 4.5, 5.2, 6.5 bits a weight), or a "
            "type that llama-quantize has: q4_0, q4_k_m, ..."
        ),
    ] = "balanced",
    head: Head = None,
    target_size: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE", help="Use the best mix of types that fits into this size, such as 60MB."
        ),
    ] = None,
    target_bpw: Annotated[
        float | None,
        typer.Option(min=1.0, max=16.0, help="The same, with the size in bits a weight."),
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="A file with the text to calibrate rounding on; by default a built-in text.",
        ),
    ] = None,
    calibrate: Annotated[
        bool,
        typer.Option(
            "--calibrate/--no-calibration",
            help="Whether to calibrate rounding; without, ggml's own rounding takes seconds.",
            show_default=False,
        ),
    ] = True,
    sequences: Annotated[
        int, typer.Option(min=1, help="How many sequences of 512 tokens to calibrate on.")
    ] = 24,
    tune: Annotated[
        int,
        typer.Option(
            min=0,
            help="Steps that tune scales and norms to the float model's blocks (try 20).",
        ),
    ] = 0,
    imatrix: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="An importance matrix of llama.cpp to use instead of calibration.",
        ),
    ] = None,
    save_imatrix: Annotated[
        Path | None, typer.Option(help="Also write an importance matrix of the text to this file.")
    ] = None,
    fallback: Annotated[
        bool,
        typer.Option(
            "--fallback/--no-fallback",
            help="Whether a tensor whose rows do not fit the blocks of its type may get another.",
            show_default=False,
        ),
    ] = True,
    report: Annotated[
        bool,
        typer.Option(
            "--report/--no-report",
            help="Compare the result with the input at the end.",
            show_default=False,
        ),
    ] = True,
    revision: Revision = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the comparison as JSON.")] = False,
) -> None:
    """Make a model smaller at the least cost in quality.

    Types are chosen by the quality that they cost, and rounding is calibrated on a text.
    """
    from ..convert.gguf_file import check_output
    from ..inspection.perplexity import read_text
    from ..quant.budget import RECIPES
    from ..quant.calibration_text import builtin_text
    from ..quant.mixes import MIXES
    from ..quantization import run
    from ..quantization.imatrix import collect, read_imatrix, write_imatrix
    from ..quantization.importance import column_importance
    from ..quantization.source import Source

    if target_size is not None and target_bpw is not None:
        raise typer.BadParameter("give --target-size or --target-bpw, not both")
    if imatrix is not None and calibration is not None:
        raise typer.BadParameter("give --imatrix or --calibration, not both")
    type = type.lower()
    check_head(head, type in RECIPES or target_size is not None or target_bpw is not None)
    size = None if target_size is None else _bytes(target_size)
    calibrated = calibrate and imatrix is None
    text = builtin_text() if calibration is None else read_text(calibration)
    with _file(source, revision) as path:
        opened = Source(path)
        check_output(out.expanduser(), [path])  # before what takes minutes
        plan = _plan(
            opened,
            type,
            head,
            size,
            target_bpw,
            text if calibrated else None,
            fallback,
            bool(imatrix),
        )
        _tell(plan)
        if save_imatrix is not None:
            tokens = run.text_tokens(opened, text, sequences)
            with progress_bar("layers") as progress:
                sums, counts = collect(opened, tokens, progress)
            name = "built-in" if calibration is None else calibration.name
            write_imatrix(save_imatrix, sums, counts, name, len(tokens), len(tokens[0]))
        importance = None if imatrix is None else read_imatrix(imatrix, opened)
        if importance is None and not calibrated and plan.type not in MIXES:
            importance = column_importance(opened, text)
        with progress_bar("weights") as progress:
            made = run.quantize_file(
                opened,
                out,
                plan,
                text=text if calibrated else None,
                imatrix=importance,
                sequences=sequences,
                tune=tune if calibrated else 0,
                progress=progress,
            )
        line = f"{made.path}: {made.size / 1e6:.1f} MB, {made.bits_per_weight:.2f} bits a weight"
        print(line, file=sys.stderr if as_json else sys.stdout)
        if report:
            _compare(path, made.path, text, as_json)


def _plan(
    source: "Source",
    type: str,
    head: str | None,
    size: int | None,
    bits: float | None,
    text: str | None,
    fallback: bool,
    imatrix: bool,
) -> "Plan":
    from ..quant.budget import RECIPES, UNCALIBRATED
    from ..quantization import run

    recipes = RECIPES if text is not None or imatrix else UNCALIBRATED
    if size is not None:
        bits = run.bits_for_size(source, size)
    if bits is None and type not in RECIPES:
        return run.make_plan(source, type, head=head, fallback=fallback, imatrix=imatrix)
    name, bits = (type, recipes[type]) if bits is None else (f"{bits:.2f} bits", bits)
    with progress_bar("sequences") as progress:
        return run.best_plan(source, name, bits, text, progress)


def _tell(plan: "Plan") -> None:
    """The plan, on stderr, before the work starts."""
    kinds = ", ".join(f"{n} × {name}" for name, n in plan.counts().most_common())
    bits = f"{plan.bits_per_weight:.2f} bits a weight"
    if plan.largest:
        print(f"{bits}, {kinds}: this file cannot use more bits", file=sys.stderr)
    else:
        print(f"{plan.type}: {bits}, {kinds}", file=sys.stderr)
    for name, (wanted, kind) in plan.substitutions.items():
        print(f"  {printable(name)}: {kind.name} instead of {wanted.name}", file=sys.stderr)


def _compare(before: Path, after: Path, text: str, as_json: bool) -> None:
    """What it cost: the end of the text, of which calibration saw little."""
    import dataclasses

    from ..inspection.comparison import compare_models
    from .compare import print_comparison

    with progress_bar("chunks") as progress:
        found = compare_models([before, after], text[-40_000:], chunks=6, progress=progress)
    if as_json:
        print_json(dataclasses.asdict(found))
    else:
        print_comparison(found)


def _bytes(size: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmg]?)(i?)b?", size.strip().lower())
    if not match:
        raise typer.BadParameter(f"{size!r} is not a size such as 60MB", param_hint="--target-size")
    unit = UNITS[match[2]]
    if match[3]:
        unit = {1: 1, 10**3: 2**10, 10**6: 2**20, 10**9: 2**30}[unit]
    return int(float(match[1]) * unit)


@contextmanager
def _file(source: str, revision: str | None) -> Iterator[Path]:
    """The GGUF file of IN; a checkpoint becomes one in its own float type, for as long as this
    lasts."""
    if Path(source).is_file():
        yield Path(source)
        return
    from ..convert import convert_checkpoint, open_checkpoint
    from ..quantization.checkpoint import float_type

    checkpoint = open_checkpoint(checkpoint_name(source), revision)
    type = float_type(checkpoint)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{checkpoint.name}-{type}.gguf"
        with progress_bar() as progress:
            convert_checkpoint(checkpoint, path, type=type, progress=progress)  # type: ignore[arg-type]
        yield path
