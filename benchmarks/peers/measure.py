"""One engine, in a process of its environment: converts a checkpoint, or measures.

    python measure.py convert ENGINE CHECKPOINT OUT
    python measure.py measure ENGINE MODEL THREADS START    # START: time.monotonic() of the caller

Prints tokens/s of decode and prefill, seconds from START until the logits after a prompt of 64
tokens, and the most memory that the process had until then, as JSON."""

import importlib
import json
import re
import statistics
import sys
import time
from pathlib import Path
from typing import Any

PROMPT, MADE, LONG, TIMES = 64, 64, 256, 3


def main() -> None:
    what, name, *rest = sys.argv[1:]
    engine = importlib.import_module(f"use_{name}")
    if what == "convert":
        engine.convert(Path(rest[0]), Path(rest[1]))
        return
    path, threads, start = Path(rest[0]), int(rest[1]), float(rest[2])
    session = engine.Session(path, threads)
    session.prefill(list(range(5, 5 + PROMPT)))
    first = time.monotonic() - start
    peak = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
    assert peak
    print(
        json.dumps(
            {
                "first": first,
                "memory": int(peak[1]) * 1024 / 1e6,
                "decode": statistics.median(decode(session, 100 + i) for i in range(TIMES)),
                "prefill": statistics.median(prefill(session, 200 + i) for i in range(TIMES)),
            }
        )
    )


def decode(session: Any, first: int) -> float:
    session.prefill(list(range(first, first + PROMPT)))
    session.step(7)
    start = time.perf_counter()
    for token in range(9, 9 + MADE):
        session.step(token)
    return MADE / (time.perf_counter() - start)


def prefill(session: Any, first: int) -> float:
    """Each prompt begins with another token, so that nothing of it is known already."""
    start = time.perf_counter()
    session.prefill(list(range(first, first + LONG)))
    return LONG / (time.perf_counter() - start)


if __name__ == "__main__":
    main()
