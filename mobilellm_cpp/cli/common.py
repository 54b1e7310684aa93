"""What several subcommands share: the MODEL argument, the progress bar and JSON."""

import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from ..quant.weight_type import DEFAULT_COST, DEFAULT_TYPE, CacheType, FileType
from ..saying import note


def _kept_sources(incomplete: str) -> list[str]:
    """What a shell completes MODEL to, besides files: hub ids that were converted before."""
    from ..kept import kept

    ids = {each.source for each in kept() if not Path(each.source).is_absolute()}
    return sorted(each for each in ids if each and each.startswith(incomplete))


Model = Annotated[
    str,
    typer.Argument(
        help="A GGUF file, a checkpoint folder or a hub id.",
        show_default=False,
        autocompletion=_kept_sources,
    ),
]
OptionalModel = Annotated[
    str | None,
    typer.Argument(
        help="A GGUF file, a checkpoint folder or a hub id; by default, or with the name demo, the "
        "demo model.",
        show_default=False,
        autocompletion=_kept_sources,
    ),
]


Type = Annotated[
    FileType | None,
    typer.Option(
        help=f"The type of weights to use, if MODEL is a checkpoint; by default {DEFAULT_TYPE}.",
        show_default=False,
    ),
]
Context = Annotated[
    int,
    typer.Option(
        "--ctx",
        min=0,
        max=1 << 28,
        metavar="TOKENS",
        help="The context in tokens; 0: as the file says.",
    ),
]
Cache = Annotated[
    CacheType | None,
    typer.Option(
        "--cache-type",
        help="The type of the KV cache; by default q8_0 for layer-shared models, else f16.",
        show_default=False,
    ),
]
Threads = Annotated[
    int,
    typer.Option(
        "--threads",
        "-t",
        min=0,
        max=512,
        metavar="NUMBER",
        help="The number of threads; 0: what decodes fastest here.",
    ),
]
Adapters = Annotated[
    list[str] | None,
    typer.Option(
        "--lora",
        metavar="FILE[:SCALE]",
        help="Use a LoRA adapter, a GGUF file that `mobilellm convert` made; may be repeated.",
    ),
]
Mlock = Annotated[
    bool, typer.Option("--mlock", help="Keep the weights in memory: they are never swapped out.")
]
Schedule = Annotated[
    str | None,
    typer.Option(
        help="The order in which blocks run: immediate, repeat-all-over, reverse or 0,0,1,1,…; "
        "by default as config.json says."
    ),
]
ChatTemplate = Annotated[
    str | None,
    typer.Option(
        metavar="NAME|FILE",
        help="The chat template to use: the name of one of the checkpoint's templates, or a file.",
    ),
]
Base = Annotated[
    str | None,
    typer.Option(
        help="The checkpoint that an adapter is for; by default the one that the adapter names.",
        show_default=False,
    ),
]
Head = Annotated[
    str | None,
    typer.Option(
        metavar="TYPE",
        help="Another type for the output head (the embedding, where they are one): q5_0, q4_0, "
        "... It goes with a --type that is no recipe.",
    ),
]
Revision = Annotated[str | None, typer.Option(help="A branch, tag or commit on the hub.")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Set a field of config.json; may be repeated."),
]


def check_head(head: str | None, by_recipe: bool) -> None:
    """Refuses a type for the head beside a recipe."""
    if head is not None and by_recipe:
        raise typer.BadParameter("--head goes with a type: recipes choose the head's, too")


def parse_settings(settings: list[str] | None) -> dict[str, Any]:
    """Fields of config.json from KEY=VALUE; a value that is not JSON is a string."""
    fields: dict[str, Any] = {}
    for setting in settings or []:
        name, equals, value = setting.partition("=")
        if not name or not equals:
            raise typer.BadParameter(
                f"{setting!r} is not of the form KEY=VALUE", param_hint="--set"
            )
        try:
            fields[name] = json.loads(value)
        except (ValueError, RecursionError):
            fields[name] = value
    return fields


def parse_adapters(texts: list[str] | None) -> list[tuple[str, float]]:
    """Files and scales from FILE[:SCALE]."""
    found = []
    for text in texts or []:
        file, _, scale = text.rpartition(":")
        try:
            found.append((file, float(scale)) if file and not Path(text).exists() else (text, 1.0))
        except ValueError:
            found.append((text, 1.0))
    return found


def printable(text: str) -> str:
    """A text with names of strangers in it, fit for a terminal."""
    return "".join(c if c.isprintable() else "\ufffd" for c in text)


def print_json(value: dict[str, Any]) -> None:
    """Prints one JSON object on a line of stdout; what is not a finite number becomes null, since
    JSON has no other word for it."""
    print(json.dumps(_finite(value), ensure_ascii=False, allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def print_table(table: Any) -> None:
    """Prints a table of rich; whole where nobody's window cuts it."""
    from rich.console import Console

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 1000
    table.collapse_padding = console.width < 100
    console.print(table)


def size_text(n: float) -> str:
    """A number of bytes for people."""
    for unit in ("B", "KiB", "MiB"):
        if n < 1024:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1024
    return f"{n:.1f} GiB"


def counted(n: int, what: str) -> str:
    """So many of something."""
    return f"{n} {what}{'s' * (n != 1)}"


@contextmanager
def progress_bar(unit: str | None = None) -> Iterator[Callable[[int, int, str], None]]:
    """A callback that draws a bar on stderr, where that is a terminal: of bytes with their speed,
    or of `unit` with the time left."""
    bar: Any = None

    def update(done: int, total: int, name: str) -> None:
        nonlocal bar
        if bar is None and sys.stderr.isatty():  # rich takes longer to import than a model to load
            bar = _bar(unit)
            bar.start()
        if bar is not None:
            bar.update(bar.task_ids[0], completed=done, total=total, description=name)

    try:
        yield update
    finally:
        if bar is not None:
            bar.stop()


def _bar(unit: str | None) -> Any:
    from rich import progress as rich
    from rich.console import Console

    counted: tuple[rich.ProgressColumn, ...] = (rich.DownloadColumn(), rich.TransferSpeedColumn())
    if unit is not None:
        counted = (rich.MofNCompleteColumn(), rich.TextColumn(unit), rich.TimeRemainingColumn())
    columns = (rich.BarColumn(), *counted, rich.TextColumn("{task.description}"))
    bar = rich.Progress(*columns, console=Console(stderr=True), transient=True)
    bar.add_task("", total=None)
    return bar


def tell_type(source: str) -> None:
    """Says in which type a checkpoint is taken where nobody chose one."""
    note(
        f"{printable(source)} is used as {DEFAULT_TYPE}, {DEFAULT_COST}; "
        "--type chooses another type"
    )


def without_demo(model: str | None) -> str | None:
    """A MODEL argument, None where it means the shipped demo model."""
    return None if model == "demo" and not Path(model).exists() else model


def checkpoint_name(source: str) -> str:
    """The folder or hub id of a checkpoint; demo is the one that comes with the package."""
    from ..cache import DEMO

    return source if without_demo(source) else str(DEMO)


def resolve(model: str | None, type: FileType | None) -> Path:
    """The GGUF file of a MODEL argument, converted with a progress bar if need be."""
    from ..cache import resolve as resolve_model

    model = without_demo(model)
    with progress_bar() as progress:
        path = resolve_model(model, type, progress)
    if model is not None and type is None and path != Path(model):
        tell_type(model)
    return path


def load_ahead(path: Path) -> None:
    """To be called before a command that only runs a model imports the engine: the file is loaded
    meanwhile. Numpy's threads for products of matrices, which nothing here asks for, would keep a
    core busy for 50 ms when they start."""
    from ..engine.ahead import begin

    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    begin(path)


def load(model: str | None, type: FileType | None, **arguments: Any) -> Any:
    """MobileLLM for a MODEL argument."""
    path = resolve(model, type)
    if not arguments.get("use_mlock"):
        load_ahead(path)
    from ..engine.model import MobileLLM

    return MobileLLM(path, **arguments)
