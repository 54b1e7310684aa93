"""What drafts from the text itself (`speculative`) gain on text that repeats and cost on text that
does not.

    .venv/bin/python benchmarks/lookup.py --shape 125M 350M
    .venv/bin/python benchmarks/lookup.py --model a.gguf b.gguf

Weights are random, and so are the texts: sampled, with a seed. In "repeats" the same text stands
before the prompt, for the lookup alone, so that it is written once more, as in a quotation; in
"free" nothing does. Each text is written with drafts and without in turn, in one process. Prints
tokens/s with : without, the median ratio (least-largest), and the steps that the tokens took.
"""

import argparse
import statistics
import tempfile
from pathlib import Path

from builds import Bench, python

TEXTS = """
import json, sys, time
path, threads, rounds, n = json.loads(sys.argv[1])
from mobilellm_cpp import MobileLLM
from mobilellm_cpp.engine import sequence
from mobilellm_cpp.engine.prompt_lookup import MOST, PromptLookup

llm = MobileLLM(path, n_threads=threads, n_ctx=2048)
prompt = llm.tokenize(b"Once upon a time there was a small machine that could read and write.")
known = []  # what the lookup sees before the prompt
steps = 0

class Quoting(PromptLookup):
    def draft(self, tokens, *given):
        global steps
        steps += 1
        self._end = 10 ** 6
        return super().draft(known + tokens, *given)

def written(most):
    global steps
    steps = 0
    stream = llm.stream(prompt, max_tokens=n, temperature=0.8, seed=5, speculative=most)
    next(stream)
    start = time.perf_counter()
    for _ in stream:
        pass
    made = stream.usage["completion_tokens"] - 1
    return made / (time.perf_counter() - start), steps / made

text = llm.stream(prompt, max_tokens=n, temperature=0.8, seed=5, speculative=0, logprobs=0)
list(text)
kept = prompt + [each.token for each in text.logprobs]
sequence.PromptLookup = Quoting
found = {}
for name, before in (("repeats", kept), ("free", [])):
    known[:] = before
    written(0), written(MOST)
    found[name] = [(written(MOST), written(0)) for _ in range(rounds)]
print(json.dumps(found))
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", nargs="+", default=["125M", "350M"])
    parser.add_argument("--model", type=Path, nargs="+", default=[], help="GGUF files instead")
    parser.add_argument("--type", default="q4_0")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=200)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        models = {path.stem: path for path in options.model}
        for shape in () if options.model else options.shape:
            bench = Bench(Path(folder), shape, options.rounds)
            for kind in ("base", "shared"):
                models[f"{shape} {kind} {options.type}"] = bench.model(kind, options.type)
        for name, path in models.items():
            given = [str(path), options.threads, options.rounds, options.tokens]
            for text, rounds in python(TEXTS, given).items():
                ratios = [drafted[0] / plain[0] for drafted, plain in rounds]
                sides = [statistics.median(pair[i][0] for pair in rounds) for i in (0, 1)]
                print(
                    f"{name}, {options.threads} threads, {text}: {sides[0]:.0f} : {sides[1]:.0f} "
                    f"tokens/s, {statistics.median(ratios):.2f} ({min(ratios):.2f}-"
                    f"{max(ratios):.2f}), {rounds[0][0][1]:.2f} steps a token",
                    flush=True,
                )


if __name__ == "__main__":
    main()
