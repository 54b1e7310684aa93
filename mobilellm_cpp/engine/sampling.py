"""How the tokens of one answer are chosen: logits processors and a constraint first, then the
samplers of llama.cpp."""

import ctypes
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import ModelError
from .grammar import checked_grammar
from .library import choose, llama_cpp, sampled

Logits = npt.NDArray[np.float32]
Processor = Callable[[npt.NDArray[np.intc], Logits], Logits]

RANDOM_SEED = 0xFFFFFFFF  # llama.cpp takes it for "any": another number stands for it
MAX_BEST = 128  # that llama.cpp's top-k finds without a sort of all


class Sampler:
    """The samplers of one answer, in llama_cpp.Llama's order.

    seed: 0 to 2^32 - 1. processors get all tokens so far and the logits (float32 [n_vocab]), and
    give the logits back. constraint masks tokens and is told what was chosen (structured.py). With
    keep_logits they are at hand after each token. path names the model in errors."""

    def __init__(
        self,
        *,
        n_vocab: int,
        seed: int,
        path: str,
        top_k: int = 40,
        top_p: float = 0.95,
        min_p: float = 0.05,
        typical_p: float = 1.0,
        temp: float = 0.8,
        repeat_penalty: float = 1.0,
        frequency_penalty: float = 0.0,
        presence_penalty: float = 0.0,
        mirostat_mode: int = 0,
        mirostat_tau: float = 5.0,
        mirostat_eta: float = 0.1,
        last_n_tokens: int = 64,
        processors: Iterable[Processor] | Processor | None = None,
        constraint: Any = None,
        grammar: tuple[Any, Any] | None = None,
        keep_logits: bool = False,
    ) -> None:
        self._path = path
        self._processors = _as_list(processors)
        self._constraint = constraint
        seed = seed & 0xFFFFFFFF
        seed = 0x9E3779B9 if seed == RANDOM_SEED else seed
        self._owned = llama_cpp.llama_sampler_chain_init(
            llama_cpp.llama_sampler_chain_default_params()
        )
        self._address = ctypes.c_void_p.from_buffer(self._owned).value or 0

        def add(name: str, *arguments: Any) -> None:
            sampler = getattr(llama_cpp, f"llama_sampler_init_{name}")(*arguments)
            llama_cpp.llama_sampler_chain_add(self._owned, sampler)

        penalties = (repeat_penalty, frequency_penalty, presence_penalty)
        self.n_best = 0
        if penalties != (1, 0, 0):
            add("penalties", n_vocab, last_n_tokens, *penalties)
        elif grammar is not None:
            self.n_best = 0
        elif temp == 0:
            self.n_best = 1
        elif temp > 0 and mirostat_mode == 0 and 0 < top_k <= MAX_BEST:
            self.n_best = top_k
        if grammar is not None:
            llama_cpp.llama_sampler_chain_add(self._owned, checked_grammar(*grammar))
        if temp < 0:
            add("dist", seed)
        elif temp == 0:
            add("greedy")
        elif mirostat_mode == 1:
            add("mirostat", n_vocab, seed, mirostat_tau, mirostat_eta, 100)
        elif mirostat_mode == 2:
            add("mirostat_v2", seed, mirostat_tau, mirostat_eta)
        else:
            add("top_k", top_k)
            add("typical", typical_p, 1)
            add("top_p", top_p, 1)
            add("min_p", min_p, 1)
            add("temp", temp)
            add("dist", seed)
        # with a chain, a step chooses the token itself
        own = bool(self._processors) or constraint is not None or keep_logits
        self.chain = None if own else self._address

    def __del__(self) -> None:
        if getattr(self, "_owned", None) is not None and llama_cpp is not None:
            llama_cpp.llama_sampler_free(self._owned)

    def pick(self, tokens: list[int], chosen: int | None, logits: Logits | None) -> int:
        """The next token: the one that a step chose, or one from the logits after tokens, which may
        be changed. Raises ModelError where there is none, and what a processor raises."""
        if logits is None:
            assert chosen is not None
            return sampled(chosen, self._path)
        if not np.isfinite(logits).all():
            return sampled(-1, self._path)
        for process in self._processors:
            logits[:] = process(np.array(tokens, np.intc), logits)
        if self._constraint is not None:
            self._constraint.mask(logits)
        if np.isnan(logits).any() or not np.isfinite(logits.max()):
            raise ModelError("no token can be chosen: logits processors leave none that may follow")
        token = sampled(choose(self._address, logits, self.n_best), self._path)
        if self._constraint is not None:
            self._constraint.accept(token)
        return token


def _as_list(processors: Iterable[Processor] | Processor | None) -> list[Processor]:
    if processors is None:
        return []
    return list(processors) if isinstance(processors, (list, tuple)) else [processors]  # type: ignore[list-item]
