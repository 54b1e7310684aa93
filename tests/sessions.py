"""Contexts of the C API over a loaded model: tokens one by one or in batches, caches, states."""

import ctypes
from pathlib import Path
from typing import ClassVar

import numpy as np
from batches import decode as decode_batch

from mobilellm_cpp import MobileLLM
from mobilellm_cpp.engine.library import llama_cpp

F32, F16, Q8_0, Q4_0, BF16 = 0, 1, 8, 2, 30  # ggml_type
SHAPE = {"layers": 3, "hidden": 384, "heads": 6, "kv_heads": 2, "ffn": 320, "dtype": "f32"}
NOISE = 0.05  # of a random model's logits, by flipped roundings; a wrong cell: 0.3 and more
TOKENS = np.random.default_rng(1).integers(3, 512, 90).tolist()
CACHES = {
    "f16": {},
    "q8_0": {"type_k": Q8_0, "type_v": Q8_0},
    "f32": {"type_k": F32, "type_v": F32, "flash_attn_type": 0},
    "f16-no-flash": {"flash_attn_type": 0},
}


class Session:
    """A context of its own over a loaded model."""

    defaults: ClassVar = {"n_ctx": 256, "n_threads": 1, "n_threads_batch": 1, "flash_attn_type": 1}

    def __init__(self, llm: MobileLLM, **params: object) -> None:
        self.llm = llm
        values = llama_cpp.llama_context_default_params()
        for name, value in {**self.defaults, **params}.items():
            setattr(values, name, value)
        self.ctx = llama_cpp.llama_init_from_model(llm.model, values)
        assert self.ctx
        self.memory = llama_cpp.llama_get_memory(self.ctx)

    def close(self) -> None:
        llama_cpp.llama_free(self.ctx)

    def batch(
        self, tokens: list[tuple[int, int, int]], wanted: list[int] | None = None
    ) -> np.ndarray:
        """Logits of the tokens (token, position, sequence) numbered in `wanted`, or of all."""
        return decode_batch(self.llm, tokens, wanted, self.ctx)

    def step(self, token: int, position: int, sequence: int = 0) -> np.ndarray:
        """Logits after one token."""
        return self.batch([(token, position, sequence)])[0]

    def run(self, tokens: list[int], first: int = 0, sequence: int = 0) -> np.ndarray:
        return np.stack([self.step(t, first + i, sequence) for i, t in enumerate(tokens)])

    def whole(self, tokens: list[int], first: int = 0) -> np.ndarray:
        """Logits of all tokens, which are one batch."""
        return self.batch([(token, first + i, 0) for i, token in enumerate(tokens)])

    def prefill(self, tokens: list[int]) -> None:
        """All at once, without logits but the last."""
        array = (llama_cpp.llama_token * len(tokens))(*tokens)
        assert (
            llama_cpp.llama_decode(self.ctx, llama_cpp.llama_batch_get_one(array, len(tokens))) == 0
        )

    def state(self, sequence: int = 0) -> bytes:
        buffer = (ctypes.c_uint8 * llama_cpp.llama_state_seq_get_size(self.ctx, sequence))()
        done = llama_cpp.llama_state_seq_get_data(self.ctx, buffer, len(buffer), sequence)
        assert done == len(buffer)
        return bytes(buffer)

    def restore(self, state: bytes, sequence: int = 0) -> None:
        buffer = (ctypes.c_uint8 * len(state)).from_buffer_copy(state)
        done = llama_cpp.llama_state_seq_set_data(self.ctx, buffer, len(state), sequence)
        assert done == len(state)


def load(path: Path, **arguments: object) -> MobileLLM:
    return MobileLLM(path, **{"n_ctx": 256, "n_threads": 1, **arguments})


def decode(path: Path, tokens: list[int] = TOKENS, **params: object) -> np.ndarray:
    session = Session(load(path), **params)
    rows = session.run(tokens)
    session.close()
    return rows


def distance(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def decode_texts(
    llm: MobileLLM, texts: list[list[int]], params: dict, whole: bool = False
) -> np.ndarray:
    session = Session(llm, **params)
    rows = []
    for text in texts:
        llama_cpp.llama_memory_clear(session.memory, True)
        rows.append(session.whole(text) if whole else session.run(text))
    session.close()
    return np.concatenate(rows)
