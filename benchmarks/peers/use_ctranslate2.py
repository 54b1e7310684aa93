"""CTranslate2: int8, the least that it has for this processor; its loop makes the tokens itself."""

import subprocess
import sys
from pathlib import Path
from typing import Any


def convert(checkpoint: Path, out: Path) -> None:
    program = Path(sys.executable).with_name("ct2-transformers-converter")
    options = ["--quantization", "int8", "--output_dir", out]
    subprocess.run([program, "--model", checkpoint, *options], check=True)


class Session:
    def __init__(self, path: Path, threads: int) -> None:
        import ctranslate2

        self._engine = ctranslate2.Generator(
            str(path), device="cpu", compute_type="int8", intra_threads=threads, inter_threads=1
        )
        self._made: Any = None

    def prefill(self, tokens: list[int]) -> None:
        words = [f"w{token}" for token in tokens]
        self._made = self._engine.generate_tokens(
            words, max_length=400, end_token=[], disable_unk=True
        )
        next(self._made)

    def step(self, token: int) -> None:
        next(self._made)
