"""LoRA adapters of a loaded model: each file is loaded once, and contexts are switched to any
number of them, each with a scale, without loading the model again."""

import ctypes
import os
from collections.abc import Sequence
from typing import Any

from ..errors import ModelError
from .gguf_file import open_gguf
from .library import guard, llama_cpp

Lora = Sequence[tuple[str | os.PathLike[str], float]]


class Adapters:
    """The adapters that were loaded for one model, `model` being its llama_model. llama.cpp frees
    them together with the model; `free` does it earlier."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._loaded: dict[str, Any] = {}
        self.in_use = False

    def load(self, path: str | os.PathLike[str]) -> Any:
        """The adapter of a file, loaded unless it is already. Raises ModelError with the reason
        when it is not an adapter for this model."""
        name = os.path.realpath(path)
        if name not in self._loaded:
            with open_gguf(path), guard(os.fspath(path)):
                adapter = llama_cpp.llama_adapter_lora_init(self._model, os.fsencode(name))
                if not adapter:
                    raise ValueError("it is not an adapter for this model")
            self._loaded[name] = adapter
        return self._loaded[name]

    def use(self, context: Any, lora: Lora) -> None:
        """Makes `context` compute with these adapters and no others, from its next batch on: each
        file's product of matrices times its scale is added. What is in the KV cache was computed
        with those before. Raises ModelError."""
        scales: dict[str, float] = {}
        adapters = []
        for path, scale in _pairs(lora):
            adapters.append(self.load(path))
            name = os.path.realpath(path)
            if name in scales:
                raise ModelError(f"{os.fspath(path)} is named twice: add the scales")
            if not abs(scale) < 1e6:  # a NaN is no number either
                raise ModelError(
                    f"{os.fspath(path)}: the scale {scale} is not a number below a million"
                )
            scales[name] = float(scale)
        n = len(adapters)
        pointers = (llama_cpp.llama_adapter_lora_p_ctypes * n)(*adapters)
        numbers = (ctypes.c_float * n)(*scales.values())
        with guard("adapters"):
            if llama_cpp.llama_set_adapters_lora(context, pointers, n, numbers) != 0:
                raise ValueError("they cannot be used together")
        self.in_use = n > 0

    def free(self) -> None:
        """Frees all adapters; no context may use one of them any more."""
        for adapter in self._loaded.values():
            llama_cpp.llama_adapter_lora_free(adapter)
        self._loaded.clear()


def _pairs(lora: Lora) -> Lora:
    several = isinstance(lora, (list, tuple))
    if not several or not all(isinstance(each, (list, tuple)) and len(each) == 2 for each in lora):
        raise ModelError("lora is a list of files with their scales, such as [('a.gguf', 1.0)]")
    return lora
