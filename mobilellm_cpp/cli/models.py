"""mobilellm models, mobilellm pull: what the cache of converted checkpoints holds."""

import dataclasses
import sys
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import ModelError
from ..quant.weight_type import DEFAULT_TYPE
from .common import (
    Revision,
    Type,
    checkpoint_name,
    counted,
    print_json,
    printable,
    progress_bar,
    size_text,
)

if TYPE_CHECKING:
    from ..kept import Kept

models = typer.Typer(
    help="List, show and remove converted checkpoints.",
    invoke_without_command=True,
    rich_markup_mode=None,
)
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Names = Annotated[
    list[str], typer.Argument(help="Names of checkpoints, their sources, or names of files.")
]


def pull(
    model: Annotated[str, typer.Argument(help="A hub id, or a checkpoint folder.")],
    type: Type = None,
    revision: Revision = None,
) -> None:
    """Fetch and convert a checkpoint ahead of its use.

    Prints the path of the GGUF file.
    """
    from ..cache import cache_folder, converted

    with progress_bar() as progress:
        path = converted(
            checkpoint_name(model), type or DEFAULT_TYPE, revision=revision, progress=progress
        )
    if path.parent != cache_folder():  # a temporary folder, and a warning has said why
        raise ModelError(f"{model} was not kept")
    print(path)


@models.callback()
def list_models(context: typer.Context, as_json: Json = False) -> None:
    """List, show and remove converted checkpoints, which the cache holds."""
    if context.invoked_subcommand is not None:
        return
    from ..cache import cache_folder
    from ..kept import kept

    files = kept()
    if as_json:
        print_json({"folder": str(cache_folder()), "models": [_as_dict(each) for each in files]})
        return
    rows = [
        (
            each.path.stem,
            size_text(each.size),
            _age(each.used),
            (each.source or "?") + ("" if each.current else "  (of another version)"),
        )
        for each in files
    ]
    widths = [max((len(row[column]) for row in rows), default=0) for column in range(3)]
    for name, size, age, source in rows:
        print(
            f"{printable(name):{widths[0]}}  {size:>{widths[1]}}  {age:>{widths[2]}}  "
            f"{printable(source)}"
        )
    old = [each for each in files if not each.current]
    size = size_text(sum(each.size for each in files))
    total = f"{counted(len(files), 'file')}, {size} in {cache_folder()}"
    if old:
        total += f"; `mobilellm models prune` frees {size_text(sum(each.size for each in old))}"
    print(total, file=sys.stderr)


@models.command()
def show(names: Names, as_json: Json = False) -> None:
    """Show where files are, where they came from, and what is in them."""
    from ..inspection.description import describe
    from ..kept import named
    from .inspect import print_description

    files = [each for name in names for each in named(name)]
    if as_json:
        about = [{**_as_dict(each), "about": _described(each)} for each in files]
        print_json({"models": about})
        return
    for number, each in enumerate(files):
        if number:
            print()
        source = (each.source or "?") + ("" if each.current else ", converted by another version")
        age = f"{_age(each.made)} ago, used {_age(each.used)} ago"
        print_description(describe(each.path), {"source": source, "converted": age})


@models.command()
def rm(names: Names) -> None:
    """Remove files from the cache. They are converted again when they are needed."""
    from ..kept import named, remove

    files = {each.path: each for name in names for each in named(name)}
    remove(files.values())
    _removed(list(files.values()))


@models.command()
def prune(
    days: Annotated[
        float, typer.Option(min=0, help="Only files that were not used for so many days.")
    ] = 0.0,
    everything: Annotated[bool, typer.Option("--all", help="Also files of this version.")] = False,
) -> None:
    """Remove files that other versions of mobilellm-cpp converted and this one does not use."""
    from ..kept import DAY, kept, outdated, remove, sweep

    files = outdated(days)
    if everything:
        files = [each for each in kept() if each.used <= time.time() - days * DAY]
    remove(files)
    sweep()
    _removed(files)


def _removed(files: "list[Kept]") -> None:
    for each in files:
        print(each.path.name)
    freed = size_text(sum(each.size for each in files))
    print(f"{counted(len(files), 'file')} removed, {freed} freed", file=sys.stderr)


def _as_dict(each: "Kept") -> dict[str, Any]:
    return {**dataclasses.asdict(each), "path": str(each.path)}


def _described(each: "Kept") -> dict[str, Any]:
    from ..inspection.description import describe

    return dataclasses.asdict(describe(each.path))


def _age(moment: float) -> str:
    seconds = max(0.0, time.time() - moment)
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"
