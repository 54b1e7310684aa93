"""llama-perplexity of the stock build, and numbers in what it says."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path


def stock_perplexity(
    stock_lib: Path, model: Path, text: Path, context: int, chunks: int, *more: object
) -> str:
    """All that llama-perplexity prints. On a busy machine it sometimes ends before its log is
    written: then it runs again."""
    command = [stock_lib / "llama-perplexity", "-m", model, "-f", text, "-t", 1]
    command += ["-c", context, "-b", context, "--chunks", chunks, *more]
    for _ in range(10):
        done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=120)
        said = done.stdout + done.stderr
        assert done.returncode == 0, said
        if ("Same top p:" if "--kl-divergence" in more else "PPL = ") in said:
            return said
    raise AssertionError(said)


def number(pattern: str, text: str) -> float:
    """The number that a pattern finds."""
    found = re.search(pattern, text)
    assert found, text
    return float(found[1])
