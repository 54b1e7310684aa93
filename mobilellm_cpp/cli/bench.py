"""mobilellm bench: how fast a model runs here."""

import dataclasses
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from .common import Cache, Model, Type, print_json, print_table

if TYPE_CHECKING:
    from ..inspection.benchmark import Report, Spread


def bench(
    model: Model,
    vs: Annotated[
        str | None,
        typer.Option(
            "--vs", metavar="MODEL", help="A second model to measure in turn with the first."
        ),
    ] = None,
    threads: Annotated[
        list[int] | None,
        typer.Option(
            "--threads",
            "-t",
            min=1,
            max=512,
            help="The number of threads; may be repeated. [default: physical cores]",
        ),
    ] = None,
    repeat: Annotated[int, typer.Option(min=1, help="How often each figure is measured.")] = 5,
    type: Type = None,
    cache_type: Cache = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Measure the speed, start and memory of a model.

    Also shows the speed that memory bandwidth would allow at most.
    """
    from .common import resolve

    paths = [resolve(name, type) for name in (model, vs) if name is not None]
    from ..engine.threads import default_threads
    from ..inspection.benchmark import benchmark

    def say(what: str) -> None:
        print(f"{what} ...", file=sys.stderr)

    counts = threads or [default_threads()]
    report = benchmark(paths, counts, repeat=repeat, cache_type=cache_type, progress=say)
    if as_json:
        print_json(dataclasses.asdict(report))
    else:
        _print(report)


def _print(report: "Report") -> None:
    from rich.markup import escape
    from rich.table import Table

    from ..inspection.benchmark import row_name

    letters = "AB" if len(report.models) == 2 else " "
    print(f"{report.cpu}, mobilellm-cpp {report.version}, {report.date}")
    print(f"medians of {report.repeat} measurements, ± the one farthest from it")
    for letter, m in zip(letters, report.models, strict=True):
        start = _text(m.first_token_seconds, 2).replace(" ±", " s ±")
        print(f"{letter} {m.path}".strip())
        print(f"  first token {start} after the program starts, prompt of {m.prompt_tokens} tokens")
        print(f"  peak memory {m.peak_memory / 2**20:.0f} MiB")
        print(f"  a decoded token reads {m.bytes_per_token / 2**20:.1f} MiB of weights")
    if report.streaming:
        print(f"weights are prefetched by {report.streaming}")
    table = Table(box=None, pad_edge=False)
    table.add_column("threads", justify="right")
    table.add_column("phase")
    for letter in letters:
        table.add_column(f"{letter} tokens/s".strip(), justify="right")
        table.add_column("of limit", justify="right")
    if len(report.models) == 2:
        table.add_column("A / B", justify="right")
    for row in report.rows:
        cells = [str(row.threads), row_name(row.phase, row.tokens)]
        for rate, share in zip(row.rates, row.of_limit, strict=True):
            cells += [_text(rate, 0), "" if share is None else f"{share:.2f}"]
        if len(report.models) == 2:
            cells.append(_text(row.ratio, 2))
        table.add_row(*map(escape, cells))
    print_table(table)
    for limit in report.limits:
        shares = ", ".join("unknown" if s is None else f"{s:.0%}" for s in limit.head_share)
        print(
            f"{limit.threads} thread{'s' * (limit.threads > 1)}: "
            f"memory is read at {limit.bandwidth / 1e9:.1f} GB/s; "
            f"the output head is {shares} of a decoded token"
        )
    for sentence in report.skipped:
        print(sentence, file=sys.stderr)


def _text(value: "Spread | None", digits: int) -> str:
    if value is None:
        return "-"
    farthest = max(value.high - value.median, value.median - value.low) / value.median
    return f"{value.median:.{digits}f} ±{farthest:.0%}"
