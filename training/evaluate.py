"""Measure how many questions a demo model answers with their intent's own answer.

    python training/evaluate.py [MODEL ...] [--file FILE] [--torch] [--json]

MODEL is a GGUF file or a checkpoint folder (default: the shipped checkpoint). Promises: each
question of FILE (default heldout.jsonl) is asked greedily after the dialogue that stands before
it; it counts only when the reply equals the intent's answer, white space aside. The figure goes to
stdout with every failure below it; the exit code is 0 whatever the figure is. Models run in the
engine; with --torch a checkpoint folder runs in the PyTorch model of train.py instead.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

from world import Item, read_items, read_world

HERE = Path(__file__).parent
DEMO = HERE.parent / "mobilellm_cpp" / "demo"

Reply = Callable[[list[dict[str, str]]], str]


def open_torch(folder: Path) -> Reply:
    """Return the PyTorch model of a checkpoint folder as a function from messages to reply."""
    from model import load, reply

    model, sp = load(folder)
    return lambda messages: reply(model, sp, messages)


def open_engine(path: Path) -> Reply:
    """Return the engine on a GGUF file or a folder as a function from messages to reply."""
    from mobilellm_cpp import MobileLLM

    if path.is_dir():
        llm = MobileLLM.from_checkpoint(path, type="f16", n_threads=1)
    else:
        llm = MobileLLM(path, n_threads=1)
    return lambda messages: llm.chat(messages, temperature=0.0, max_tokens=80)


def measure(reply: Reply, items: list[Item], answers: dict[str, str]) -> list[dict[str, str]]:
    """Ask every item; return the failures with what was expected and what was said."""
    failures = []
    for item in items:
        said = " ".join(reply(item.messages).split())
        if said != answers[item.intent]:
            failures.append(
                {
                    "intent": item.intent,
                    "wording": item.wording,
                    "expected": answers[item.intent],
                    "said": said,
                }
            )
    return failures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", type=Path, default=[DEMO])
    parser.add_argument("--file", type=Path, default=HERE / "heldout.jsonl")
    parser.add_argument("--torch", action="store_true", help="run a folder in PyTorch")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    answers = {intent.name: intent.answer for intent in read_world()}
    items = read_items(options.file)
    rows = []
    for path in options.models:
        reply = (open_torch if options.torch else open_engine)(path)
        start = time.time()
        failures = measure(reply, items, answers)
        rows.append(
            {
                "model": path.name,
                "file": options.file.name,
                "right": len(items) - len(failures),
                "items": len(items),
                "seconds": round(time.time() - start, 1),
                "failures": failures,
            }
        )
        if not options.json:
            right = len(items) - len(failures)
            print(f"{path.name}: {options.file.stem}: {right}/{len(items)}")
            for row in failures:
                print(f"  {row['intent']}: {row['wording']}\n    said: {row['said']}")
    if options.json:
        print(json.dumps({"results": rows}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
