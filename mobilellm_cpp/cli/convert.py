"""mobilellm convert: a checkpoint, or an adapter for one, becomes a GGUF file."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import CheckpointError
from ..quant.weight_type import DEFAULT_TYPE, RECIPE_NAMES, FileType
from .common import (
    Base,
    ChatTemplate,
    Head,
    Revision,
    Schedule,
    Settings,
    check_head,
    checkpoint_name,
    parse_settings,
    progress_bar,
    tell_type,
)
from .verify import finish

if TYPE_CHECKING:
    from ..convert import Adapter


KEPT = "; the file is kept"


def convert(
    source: Annotated[
        str, typer.Argument(help="A checkpoint or a LoRA adapter: a folder or a hub id.")
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--out",
            help="The file to write; by default NAME-TYPE.gguf, for adapters NAME-lora-TYPE.gguf.",
        ),
    ] = None,
    type: Annotated[
        FileType | None,
        typer.Option(
            help=f"Type of the weights; by default {DEFAULT_TYPE}, or f32 for an adapter. "
            "exact keeps the 1 to 4 bits of ParetoQ and int4 checkpoints. tiny, small, balanced "
            "and best are the recipes of `mobilellm quantize`, without calibration.",
            show_default=False,
        ),
    ] = None,
    head: Head = None,
    schedule: Schedule = None,
    settings: Settings = None,
    portable: Annotated[
        bool, typer.Option("--portable", help="Write a file for stock, unpatched llama.cpp.")
    ] = False,
    chat_template: ChatTemplate = None,
    revision: Revision = None,
    base: Base = None,
    merge: Annotated[
        bool, typer.Option("--merge", help="Write the base with the adapter merged into it.")
    ] = False,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify",
            help="Compare the file with the checkpoint, as `mobilellm verify` does. If they "
            "differ, the exit code is 1 and the file is kept.",
        ),
    ] = False,
) -> None:
    """Convert a MobileLLM checkpoint or a LoRA adapter to GGUF."""
    from ..convert import Adapter, open_source
    from ..convert.adapter_conversion import open_base
    from ..quantization.checkpoint import convert_to

    if verify:
        from ..inspection.verification import verify as compare  # says now if torch is missing
    check_head(head, (type or DEFAULT_TYPE) in RECIPE_NAMES)
    fields = parse_settings(settings)
    checkpoint = open_source(checkpoint_name(source), revision, fields)
    adapter = None
    if isinstance(checkpoint, Adapter):
        adapter = checkpoint
        if not merge:
            if head is not None:
                raise CheckpointError(
                    f"{source} is an adapter without a head: --head needs --merge"
                )
            _convert_adapter(adapter, out, base, type, schedule, fields, portable, verify)
            return
        checkpoint = open_base(adapter, base, fields)
    elif base or merge:
        raise CheckpointError(f"{source} is not an adapter, but --base and --merge need one")
    with progress_bar() as progress:
        report = convert_to(
            checkpoint,
            out,
            type or DEFAULT_TYPE,
            head=head,
            schedule=schedule,
            portable=portable,
            chat_template=chat_template,
            adapter=adapter,
            progress=progress,
        )
    if type is None:
        tell_type(source)
    elif type in RECIPE_NAMES:
        print(
            "rounding is not calibrated: `mobilellm quantize` does that, in minutes",
            file=sys.stderr,
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
            checkpoint,
            schedule=schedule,
            chat_template=chat_template,
            adapter=adapter,
        )
        finish(found, more=KEPT)


def _convert_adapter(
    adapter: "Adapter",
    out: Path | None,
    base: str | None,
    type: FileType | None,
    schedule: str | None,
    settings: dict[str, Any],
    portable: bool,
    verify: bool,
) -> None:
    from ..convert import convert_adapter

    if type in RECIPE_NAMES:
        raise CheckpointError(
            f"an adapter file cannot have the type {type}; --merge writes a whole model"
        )
    report = convert_adapter(
        adapter,
        out,
        base=base,
        type=type or "f32",
        schedule=schedule,
        settings=settings,
        portable=portable,
    )
    low, high = report.ranks
    print(
        f"{report.path}: {report.size_bytes / 2**20:.1f} MiB, {report.n_modules} matrices of rank "
        f"{low if low == high else f'{low} to {high}'}, for {report.architecture} files"
    )
    if verify:
        from ..inspection.adapter_check import verify_adapter

        found = verify_adapter(
            report.path, adapter, base=base, schedule=schedule, settings=settings
        )
        finish(found, more=KEPT)
