"""What comes of using hostile GGUF files, in a process of their own.

The files of a test are loaded and used in one process, so that a crash is seen and named; what
loads is used for tokenizing, generating and chatting, too. With $MOBILELLM_USE_FILE (`make
sanitize`) that process is the C++ program of tests/native under sanitizers.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

from fuzz.run import OURS

SANITIZED = os.environ.get("MOBILELLM_USE_FILE")

USE = """
import json, sys
from mobilellm_cpp import MobileLLM, MobileLLMError

def use(path):
    llm = MobileLLM(path, n_ctx=64, n_threads=1)
    for text in ["hello", "\\u00e9\\t\\U0001f600 <s>"]:
        list(llm.stream(text, max_tokens=3, temperature=0.0))
        list(llm.stream(text, max_tokens=3, temperature=0.8, seed=1))
    llm.chat([{"role": "user", "content": "hi"}], max_tokens=3)
    llm.embeddings(["hello"])
    llm.logits([1] * 60)

for path in sys.argv[1:]:
    try:
        use(path)
        outcome = "runs"
    except MobileLLMError as error:
        outcome = str(error)
    print(json.dumps([path, outcome]), flush=True)
"""


def outcomes(paths: list[Path]) -> dict[str, str]:
    """File name to what came of using it: `runs`, or the sentence of the error. Fails with the
    name of the file on which the process crashed or hung."""
    command = [SANITIZED] if SANITIZED else [sys.executable, "-c", USE]
    command += map(str, paths)
    # what upstream leaves behind when a load fails is not our concern
    env = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1"}
    done = subprocess.run(
        command, capture_output=True, text=True, cwd="/", timeout=20 * len(paths), env=env
    )
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    culprit = paths[len(lines)].name if len(lines) < len(paths) else None
    assert done.returncode == 0, f"{culprit}: exit {done.returncode}\n{done.stderr[-1500:]}"
    undefined = [line for line in done.stderr.splitlines() if ": runtime error: " in line]
    assert not [line for line in undefined if any(folder in line for folder in OURS)]
    return {Path(path).name: outcome for path, outcome in lines}


def assert_outcomes(wanted: dict[Path, str | None]) -> None:
    """None: any sentence, or it runs; otherwise one of the parts between | is in the outcome."""
    got = outcomes(list(wanted))
    if SANITIZED:
        return  # a program of its own words, here to crash or not to
    wrong = {
        path.name: (got[path.name], part)
        for path, part in wanted.items()
        if part is not None and not any(p in got[path.name] for p in part.split("|"))
    }
    assert not wrong
