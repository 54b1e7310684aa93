"""MNN: int4 in blocks of 32, the embedding and the head too, as llmexport makes it."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any


def convert(checkpoint: Path, out: Path) -> None:
    import importlib.util

    # the wheel's program imports its own folder `utils` as if it were at the top
    spec = importlib.util.find_spec("llmexport")
    assert spec is not None and spec.origin is not None
    folder = Path(spec.origin).parent
    options = ["--export", "mnn", "--quant_bit", "4", "--quant_block", "32", "--sym"]
    subprocess.run(
        [sys.executable, folder / "llmexport.py", "--path", checkpoint, *options]
        + ["--dst_path", out],
        env={**os.environ, "PYTHONPATH": str(folder)},
        cwd=out.parent,  # where it leaves its log
        check=True,
    )


class Session:
    def __init__(self, path: Path, threads: int) -> None:
        import MNN.llm

        self._model: Any = MNN.llm.create(str(path / "config.json"))
        self._model.set_config({"thread_num": threads})
        self._model.load()

    def prefill(self, tokens: list[int]) -> None:
        self._model.reset()
        self._model.forward(tokens)

    def step(self, token: int) -> None:
        self._model.forward([token])
