"""The calls of llama_cpp.Llama, each over a sequence of its own.

llama_cpp.Llama keeps what a call needs between its steps (tokens, scores, seed) in the object
itself, so two calls at a time mix. Here every completion runs on a view: the same model, with these
few attributes of its own. The low-level calls (eval, sample, save_state, ...) act on the object's
one sequence, as they are meant to."""

import random
from collections.abc import Generator, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import ContextError, ModelError
from .adapters import Adapters
from .library import llama_cpp
from .llama_base import LlamaBase
from .prompt_lookup import MOST
from .sampling import Logits, Sampler
from .sequence import Sequence as TokenSequence
from .sequence_state import Rows
from .sequences import Sequences
from .structured import Constraint

Vectors = npt.NDArray[np.float32]

NONE, MEAN, FIRST, LAST = 0, 1, 2, 3  # llama.cpp's pooling types
_SAMPLING = (
    "top_k",
    "top_p",
    "min_p",
    "typical_p",
    "temp",
    "repeat_penalty",
    "frequency_penalty",
    "presence_penalty",
    "mirostat_mode",
    "mirostat_tau",
    "mirostat_eta",
)


class InheritedCalls(LlamaBase):
    """llama_cpp.Llama over sequences; MobileLLM sets the attributes."""

    model_path: str
    _sequences: Sequences
    _main: "InheritedCalls | None"  # whose view this is
    _own: TokenSequence | None = None
    _restored = False  # _own was loaded: a prompt goes on from it
    _last_logits: npt.NDArray[np.float32] | None = None
    _seeds: random.Random
    _fixed_seed: int | None
    _embedding: bool
    _pooling: int
    _context: int
    _prompts: Any  # a PromptCache, or None
    _adapters: Adapters

    # The sequence of this object or view

    @property
    def n_tokens(self) -> int:
        """How many tokens were evaluated by this object's low-level calls."""
        return len(self._own.tokens) if self._own else 0

    @n_tokens.setter
    def n_tokens(self, n: int) -> None:
        if self._own is not None:
            with self._sequences.lock:
                self._own.state.cut(n)

    @property
    def input_ids(self) -> npt.NDArray[np.intc]:
        """Those tokens."""
        return np.array(self._own.tokens if self._own else [], np.intc)

    @input_ids.setter
    def input_ids(self, _: Any) -> None:
        pass  # llama_cpp.Llama's own array

    @property
    def _input_ids(self) -> npt.NDArray[np.intc]:
        return self.input_ids

    def _view(self) -> "InheritedCalls":
        """This model for one call."""
        view = object.__new__(type(self))
        view.__dict__.update(self.__dict__)
        view._main = self._main or self
        view._own = None
        view._restored = False
        view._seed = self._next_seed()
        if self._logits_all:
            view.scores = np.empty((self._context, self._n_vocab), np.float32)
        return view

    def _next_seed(self) -> int:
        """For an answer without a seed of its own."""
        return self._seeds.getrandbits(32)

    def set_seed(self, seed: int) -> None:
        """Sets the seed that the next answers' seeds, or a view's answer, come from."""
        self._seed = seed & 0xFFFFFFFF
        if self._main is None:
            self._fixed_seed = self._seed
            self._seeds = random.Random(seed)

    def reset(self) -> None:
        """Forgets the tokens that were evaluated."""
        self._own = None
        self._restored = False

    def _prompt_cache(self) -> Any:
        """The PromptCache, where there is one and it is of use now."""
        known = self._prompts is not None and not self._adapters.in_use
        return self._prompts if known and not self._sequences.places.window else None

    # Low-level calls

    def eval(self, tokens: Sequence[int]) -> None:
        """Evaluates tokens after those that were evaluated before. Raises ModelError where the
        context does not hold them."""
        tokens = self._checked_tokens(tokens)
        start = self.n_tokens
        if start + len(tokens) > self._context:
            raise ContextError(
                f"{start + len(tokens)} tokens, but the context holds {self._context}"
            )
        if not tokens:
            return
        if self._own is None:
            self._own = self._sequences.open(tokens)
        else:
            self._own.extend(tokens)
        self._last_logits = self._evaluated(self._own, start)

    def _evaluated(self, sequence: TokenSequence, start: int) -> npt.NDArray[np.float32]:
        """The logits after the last token; those after all from start on become scores where the
        model keeps them."""
        if self._logits_all:
            rows = Rows(self._n_vocab, range(start, len(sequence.tokens)), states=False)
            out = sequence.compute(rows)
            sequence.state.rows = None
            self.scores[start : start + len(out)] = out
            last: Logits = out[-1].copy()
            return last
        _, logits = sequence.next(_COPY)
        assert logits is not None
        return logits

    def sample(self, *arguments: Any, idx: int | None = None, **sampling: Any) -> int:
        """A token after the evaluated ones, or after the idx-th where the model keeps all
        scores."""
        if self._own is None or self._last_logits is None:
            raise ModelError("nothing was evaluated: call eval before sample")
        logits = self._last_logits if idx is None or not self._logits_all else self.scores[idx]
        named = dict(zip(_SAMPLING[:8], arguments, strict=False)) | sampling
        return self._sampler_for(**named).pick(self._own.tokens, None, logits.copy())

    def _sampler_for(
        self,
        logits_processor: Any = None,
        grammar: Any = None,
        keep_logits: bool = False,
        seed: int | None = None,
        **sampling: Any,
    ) -> Sampler:
        known = {name: sampling[name] for name in _SAMPLING if name in sampling}
        # among the processors, since chat handlers hand these on and put grammars of their own
        processors = _as_list(logits_processor)
        constraint = next((each for each in processors if isinstance(each, Constraint)), None)
        if seed is None:
            seed = self._seed if self._main or self._fixed_seed is not None else self._next_seed()
        return Sampler(
            n_vocab=self._n_vocab,
            seed=seed,
            path=self.model_path,
            last_n_tokens=self.last_n_tokens_size,
            processors=[each for each in processors if each is not constraint],
            constraint=constraint,
            grammar=None if constraint or grammar is None else (self._model.vocab, grammar),
            keep_logits=keep_logits,
            **known,
        )

    def generate(
        self,
        tokens: Sequence[int],
        *arguments: Any,
        reset: bool = True,
        stopping_criteria: Any = None,
        **sampling: Any,
    ) -> Generator[int, Sequence[int] | None, None]:
        """Yields the tokens that follow a prompt, without end; send() gives tokens to go on from.
        With reset=False the prompt follows what was evaluated before."""
        named = dict(zip(_GENERATE, arguments, strict=False)) | sampling
        reset = named.pop("reset", reset)
        sampler = self._sampler_for(keep_logits=stopping_criteria is not None, **named)
        tokens = self._checked_tokens(tokens)
        prompts = None
        if self._own is not None and self._restored:
            sequence, start = self._own, 0
            sequence.rewrite(tokens)
        elif self._own is not None and not reset:
            sequence, start = self._own, self.n_tokens
            sequence.extend(tokens)
        else:
            if prompts := self._prompt_cache():
                prompts.prepare(self._sequences, tokens)
            sequence, start = self._sequences.open(tokens), 0
        self._own, self._restored = sequence, False
        if not sequence.tokens:
            raise ModelError("the prompt is empty")
        stops = _as_list(stopping_criteria)
        if self._main is not None and not self._logits_all:
            sequence.speculate(MOST, self._context)
        while True:
            if len(sequence.tokens) > self._context:
                raise ContextError(f"the context of {self._context} tokens is full")
            chosen: int | None = None
            logits: Logits | None
            if self._logits_all:
                logits = self._evaluated(sequence, start)
                start = len(sequence.tokens)
            else:
                chosen, logits = sequence.next(sampler)
                if prompts:
                    prompts.keep(sequence, len(tokens))
                    prompts = None
            if logits is not None:
                kept = logits.copy() if stops else logits
            token = sampler.pick(sequence.tokens, chosen, logits)
            if any(stop(np.array(sequence.tokens, np.intc), kept) for stop in stops):
                return
            last = len(sequence.tokens) >= self._context or self._is_end(token)
            # steps of other calls may take it along; low-level calls see tokens once evaluated
            ahead = self._main is not None and not self._logits_all and not last
            if ahead:
                sequence.append(token, sampler)
            given = yield token
            if not ahead:
                sequence.append(token, None)
            if given:
                sequence.extend(self._checked_tokens(given))

    def _is_end(self, token: int) -> bool:
        with self._sequences.using():
            return bool(llama_cpp.llama_vocab_is_eog(self._model.vocab, token))

    def _checked_tokens(self, tokens: Sequence[int]) -> list[int]:
        tokens = [int(token) for token in tokens]
        if bad := [token for token in tokens if not 0 <= token < self._n_vocab]:
            raise ModelError(f"token {bad[0]} is outside the vocabulary of {self._n_vocab}")
        return tokens

    def save_state(self) -> Any:
        """The evaluated tokens with what was computed of them."""
        self._sequences.check_open()
        data, n = self._own.copy() if self._own else (b"", 0)
        return llama_cpp.llama.LlamaState(
            input_ids=self.input_ids[:n],
            scores=self.scores[: n if self._logits_all else 0].copy(),
            n_tokens=n,
            llama_state=data,
            llama_state_size=len(data),
            seed=self._seed,
        )

    def load_state(self, state: Any) -> None:
        """Takes back what save_state gave. Raises ModelError where it is not of this model."""
        tokens = self._checked_tokens(state.input_ids[: state.n_tokens].tolist())
        if len(tokens) > self._context:
            raise ContextError(f"{len(tokens)} tokens, but the context holds {self._context}")
        self.reset()
        if tokens:
            own = TokenSequence(self._sequences)
            own.restore(tokens, state.llama_state)
            self._own, self._restored = own, True
        if self._logits_all and len(state.scores):
            self.scores[: len(state.scores)] = state.scores
        self._seed = state.seed

    # Completions

    def _create_completion(self, *arguments: Any, **keywords: Any) -> Iterator[Any]:
        view = self._view()
        if keywords.get("logits_processor") is not None:
            keywords["logits_processor"] = _Processors(_as_list(keywords["logits_processor"]))
        try:
            for part in super(InheritedCalls, view)._create_completion(*arguments, **keywords):
                yield _plain(part)
        except ValueError as error:
            if "exceed context window" in str(error):  # it names a size that is rounded up
                head = str(error).rpartition(" ")[0]
                raise ValueError(f"{head} {self._context}") from None
            raise

    # Embeddings

    def pooling_type(self) -> Any:
        """How the hidden states of a text's tokens become one vector."""
        return self._pooling if self._embedding else NONE

    def embed(
        self,
        input: str | list[str],
        normalize: bool = False,
        truncate: bool = True,
        return_count: bool = False,
    ) -> Any:
        """Embeddings of a text or texts as lists of floats; without pooling one list for each
        token. The model must have been loaded with embedding=True."""
        if not self._embedding:
            raise RuntimeError(
                "Llama model must be created with embedding=True to call this method"
            )
        texts = [input] if isinstance(input, str) else input
        tokens = [self.tokenize(text.encode("utf-8", "surrogatepass")) for text in texts]
        if truncate:
            tokens = [some[: self.n_batch] for some in tokens]
        vectors = [pooled(rows, self._pooling) for rows in self._states(tokens)]
        if normalize:
            vectors = [normalized(rows) for rows in vectors]
        lists = [rows.tolist() for rows in vectors]
        found = lists[0] if isinstance(input, str) else lists
        return (found, sum(map(len, tokens))) if return_count else found

    def _states(self, texts: list[list[int]]) -> list[npt.NDArray[np.float32]]:
        """float32 [n_tokens, n_embd] for each text: the hidden states after the final norm."""
        for tokens in texts:
            self._check_length(tokens)
        steps = self._sequences.states(texts, self.n_embd())
        return [rows for rows in steps if rows is not None]

    def _check_length(self, tokens: Sequence[int]) -> None:
        if not tokens:
            raise ModelError("no tokens were given")
        if len(tokens) > self._context:
            raise ContextError(
                f"{len(tokens)} tokens were given, but the context holds {self._context}"
            )


class _Copy:
    """Logits are wanted, no token."""

    chain = None
    n_best = 0


_COPY = _Copy()
_GENERATE = (*_SAMPLING[:6], "reset", *_SAMPLING[6:8], "tfs_z", *_SAMPLING[8:], "penalize_nl")


class _Processors(list[Any]):
    """llama_cpp.Llama goes on with what extend returns when there is a logit_bias, too."""

    def extend(self, more: Any) -> "_Processors":  # type: ignore[override]
        super().extend(more)
        return self


def pooled(rows: Vectors, pooling: int) -> Vectors:
    """[n_tokens, n_embd] to [n_embd] by llama.cpp's pooling type: the mean, the first or the last
    row; without pooling all rows."""
    found: Vectors = rows
    if pooling in (FIRST, LAST):
        found = rows[0 if pooling == FIRST else -1]
    elif pooling == MEAN:
        found = rows.mean(0, dtype=np.float64).astype(np.float32)
    return found


def normalized(rows: Vectors) -> Vectors:
    """Each vector, or each row, at length 1."""
    lengths = np.linalg.norm(rows.astype(np.float64), axis=-1, keepdims=True)
    found: Vectors = (rows / np.maximum(lengths, 1e-12)).astype(np.float32)
    return found


def _as_list(callables: Any) -> list[Any]:
    if callables is None:
        return []
    return list(callables) if isinstance(callables, (list, tuple)) else [callables]


def _plain(part: Any) -> Any:
    """A completion with numbers of Python in its log probabilities."""
    for choice in part["choices"]:
        found = choice.get("logprobs")
        if found:
            found["token_logprobs"] = [_float(x) for x in found["token_logprobs"]]
            found["top_logprobs"] = [
                best and {text: _float(x) for text, x in best.items()}
                for best in found["top_logprobs"]
            ]
    return part


def _float(x: Any) -> float | None:
    return None if x is None else float(x)
