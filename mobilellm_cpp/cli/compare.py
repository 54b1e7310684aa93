"""mobilellm compare: size, quality and speed of several models on one text."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import ModelError
from .common import Threads, Type, print_json, print_table, printable, progress_bar
from .perplexity import Chunks, ChunkTokens

if TYPE_CHECKING:
    from ..inspection.comparison import Comparison


def compare(
    models: Annotated[
        list[str],
        typer.Argument(
            help="GGUF files, checkpoint folders or hub ids; each is compared with the first.",
            show_default=False,
        ),
    ],
    text: Annotated[
        Path | None,
        typer.Option(
            exists=True, dir_okay=False, help="A file with text; by default a built-in text."
        ),
    ] = None,
    ctx: ChunkTokens = 512,
    chunks: Chunks = None,
    threads: Threads = 0,
    repeat: Annotated[
        int, typer.Option(min=0, help="How often each speed is measured; 0: not at all.")
    ] = 3,
    type: Type = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    tasks: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,...",
            help="Tasks of lm_eval that the models are held to, in place of a text; here hf:NAME "
            "stands for a model of Hugging Face that transformers runs.",
        ),
    ] = None,
    include: Annotated[
        Path | None,
        typer.Option(exists=True, file_okay=False, help="A folder with lm_eval tasks."),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Questions a task.")] = None,
    picture: Annotated[
        Path | None,
        typer.Option("--plot", help="Draw quality against size into this PNG, SVG or PDF file."),
    ] = None,
) -> None:
    """Compare models by size, quality and speed.

    Quality is measured on one text: perplexity, and how far predictions are from the first model's.
    """
    from ..inspection import comparison
    from ..inspection.perplexity import read_text
    from ..quant.calibration_text import builtin_text
    from .common import resolve

    if len(models) < 2:
        raise ModelError("give at least two models to compare")
    if tasks is not None:
        _compare_tasks(models, tasks.split(","), include, limit, threads, as_json)
        return
    paths = [resolve(model, type) for model in models]
    with progress_bar("chunks") as progress:
        found = comparison.compare_models(
            paths,
            builtin_text() if text is None else read_text(text),
            n_ctx=ctx,
            chunks=chunks,
            n_threads=threads,
            repeat=repeat,
            progress=progress,
        )
    if picture is not None:
        comparison.plot(found, picture)
    if as_json:
        print_json(dataclasses.asdict(found))
    else:
        print_comparison(found)


def _compare_tasks(
    models: list[str],
    tasks: list[str],
    include: Path | None,
    limit: int | None,
    threads: int,
    as_json: bool,
) -> None:
    """The table of models and tasks."""
    from rich.table import Table

    from ..evaluation.tasks import run_tasks

    found = run_tasks(models, tasks, include=include, limit=limit, n_threads=threads)
    if as_json:
        print_json({"results": [dataclasses.asdict(result) for result in found]})
        return
    names = list(dict.fromkeys(result.task for result in found))
    values = {(result.model, result.task): result.value for result in found}
    table = Table(box=None, pad_edge=False)
    table.add_column("", overflow="fold")
    for name in names:
        table.add_column(name, justify="right")
    table.add_column("mean", justify="right")
    for model in models:
        own = [values[model, name] for name in names]
        cells = [f"{value:.1%}" for value in [*own, sum(own) / max(1, len(own))]]
        table.add_row(printable(model), *cells)
    print_table(table)


def print_comparison(found: "Comparison") -> None:
    """The table of a comparison."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("", overflow="fold")
    for title in ("MB", "bits a weight", "perplexity", "KL, nats", "KL 99 %", "top-1"):
        table.add_column(title, justify="right", min_width=max(map(len, title.split())))
    timed = any(file.decode for file in found.files)
    for title in ("decode/s", "prefill/s") if timed else ():
        table.add_column(title, justify="right", min_width=len(title))
    for i, file in enumerate(found.files):
        row = [printable(Path(file.path).name), f"{file.size / 1e6:.1f}"]
        row += [f"{file.bits_per_weight:.2f}", f"{file.perplexity:.3f}"]
        row += ["", "", ""]
        if i > 0:
            row[-3:] = [f"{file.kl_mean:.4f}", f"{file.kl_99:.3f}", f"{file.top_1:.1%}"]
        if timed:
            row += [f"{file.decode or 0:.0f}", f"{file.prefill or 0:.0f}"]
        table.add_row(*row)
    print_table(table)
    print(f"{found.tokens} tokens in {found.chunks} chunks of {found.n_ctx}", end="")
    print(f", {found.threads} threads" if timed else "")
