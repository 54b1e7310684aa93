"""mobilellm perplexity: how well a model predicts a text."""

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from .common import Model, Threads, Type, print_json, progress_bar

TextFile = Annotated[
    Path, typer.Argument(help="A file with text.", exists=True, dir_okay=False, show_default=False)
]
ChunkTokens = Annotated[
    int, typer.Option("--ctx", min=4, help="The number of tokens in a chunk of the text.")
]
Chunks = Annotated[
    int | None,
    typer.Option(
        min=1, help="How many chunks of the text to use; by default all.", show_default=False
    ),
]


def perplexity(
    model: Model,
    text: TextFile,
    ctx: ChunkTokens = 512,
    chunks: Chunks = None,
    threads: Threads = 0,
    type: Type = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Measure how well a model predicts a text.

    The figure is that of llama.cpp's llama-perplexity.
    """
    from ..inspection import perplexity as measure
    from .common import resolve

    path = resolve(model, type)
    with progress_bar("chunks") as progress:
        found = measure.perplexity(
            path,
            measure.read_text(text),
            n_ctx=ctx,
            chunks=chunks,
            n_threads=threads,
            progress=progress,
        )
    if as_json:
        print_json(dataclasses.asdict(found))
    else:
        print(
            f"perplexity {found.perplexity:.4f} ± {found.error:.4f}, {found.tokens} tokens in "
            f"{found.chunks} chunks of {found.n_ctx}"
        )
