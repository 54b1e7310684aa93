"""OpenVINO: int4 in groups of 32, the embedding too, as optimum-intel makes it; the KV cache is its
default one."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np


def convert(checkpoint: Path, out: Path) -> None:
    program = Path(sys.executable).with_name("optimum-cli")
    options = ["--task", "text-generation-with-past", "--weight-format", "int4", "--sym"]
    options += ["--group-size", "32", "--ratio", "1.0", "--disable-convert-tokenizer"]
    subprocess.run(
        [program, "export", "openvino", "--model", checkpoint, *options, out], check=True
    )


class Session:
    def __init__(self, path: Path, threads: int) -> None:
        import openvino

        options = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
        model = openvino.Core().compile_model(path / "openvino_model.xml", "CPU", options)
        self._request = model.create_infer_request()
        self._n = 0

    def prefill(self, tokens: list[int]) -> None:
        self._request.reset_state()
        self._n = 0
        self._run(tokens)

    def step(self, token: int) -> None:
        self._run([token])

    def _run(self, tokens: list[int]) -> None:
        end = self._n + len(tokens)
        inputs: dict[str, Any] = {
            "input_ids": np.array([tokens], np.int64),
            "attention_mask": np.ones((1, end), np.int64),
            "position_ids": np.arange(self._n, end, dtype=np.int64)[None],
            "beam_idx": np.zeros(1, np.int32),
        }
        self._request.infer(inputs)
        self._n = end
