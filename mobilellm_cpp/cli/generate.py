"""mobilellm generate: continue a text."""

import sys
import time
from typing import Annotated

import typer

from .common import Context, Model, Seed, Temperature, Threads, Type


def generate(
    model: Model,
    prompt: Annotated[
        str | None,
        typer.Option("-p", "--prompt", help="The text to continue; without it, stdin."),
    ] = None,
    n: Annotated[int, typer.Option("-n", "--tokens", min=1, help="Tokens to make at most.")] = 128,
    temperature: Temperature = 0.8,
    seed: Seed = None,
    type: Type = None,
    ctx: Context = 0,
    threads: Threads = 0,
) -> None:
    """Continue a text; the continuation goes to stdout."""
    from .common import load

    if prompt is None:
        if sys.stdin.isatty():
            raise typer.BadParameter("give the text to continue with -p, or on stdin")
        prompt = sys.stdin.read()
    llm = load(model, type, n_ctx=ctx, n_threads=threads)
    start = time.perf_counter()
    pieces = llm.stream(prompt, max_tokens=n, temperature=temperature, seed=seed)
    for piece in pieces:
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")
    seconds = time.perf_counter() - start
    total = pieces.usage["total_tokens"]
    print(f"{total} tokens, prompt included, in {seconds:.2f} s", file=sys.stderr)
