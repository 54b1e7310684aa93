"""ik_llama.cpp's wheel, on our GGUF file, which is a plain Llama."""

import shutil
from pathlib import Path
from typing import Any


def convert(checkpoint: Path, out: Path) -> None:
    shape = checkpoint.name.split("-")[0]
    shutil.copyfile(checkpoint.with_name(f"{shape}-ours"), out)


class Session:
    def __init__(self, path: Path, threads: int) -> None:
        import ik_llama_cpp.llama as ik

        self._ik: Any = ik
        self._llm = ik.IkLlama(str(path), n_ctx=512, n_threads=threads, verbose=False)
        self._n = 0

    def prefill(self, tokens: list[int]) -> None:
        self._llm._context.kv_cache_clear()
        self._n = 0
        self._decode(self._ik.make_batch_range(tokens, pos_start=0, logits_last=True), len(tokens))

    def step(self, token: int) -> None:
        self._decode(self._ik.make_batch_single(token, self._n), 1)

    def _decode(self, batch: Any, n: int) -> None:
        assert self._llm._context.decode(batch) == 0
        self._ik.C.llama_batch_free(batch)
        self._n += n
