"""What is left of decoding when two processes want the same cores.

    .venv/bin/python benchmarks/two_processes.py model.gguf --threads 2

Decodes alone, then in two processes at a time, with all threads and with one each, in turn for some
rounds. Prints tokens/s, what each of the two keeps of half the speed alone, and of the speed with
one thread each. Threads that wait at a barrier while the other process has their core would make
both far less than 1; two models in the place of one in a shared cache lower only the first.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys

LOOP = """
import ctypes, json, sys, time
path, threads, seconds = json.loads(sys.argv[1])
from mobilellm_cpp import MobileLLM
from mobilellm_cpp.engine.library import llama_cpp
llm = MobileLLM(path, n_threads=threads, n_ctx=2048)
llm.eval(range(5, 69))
one = (llama_cpp.llama_token * 1)(7)
memory = llama_cpp.llama_get_memory(llm.ctx)
print("ready", flush=True)
sys.stdin.readline()
made, start = 0, time.perf_counter()
while time.perf_counter() - start < seconds:
    if made % 512 == 511:
        llama_cpp.llama_memory_seq_rm(memory, 0, 64, -1)
    llama_cpp.llama_decode(llm.ctx, llama_cpp.llama_batch_get_one(one, 1))
    made += 1
print(made / (time.perf_counter() - start))
"""


def rates(processes: int, arguments: list[object]) -> list[float]:
    """Tokens/s of so many processes that decode at the same time."""
    command = [sys.executable, "-c", LOOP, json.dumps(arguments)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    running = [subprocess.Popen(command, **pipes) for _ in range(processes)]
    for process in running:
        process.stdout.readline()
    for process in running:
        process.stdin.write("\n")
        process.stdin.flush()
    return [float(process.communicate()[0]) for process in running]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=os.path.abspath)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0)
    options = parser.parse_args()
    arguments = [options.model, options.threads, options.seconds]
    of_half, of_singles = [], []
    for _ in range(options.rounds):
        (alone,) = rates(1, arguments)
        both = rates(2, arguments)
        singles = rates(2, [options.model, 1, options.seconds])
        of_half += [2 * rate / alone for rate in both]
        of_singles.append(sum(both) / sum(singles))
        print(
            f"alone {alone:.0f}, together {both[0]:.0f} and {both[1]:.0f}, "
            f"one thread each {singles[0]:.0f} and {singles[1]:.0f}",
            file=sys.stderr,
        )
    for name, kept in (("half the speed", of_half), ("one thread each", of_singles)):
        print(f"of {name} {statistics.median(kept):.2f} ({min(kept):.2f}–{max(kept):.2f})")


if __name__ == "__main__":
    main()
