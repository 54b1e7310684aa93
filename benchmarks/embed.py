"""Embeddings of short lines: all in one call against a call for each.

    .venv/bin/python benchmarks/embed.py model.gguf --lines 128 --words 8

In turn for some rounds; prints lines/s of both, medians, and the median of their ratios.
"""

import argparse
import random
import statistics
import time

from mobilellm_cpp import MobileLLM


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--lines", type=int, default=128)
    parser.add_argument("--words", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    chosen = parser.parse_args()
    draw = random.Random(0)
    words = "the quick brown fox jumps over a lazy dog and asks who bakes the bread here".split()  # noqa: SIM905
    lines = [" ".join(draw.choices(words, k=chosen.words)) for _ in range(chosen.lines)]
    llm = MobileLLM(chosen.model, n_threads=chosen.threads)
    llm.embeddings(lines[:4])
    together, alone = [], []
    for _ in range(chosen.rounds):
        start = time.perf_counter()
        llm.embeddings(lines)
        middle = time.perf_counter()
        for line in lines:
            llm.embeddings([line])
        together.append(len(lines) / (middle - start))
        alone.append(len(lines) / (time.perf_counter() - middle))
    ratios = [a / b for a, b in zip(together, alone, strict=True)]
    tokens = sum(len(llm.tokenize(line.encode())) for line in lines) / len(lines)
    print(
        f"{tokens:.1f} tokens a line, lines/s: together {statistics.median(together):.0f}, "
        f"one by one {statistics.median(alone):.0f}, ratio {statistics.median(ratios):.2f} "
        f"({min(ratios):.2f} to {max(ratios):.2f})"
    )


if __name__ == "__main__":
    main()
