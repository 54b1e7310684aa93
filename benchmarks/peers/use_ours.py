"""Ours: Q4_0, whose embedding is Q8_0. The checkpoint has the same shape, in MobileLLM's form."""

import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def convert(checkpoint: Path, out: Path) -> None:
    sys.path.insert(0, str(ROOT / "tests"))
    from checkpoints import PUBLISHED, make_checkpoint

    from mobilellm_cpp import convert_checkpoint

    shape = checkpoint.name.split("-")[0]
    with tempfile.TemporaryDirectory() as folder:
        source = make_checkpoint(folder, **PUBLISHED[shape], dtype="f16")
        convert_checkpoint(source, out, type="q4_0")


class Session:
    def __init__(self, path: Path, threads: int) -> None:
        from mobilellm_cpp import MobileLLM

        self._llm = MobileLLM(path, n_ctx=512, n_threads=threads)

    def prefill(self, tokens: list[int]) -> None:
        self._llm.reset()
        self._llm.eval(tokens)

    def step(self, token: int) -> None:
        self._llm.eval([token])
