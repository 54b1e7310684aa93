"""ONNX Runtime GenAI: int4 in blocks of 32 with int8 activations, by its own model builder."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any


def convert(checkpoint: Path, out: Path) -> None:
    options = ["-p", "int4", "-e", "cpu", "-c", out.with_suffix(".cache")]
    options += ["--extra_options", "int4_accuracy_level=4", "int4_block_size=32"]
    builder = [sys.executable, "-m", "onnxruntime_genai.models.builder"]
    subprocess.run([*builder, "-i", checkpoint, "-o", out, *options], check=True)


class Session:
    def __init__(self, path: Path, threads: int) -> None:
        import onnxruntime_genai as genai

        config = genai.Config(str(path))
        options = {"intra_op_num_threads": threads}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
        self._genai, self._model = genai, genai.Model(config)
        self._generator: Any = None

    def prefill(self, tokens: list[int]) -> None:
        settings = self._genai.GeneratorParams(self._model)
        settings.set_search_options(max_length=512, do_sample=False)
        self._generator = self._genai.Generator(self._model, settings)
        self._generator.append_tokens(tokens)

    def step(self, token: int) -> None:
        self._generator.append_tokens([token])
