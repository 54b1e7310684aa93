"""mobilellm convert: a checkpoint becomes a GGUF file."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from ..errors import ModelError
from ..quant.types import WeightType
from .common import (
    ChatTemplate,
    Revision,
    Schedule,
    Settings,
    complain,
    parse_settings,
    progress_bar,
)
from .verify import failure, print_verification


def convert(
    source: Annotated[str, typer.Argument(help="A checkpoint folder or a hub id.")],
    out: Annotated[
        Path | None,
        typer.Option("-o", "--out", help="The file to write; by default NAME-TYPE.gguf here."),
    ] = None,
    type: Annotated[
        WeightType,
        typer.Option(
            help="Type of the weights; exact keeps the 1 to 4 bits of ParetoQ and int4 checkpoints."
        ),
    ] = "f16",
    schedule: Schedule = None,
    settings: Settings = None,
    portable: Annotated[
        bool, typer.Option("--portable", help="Write a file for stock, unpatched llama.cpp.")
    ] = False,
    chat_template: ChatTemplate = None,
    revision: Revision = None,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify",
            help="Compare the file with the checkpoint, as `mobilellm verify` does; exit code 1 if "
            "they differ. The file stays.",
        ),
    ] = False,
) -> None:
    """Convert a MobileLLM checkpoint to a GGUF file."""
    from ..convert import convert_checkpoint

    if verify:
        from ..inspection.verification import verify as compare  # says now if torch is missing
    with progress_bar() as progress:
        report = convert_checkpoint(
            source,
            out,
            type=type,
            schedule=schedule,
            settings=parse_settings(settings),
            portable=portable,
            chat_template=chat_template,
            revision=revision,
            progress=progress,
        )
    for note in report.notes:
        print(f"note: {note}", file=sys.stderr)
    print(
        f"{report.path}: {report.size_bytes / 2**20:.1f} MiB, {report.bits_per_weight:.2f} bits a "
        f"weight, {report.n_stored} blocks stored, {report.n_executed} layers executed"
    )
    if lattice := report.lattice:
        different = f"{lattice.n_different:,} ({lattice.n_different / lattice.n_weights:.1%})"
        print(
            f"{lattice.n_weights:,} weights are on a lattice, "
            + (
                f"{different} differ from the checkpoint's by up to {lattice.deviation:.2%}"
                if lattice.n_different
                else "all exactly the checkpoint's"
            )
        )
    if verify:
        found = compare(
            report.path,
            source,
            schedule=schedule,
            settings=parse_settings(settings),
            chat_template=chat_template,
            revision=revision,
        )
        print_verification(found)
        if not found.ok:
            complain(ModelError(f"{failure(found)}; the file is kept"))
            raise typer.Exit(1)
