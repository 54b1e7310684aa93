"""mobilellm embed: vectors of texts, as numbers or as a table of how alike the texts are."""

import contextlib
import io
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ..errors import ModelError
from ..texts import read_text
from .common import Context, Model, Threads, Type, print_json, printable

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Vectors = npt.NDArray[np.float32]

POOLING = {"mean": 1, "first": 2, "last": 3}
AT_ONCE = 1024  # texts of a call
MAX_TABLE = 50  # rows that a person would read


def embed(
    model: Model,
    files: Annotated[
        list[str] | None,
        typer.Argument(help="Files, each with one text; by default the lines of stdin."),
    ] = None,
    lines: Annotated[
        bool, typer.Option("--lines", help="Take each line of the files as a text of its own.")
    ] = False,
    out: Annotated[
        str | None,
        typer.Option(
            "-o", "--out", metavar="FILE", help="Write the vectors to a .npy file; - is stdout."
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object in the format of OpenAI's API.")
    ] = False,
    pooling: Annotated[
        Literal["mean", "first", "last"],
        typer.Option(
            help="Which tokens of a text make its vector: mean (all), the first or the last."
        ),
    ] = "mean",
    raw: Annotated[
        bool, typer.Option("--raw", help="Do not scale the vectors to length 1.")
    ] = False,
    truncate: Annotated[
        bool, typer.Option("--truncate", help="Cut off what does not fit into the context.")
    ] = False,
    type: Type = None,
    ctx: Context = 0,
    threads: Threads = 0,
) -> None:
    """Turn texts into vectors, or show how similar texts are.

    Vectors go to a .npy file or are printed as JSON. Without either, a table has the cosine of each
    pair of them.
    """
    if out is not None and as_json:
        raise typer.BadParameter("choose one of --out and --json")
    names, texts = _texts(files or [], lines)
    if not texts:
        raise ModelError("there is no text to embed")
    if out is None and not as_json and len(texts) > MAX_TABLE:
        raise ModelError(
            f"a table of {len(texts)} texts is too large to read: use --out FILE.npy or --json"
        )
    from .common import load

    llm = load(model, type, n_ctx=ctx, n_threads=threads, pooling_type=POOLING[pooling])
    import numpy as np

    parts = []
    for first in range(0, len(texts), AT_ONCE):
        try:
            some = texts[first : first + AT_ONCE]
            parts.append(llm.embeddings(some, normalize=not raw, truncate=truncate))
        except ModelError as error:
            raise _named(error, names[first:]) from None
    vectors = np.concatenate(parts)
    if out is not None:
        _save(vectors, out)
    elif as_json:
        print_json(_as_openai(model, vectors))
    else:
        _print_table(names, texts, vectors)


def _texts(files: list[str], lines: bool) -> tuple[list[str], list[str]]:
    """Names and texts."""
    found: list[tuple[str, str]] = []
    for file in files or ["-"]:
        text = sys.stdin.read() if file == "-" else read_text(file)
        if lines or not files:
            for number, line in enumerate(text.splitlines(), 1):
                found.append((f"line {number}" if file == "-" else f"{file}:{number}", line))
        else:
            found.append((file, text))
    return [name for name, _ in found], [text for _, text in found]


def _named(error: ModelError, names: list[str]) -> ModelError:
    """An error of embeddings with the name of the text in the place of its number."""
    what, number, rest = (*str(error).split(" ", 2), "", "")[:3]
    if what != "text" or not number.isdecimal():
        return error
    return ModelError(f"{names[int(number)]} {rest}; --truncate cuts off the rest")


def _save(vectors: "Vectors", out: str) -> None:
    import numpy as np

    if out == "-":
        whole = io.BytesIO()  # numpy asks real files for their position, which a pipe has not
        np.save(whole, vectors)
        sys.stdout.buffer.write(whole.getbuffer())
        return
    path = Path(out)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            np.save(file, vectors)
        os.replace(temporary, path)
    except OSError as error:
        raise ModelError(f"{out}: {error.strerror}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    print(f"{out}: {len(vectors)} vectors of {vectors.shape[1]} numbers", file=sys.stderr)


def _as_openai(model: str, vectors: "Vectors") -> dict[str, Any]:
    return {
        "object": "list",
        "model": Path(model).stem,
        "data": [
            {"object": "embedding", "index": index, "embedding": vector.tolist()}
            for index, vector in enumerate(vectors)
        ],
    }


def _print_table(names: list[str], texts: list[str], vectors: "Vectors") -> None:
    import numpy as np

    unit = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    width = len(str(len(texts)))
    numbers = [f"{number:{width}}" for number in range(1, len(texts) + 1)]
    print(" " * width, *(f"{number:>5}" for number in numbers))
    for number, name, text, row in zip(numbers, names, texts, unit @ unit.T, strict=True):
        shown = text if name.startswith("line ") else name
        shown = shown if len(shown) <= 40 else f"{shown[:39]}…"
        print(number, *(f"{cosine:5.2f}" for cosine in row), "", printable(shown))
