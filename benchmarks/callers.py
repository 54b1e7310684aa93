"""What many callers of one model get, against a loop in C that decodes as many in a batch.

    .venv/bin/python benchmarks/callers.py --type q4_0 --callers 1 8

Threads call MobileLLM.stream at the same time, each with a prompt of its own; the loop is
benchmarks/loop.cpp over the same library. In turn for some rounds; prints the tokens/s of all
callers together, the loop's, and the ratio.
"""

import argparse
import statistics
import tempfile
from pathlib import Path

from builds import Bench, output, python

STREAMS = """
import json, sys, threading, time
path, threads, callers, n = json.loads(sys.argv[1])
from mobilellm_cpp import MobileLLM
llm = MobileLLM(path, n_threads=threads, n_ctx=2048)
start = threading.Barrier(callers + 1)
made = [0] * callers
def call(i):
    stream = llm.stream(f"{i}: " + "x" * 13, max_tokens=n + 1, temperature=0.0)
    next(stream)
    start.wait()
    for _ in stream:
        pass
    made[i] = stream.usage["completion_tokens"] - 1
threads = [threading.Thread(target=call, args=(i,)) for i in range(callers)]
[thread.start() for thread in threads]
start.wait()
began = time.perf_counter()
[thread.join() for thread in threads]
print(sum(made) / (time.perf_counter() - began))
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", default="125M")
    parser.add_argument("--type", default="q4_0")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--callers", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=100)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), options.shape, options.rounds)
        model = bench.model("base", options.type)
        for n in options.callers:
            loop = [str(bench.ours.loop), str(model), str(options.threads), "batch", str(n)]

            def work(n: int = n, loop: list[str] = loop) -> dict[str, float]:
                arguments = [str(model), options.threads, n, options.tokens]
                return {
                    "streams": python(STREAMS, arguments),
                    "loop": float(output([*loop, str(options.tokens)])),
                }

            found = bench.repeat(f"{n} callers", work)
            shares = [a / b for a, b in zip(found["streams"], found["loop"], strict=True)]
            streams, bare = (statistics.median(found[name]) for name in ("streams", "loop"))
            print(
                f"{n} callers, {options.type}, {options.threads} threads: {streams:.0f} : "
                f"{bare:.0f} tokens/s, {statistics.median(shares):.2f} "
                f"({min(shares):.2f}-{max(shares):.2f})"
            )


if __name__ == "__main__":
    main()
