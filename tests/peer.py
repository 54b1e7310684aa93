"""Comparing with a peer: greedy tokens of any libllama, the tensors of two files."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from gguf import GGUFReader

SCRIPT = """
import json, sys
import llama_cpp
path, prompts, n, flash = json.loads(sys.argv[1])
threads = {"n_threads": 1, "n_threads_batch": 1}
llm = llama_cpp.Llama(path, n_ctx=256, flash_attn=flash, verbose=False, **threads)
answers = []
for prompt in prompts:
    llm.reset()
    llm.eval(prompt)
    answer = []
    for _ in range(n):
        answer.append(llm.sample(temp=0.0))
        llm.eval(answer[-1:])
    answers.append(answer)
print(json.dumps(answers))
"""


def run_on(library: Path, script: str, arguments: object) -> subprocess.CompletedProcess[str]:
    """Runs a script with plain llama-cpp-python over the library folder."""
    environment = {**os.environ, "LLAMA_CPP_LIB_PATH": str(library)}
    command = [sys.executable, "-c", script, json.dumps(arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, cwd="/")


def greedy(
    library: Path, model: Path, prompts: list[list[int]], n: int = 48, flash: bool = False
) -> list[list[int]]:
    """The n likeliest tokens after each prompt."""
    done = run_on(library, SCRIPT, [str(model), prompts, n, flash])
    assert done.returncode == 0, done.stderr[-2000:]
    answers: list[list[int]] = json.loads(done.stdout)
    return answers


def assert_same_tensors(ours: GGUFReader, theirs: GGUFReader) -> None:
    """The same names, types, shapes and bytes."""
    expected = {tensor.name: tensor for tensor in theirs.tensors}
    assert {tensor.name for tensor in ours.tensors} == set(expected)
    for tensor in ours.tensors:
        twin = expected[tensor.name]
        assert tensor.tensor_type == twin.tensor_type, tensor.name
        assert tensor.shape.tolist() == twin.shape.tolist(), tensor.name
        assert np.array_equal(tensor.data.view(np.uint8), twin.data.view(np.uint8)), tensor.name
