"""MobileLLM: a GGUF file as a Python object, and a llama_cpp.Llama: what takes one takes it."""

import codecs
import contextlib
import inspect
import logging
import os
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt
from typing_extensions import Unpack

from ..errors import ContextError, ModelError
from ..quant.weight_type import DEFAULT_TYPE, CacheType, FileType
from . import ahead
from .adapters import Adapters, Lora
from .aio import AsyncCalls
from .answers import (
    Answer,
    Bias,
    Stream,
    chunks_without_leading_space,
    log_prob,
    until_stop,
    without_leading_space,
)
from .arguments import CACHE_NAMES, check_constructor, check_sampling, check_stop
from .batches import BatchCalls
from .gguf_file import context_length, default_cache, open_gguf
from .inherited import _COPY, MEAN, InheritedCalls, _as_list, normalized, pooled
from .library import Pieces, give_memory_back, guard, llama_cpp, tokenize
from .llama_base import Formatter, LlamaArguments, ModelArguments
from .memory import check_memory
from .messages import PLAIN_STOP, PLAIN_TEMPLATE, Message, StoppingFormatter, checked_messages, utf8
from .prompt_lookup import MOST
from .sampling_types import Sampling
from .sequence import Sequence as TokenSequence
from .sequences import Sequences
from .structured import Constraint, Vocabulary, from_response_format, pop_form
from .thread_choice import chosen_threads
from .threads import default_threads
from .tools import offered, start

log = logging.getLogger(__name__)


# Settings of a context that K and V of a token depend on.
_OF_KV = ("rope", "yarn", "attention", "flash_attn", "type", "n_ubatch")
SLOTS = 16  # sequences that may have a place in the KV cache at a time
WINDOWS = 4  # where each needs a window of its own in the sliding layers


class _Closed:
    """What stands for model and context once they are freed."""

    def __getattr__(self, name: str) -> Any:
        raise ModelError("this model is closed")


class MobileLLM(InheritedCalls, AsyncCalls, BatchCalls):
    """A loaded model. Any number of threads may call it at the same time: each gets what it would
    get alone, and answers that are made at the same time are computed together.

    model_path: a GGUF file of architecture `mobilellm`, or any that llama.cpp runs.
    n_ctx: context in tokens; 0 takes what the file says, at most 8192.
    n_threads: 0 takes as many as decode fastest, which is measured once for this machine and size
        of model and kept in the cache folder; prompts are read by all physical cores then.
    cache_type: of the KV cache; None is q8_0 where blocks are shared, which doubles the cache, if
        nothing else about the cache was asked for, and f16 elsewhere.
    flash_attn: None is on, which a quantized KV cache needs, except for an f32 KV cache, which
    upstream's flash attention would round to f16.
    lora: adapters, each a GGUF file and its scale; set_lora takes others later.
    Other arguments are those of llama_cpp.Llama; logging is off, and so is swa_full: the KV cache
    of a layer with a sliding window holds the window, not the context. embedding=True pools by the
    mean unless pooling_type says otherwise. Raises ModelError with the reason when the file cannot
    be used. `with MobileLLM(...) as llm`, close() and del free everything at once."""

    def __init__(
        self,
        model_path: str | os.PathLike[str],
        *,
        n_ctx: int = 0,
        n_threads: int = 0,
        cache_type: CacheType | None = None,
        flash_attn: bool | None = None,
        verbose: bool = False,
        lora: Lora = (),
        **kwargs: Unpack[LlamaArguments],
    ) -> None:
        """The class says what the arguments are."""
        self._prompts: Any = None
        self._stack = contextlib.ExitStack()  # what close() closes, should we stop early
        self._main: InheritedCalls | None = None
        arguments: dict[str, Any] = check_constructor(
            model_path=model_path,
            n_ctx=n_ctx,
            n_threads=n_threads,
            cache_type=cache_type,
            flash_attn=flash_attn,
            verbose=verbose,
            **kwargs,
        )
        path, start = arguments.pop("model_path"), time.perf_counter()
        threads = arguments.pop("n_threads")
        measured = not threads and not arguments.get("vocab_only")
        threads = threads or default_threads()
        arguments["n_threads_batch"] = arguments.get("n_threads_batch") or threads
        flash = arguments.pop("flash_attn")
        types = (arguments.get("type_k"), arguments.get("type_v"))
        if flash is None:
            flash = llama_cpp.GGML_TYPE_F32 not in types
        self._embedding = arguments.pop("embedding", False)
        self._pooling = arguments.pop("pooling_type", -1)
        if self._pooling < 0:
            self._pooling = MEAN
        if self._pooling > 3:
            raise ModelError("a pooling type of rank needs a model with a classifier")
        arguments["pooling_type"] = llama_cpp.LLAMA_POOLING_TYPE_NONE  # Python pools, call by call
        arguments.setdefault("swa_full", False)
        seed = arguments.pop("seed", None)
        self._slots = max(1, min(SLOTS, arguments.get("n_batch", 512) - 1))
        with open_gguf(path) as file:
            if file.get("general.type") == "adapter":
                raise ModelError(
                    f"{path} is a LoRA adapter and not a model: load its model with "
                    "lora=[(adapter, 1.0)], or in commands with --lora"
                )
            self._context = arguments.pop("n_ctx") or min(context_length(file) or 512, 8192)
            self._slots = max(1, min(self._slots, self._context - 1))
            arch = file.get("general.architecture")
            if file.get(f"{arch}.attention.sliding_window"):
                self._slots = min(self._slots, WINDOWS)
            causal = file.get(f"{arch}.attention.causal", True) is not False
            with contextlib.suppress(ModelError):  # the loader says it better
                if types == (None, None):
                    cache_type = default_cache(file) if flash else "f16"
                    arguments["type_k"] = arguments["type_v"] = CACHE_NAMES[cache_type]
            if not arguments.get("vocab_only"):
                taken = ahead.size_of(path)
                check_memory(path, file, self._context, cache_type or "f16", taken)
        first, scale = arguments.pop("lora_path", None), arguments.pop("lora_scale", 1.0)
        with guard(path, verbose):
            super().__init__(
                path, n_ctx=self._context, n_threads=threads, flash_attn=flash, **arguments
            )
        self._adapters = Adapters(self._model.model)
        if first or lora:
            self._adapters.use(self._ctx.ctx, [*([(first, scale)] if first else []), *lora])
        self.context_params.embeddings = self._embedding
        self._logits_all = arguments.get("logits_all", False)  # a draft_model would ask for it
        self._fixed_seed = None if seed is None or seed < 0 else seed
        self._seeds = random.Random(self._fixed_seed)
        self._piece = Pieces(self._model.vocab)
        self._vocabulary = Vocabulary(self._model.vocab)
        self._model.detokenize = self._piece.text  # completions ask for all of it each time
        self._sequences = Sequences(
            self._ctx.ctx,
            self._slots,
            self.context_params.n_ubatch,
            self._n_vocab,
            llama_cpp.llama_model_n_swa(self._model.model),
            causal and arguments.get("attention_type") != 1,
        )
        if measured and causal:
            threads = chosen_threads(os.path.getsize(path), self._seconds)
            self._set_threads(threads)
        self._add_template(plain=not {"chat_format", "chat_handler"} & set(kwargs))
        seconds = time.perf_counter() - start
        log.info(
            "%s loaded in %.3f s: %d threads, %d tokens", path, seconds, threads, self._context
        )

    def _set_threads(self, n: int) -> None:
        self.n_threads = n
        llama_cpp.llama_set_n_threads(self._ctx.ctx, n, self.n_threads_batch)

    def _seconds(self, n_threads: int) -> float:
        """What a decoded token takes with so many threads: the best of a few."""
        self._set_threads(n_threads)
        sequence = self._sequences.open([0])
        best = float("inf")
        for _ in range(min(6, self._context)):
            start = time.perf_counter()
            sequence.next(_COPY)
            best = min(best, time.perf_counter() - start)
            sequence.append(0, None)
        return best

    def _add_template(self, plain: bool) -> None:
        template = self.metadata.get("tokenizer.chat_template")
        self._stop = () if template else PLAIN_STOP
        self._template = Formatter(
            template=template or PLAIN_TEMPLATE,
            eos_token=self._token_text(self.token_eos()),
            bos_token=self._token_text(self.token_bos()),
        )
        if not template and plain:
            handler = llama_cpp.llama_chat_format.chat_formatter_to_chat_completion_handler
            self._chat_handlers["plain"] = handler(StoppingFormatter(self._template, PLAIN_STOP))
            self.chat_format = "plain"

    @property
    def context_params(self) -> Any:
        """llama.cpp's settings of the context."""
        return self._context_params

    @context_params.setter
    def context_params(self, params: Any) -> None:
        # llama_cpp.Llama makes them and its context in one go, and knows no way to say this
        params.n_seq_max = self._slots + 1 if self._slots > 1 else 1
        params.kv_unified = True
        self._context_params = params

    # Lifetime

    def __enter__(self) -> "MobileLLM":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Frees the model; later calls raise ModelError."""
        if self._main is not None:
            self._main.close()
            return
        if hasattr(self, "_sequences"):
            self._sequences.close()
        self._stack.close()
        self._own = None
        closed: Any = _Closed()
        self._model = self._ctx = self._piece = self.tokenizer_ = closed
        give_memory_back()

    def __del__(self) -> None:
        if getattr(self, "_main", self) is None:
            self.close()

    @classmethod
    def from_checkpoint(
        cls,
        source: str | Path,
        type: FileType = DEFAULT_TYPE,
        *,
        head: str | None = None,
        revision: str | None = None,
        **kwargs: Unpack[ModelArguments],
    ) -> "MobileLLM":
        """The model of a checkpoint folder or hub id, converted to `type` once and cached;
        head: another type for the output head, as in convert_checkpoint.

        The cache is keyed by the checkpoint's content. kwargs go to MobileLLM. Raises
        CheckpointError when the checkpoint cannot be converted.
        """
        from ..cache import converted

        return cls(converted(source, type, head=head, revision=revision), **kwargs)

    def set_lora(self, lora: Lora) -> None:
        """Computes with these adapters (a GGUF file and its scale each) and no others from now on;
        each file is loaded once. Raises ModelError for one that does not fit."""
        self._sequences.change(lambda: self._adapters.use(self._ctx.ctx, lora))

    def use_prompt_cache(
        self, folder: str | os.PathLike[str] | None = None, max_bytes: int = 1 << 30
    ) -> None:
        """From now on, what streams and chats compute of prompts of 64 tokens and more is kept in a
        folder (by default `prompts` in the cache of converted checkpoints), and prompts that begin
        like one that any process has kept there begin with it. Answers are the same. max_bytes
        bounds the folder; the files that were used last stay. Models with sliding windows and LoRA
        adapters do without. Raises ModelError where the folder cannot be used."""
        from ..cache import cache_folder
        from .prompt_cache import PromptCache

        place = Path(folder) if folder is not None else cache_folder() / "prompts"
        params = self.context_params
        names = [field for field, _ in params._fields_ if field.startswith(_OF_KV)]
        settings = (
            f"{[(name, getattr(params, name)) for name in names]} {sorted(self.metadata.items())}"
        )
        try:
            self._prompts = PromptCache(place, Path(self.model_path), settings, max_bytes)
        except OSError as error:
            raise ModelError(f"{place}: {error.strerror}") from error

    @property
    def n_slots(self) -> int:
        """How many sequences at most have a place in the KV cache at a time."""
        return int(self._slots)

    @property
    def computes_together(self) -> bool:
        """Whether a step computes tokens of several answers. Where not, each has the cache in
        turn."""
        return self._sequences.fused is not False

    # Texts and tokens

    def n_ctx(self) -> int:
        """The context in tokens as asked for. llama.cpp rounds it up; Llama's buffers do not."""
        return self._context

    def tokenize(self, text: bytes, add_bos: bool = True, special: bool = False) -> list[int]:
        """Token ids of UTF-8 text. Raises ModelError where the vocabulary cannot spell it."""
        if not isinstance(text, bytes):
            raise ModelError("tokenize takes bytes: give it text.encode()")
        with self._sequences.using():
            return tokenize(self._model.vocab, text, add_bos, special)

    def detokenize(
        self, tokens: list[int], prev_tokens: list[int] | None = None, special: bool = False
    ) -> bytes:
        """The UTF-8 text of token ids, of those after prev_tokens."""
        with self._sequences.using():
            return super().detokenize(tokens, prev_tokens, special)

    def chat_tokens(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None = None
    ) -> list[int]:
        """The prompt for the next answer: the file's chat template over messages, as token ids.
        tools, in OpenAI's form, are for templates that tell the model of them.

        Files without a template get plain `User:` and `Assistant:` lines. Special tokens that are
        written out in a message count as such.
        """
        variables = {"tools": list(tools)} if tools else {}
        prompt = self._template(messages=checked_messages(messages), **variables).prompt
        # the template writes bos itself when it wants one
        tokens = self.tokenize(utf8(prompt), add_bos=False, special=True)
        bos = self.token_bos()
        if self._model.add_bos_token() and bos >= 0 and tokens[:1] != [bos]:
            tokens.insert(0, bos)
        return tokens

    def _token_text(self, token: int) -> str:
        return self._model.token_get_text(token) if token >= 0 else ""

    # Answers

    def stream(
        self,
        prompt: str | Sequence[Message] | Sequence[int],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        tool_choice: str = "auto",
        parallel_tool_calls: bool = False,
        **sampling: Unpack[Sampling],
    ) -> Stream:
        """Yields the continuation of a text (or of its token ids), or the answer to messages, in
        pieces as it is made.

        Ends at an end-of-text token, at a stop string (not yielded), after max_tokens, or where
        the context is full. Raises ModelError when the prompt does not fit into the context, or an
        argument is not sound. The arguments, and what they are when left out:

        max_tokens: None, as many as there is room for
        temperature: 0.8; 0 always takes the likeliest token
        top_k: 40 likeliest tokens are looked at; 0: all
        top_p: 0.95, the probability that they have together at least; 1: all
        min_p: 0.05, the least probability, relative to the likeliest token's; 0: all
        typical_p: 1, locally typical sampling is off
        repeat_penalty: 1; a larger one divides the logits of tokens seen lately
        frequency_penalty, presence_penalty: 0; taken from the logits of tokens seen lately, once
            for each time, and once
        mirostat_mode, mirostat_tau, mirostat_eta: 0, 5, 0.1; Mirostat (1, 2) in the place of top_k,
            top_p, min_p and typical_p
        speculative: 11; up to so many tokens are drafted where the text seems to repeat a part of
            itself, and checked at once, which is faster; the text is the same; 0: none
        seed: None, another text each time; the same seed gives the same text
        stop: a text or texts before which the answer ends
        logit_bias: none; numbers added to the logits of tokens, by their ids
        logprobs: None; so many of the likeliest tokens at each place are kept in Stream.logprobs
        json_schema, regex, lark, grammar, response_format: none; with one of them, a text that ends
            by itself has that form

        tools, tool_choice and parallel_tool_calls are those of chat, for messages. What is called
        has no pieces; Stream.tool_calls has it at the end.
        """
        ids = isinstance(prompt, (list, tuple)) and prompt and _are_ids(prompt)
        if ids or isinstance(prompt, str):
            if tools:
                raise ModelError("tools need messages, not a text")
            return self._stream(prompt, sampling, None)
        messages = checked_messages(cast("Sequence[Message]", prompt))
        template = self.metadata.get("tokenizer.chat_template", "")
        offer = offered(tools, tool_choice, template, parallel_tool_calls)
        return start(self, messages, offer, sampling)

    def _stream(
        self,
        prompt: str | Sequence[Message] | Sequence[int],
        sampling: Mapping[str, Any],
        sequence: TokenSequence | None,
    ) -> Stream:
        """stream; with a sequence, what that has computed of the prompt is not computed again."""
        settings = dict(sampling)
        form = pop_form(settings)
        stop = check_stop(settings.pop("stop", None))
        settings = check_sampling(n_vocab=self._n_vocab, **settings)
        n_best = settings.pop("logprobs", None)
        processors = _as_list(settings.pop("logits_processor", None))
        if bias := settings.pop("logit_bias", None):
            processors.append(Bias(bias))
        max_tokens = settings.pop("max_tokens", None)
        if max_tokens is not None and max_tokens < 0:
            raise ModelError(f"max_tokens is {max_tokens}; leave it out for no limit")
        settings["temp"] = settings.pop("temperature", 0.8)
        drafted = settings.pop("speculative", MOST)
        seed = settings.pop("seed", None)
        if seed is None or seed < 0:
            seed = self._next_seed()
        chat = False
        if isinstance(prompt, str):
            tokens = self.tokenize(utf8(prompt), special=True)
        elif isinstance(prompt, (list, tuple)) and prompt and _are_ids(prompt):
            tokens = self._checked_tokens(cast("Sequence[int]", prompt))
        else:
            chat = True
            tokens = self.chat_tokens(cast("Sequence[Message]", prompt))
            stop += () if form else self._stop
        room = self.n_ctx() - len(tokens)
        if room < 1:
            raise ContextError(
                f"the prompt has {len(tokens)} tokens, but the context holds {self.n_ctx()}"
            )
        if not tokens:
            raise ModelError("the prompt is empty")
        budget = room if max_tokens is None else min(room, max_tokens)
        if sequence is None:
            if prompts := self._prompt_cache():
                prompts.prepare(self._sequences, tokens)
            sequence = self._sequences.open(tokens)
        else:
            sequence.rewrite(tokens)
        sequence.speculate(drafted, len(tokens) + budget)
        stream = Stream(len(tokens))
        stream.logprobs = None if n_best is None else []
        constraint = self._constraint(form)
        if constraint is not None:
            processors.append(constraint)
        sampler = self._sampler_for(
            seed=seed, logits_processor=processors, keep_logits=n_best is not None, **settings
        )
        pieces = until_stop(
            self._pieces(stream, sequence, sampler, budget, constraint, n_best or 0), stop, stream
        )
        stream._sequence, stream._sampler = sequence if budget else None, sampler
        if chat and not form:
            pieces = without_leading_space(pieces)
        stream._pieces = pieces
        return stream

    def _pieces(
        self,
        stream: Stream,
        sequence: TokenSequence,
        sampler: Any,
        budget: int,
        constraint: Constraint | None,
        n_best: int,
    ) -> Iterator[str]:
        """The texts of up to budget generated tokens; bytes that are no UTF-8 become U+FFFD."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        reason = "length"
        while stream._n_made < budget:
            chosen, logits = sequence.next(sampler)
            stream._n_found = sequence.state.found
            if stream._n_made == 0 and (prompts := self._prompt_cache()):
                prompts.keep(sequence, stream._n_prompt)
            kept = None if stream.logprobs is None or logits is None else logits.copy()
            token = sampler.pick(sequence.tokens, chosen, logits)
            if self._is_end(token):
                reason = "stop"
                break
            stream._n_made += 1
            with self._sequences.using():
                piece = self._piece(token)
            if kept is not None and stream.logprobs is not None:
                stream.logprobs.append(log_prob(token, piece, kept, n_best))
            complete = constraint is not None and constraint.finished
            if stream._n_made < budget and not complete:
                sequence.append(token, sampler)  # steps of other calls may take it along
            yield decoder.decode(piece)
            if complete:
                reason = "stop"
                break
        stream.finish_reason, stream._sequence = reason, None  # its place is free
        yield decoder.decode(b"", final=True)

    def chat(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        tool_choice: str = "auto",
        parallel_tool_calls: bool = False,
        **sampling: Unpack[Sampling],
    ) -> Answer:
        """The answer to messages, whole: a str with finish_reason, usage, logprobs and tool_calls.
        sampling: the arguments of stream.

        tools: functions that the model may call, as OpenAI has them, or each as {"name",
        "description", "parameters": a JSON schema}. tool_choice: "auto", "required", "none", or the
        name of the one to call. A call fits its schema and stands in tool_calls; Answer.message()
        is what goes into messages before {"role": "tool", "tool_call_id", "content"} with its
        result. With parallel_tool_calls an answer may be several calls.
        """
        stream = self.stream(
            checked_messages(messages),
            tools=tools,
            tool_choice=tool_choice,
            parallel_tool_calls=parallel_tool_calls,
            **sampling,
        )
        return Answer.of("".join(stream), stream)

    if not TYPE_CHECKING:  # who see LlamaBase's own, with its arguments

        def create_chat_completion(self, messages: Any, *arguments: Any, **keywords: Any) -> Any:
            """The answer to messages in OpenAI's form; with stream=True, in pieces.
            response_format and a tool_choice that names a tool are held to as json_schema is in
            stream."""
            call = inspect.signature(super().create_chat_completion)
            bound = call.bind(checked_messages(messages), *arguments, **keywords)
            given = bound.arguments
            form = from_response_format(given.get("response_format"), *_tools(given))
            if form:
                others = _as_list(given.get("logits_processor"))
                given["logits_processor"] = [self._constraint(form), *others]
                given["response_format"] = None
            answer = super().create_chat_completion(*bound.args, **bound.kwargs)
            if form:
                return answer
            if isinstance(answer, dict):
                for choice in answer["choices"]:
                    message = choice["message"]
                    if isinstance(message.get("content"), str):
                        message["content"] = message["content"].lstrip(" ")
                return answer
            return chunks_without_leading_space(answer)

    def _constraint(self, form: Mapping[str, Any]) -> Constraint | None:
        if not form:
            return None
        with self._sequences.using():
            return Constraint(self._vocabulary, **form)

    # Numbers

    def logits(
        self, tokens: Sequence[int], positions: Sequence[int] | None = None
    ) -> npt.NDArray[np.float32]:
        """float32 [n_tokens, n_vocab]: the logits after each of tokens, from an empty context; with
        positions [len(positions), n_vocab]: those after the tokens at these places.

        Raises ModelError for no tokens, more than n_ctx, or ids outside the vocabulary.
        """
        tokens = self._checked_tokens(tokens)
        self._check_length(tokens)
        wanted = np.arange(len(tokens))[slice(None) if positions is None else list(positions)]
        out = self._sequences.rows(tokens, self.n_vocab(), wanted.tolist())
        self._check_numbers(out)
        return out

    def embeddings(
        self, texts: Sequence[str], normalize: bool = True, truncate: bool = False
    ) -> npt.NDArray[np.float32]:
        """float32 [len(texts), n_embd]: the mean over a text's tokens of the last hidden state
        (after the final norm), or what pooling_type says, scaled to length 1 unless normalize is
        False. truncate leaves out what of a text the context does not hold, which raises ModelError
        otherwise."""
        if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
            raise ModelError("embeddings takes a list of texts, not one text")
        tokens = [self.tokenize(utf8(text)) for text in texts]
        if truncate:
            tokens = [some[: self._context] for some in tokens]
        out = [row for row in self._embedding_steps(tokens, normalize) if row is not None]
        return np.array(out, np.float32).reshape(len(texts), self.n_embd())

    def _embedding_steps(
        self, texts: list[list[int]], normalize: bool = True
    ) -> Iterator[npt.NDArray[np.float32] | None]:
        """The embeddings of texts of tokens, a step of the engine at a time; None after one that
        ends no text."""
        for number, tokens in enumerate(texts):
            if not tokens:
                raise ModelError(f"text {number} is empty")
            if len(tokens) > self._context:
                raise ContextError(
                    f"text {number} has {len(tokens)} tokens, but the context holds {self._context}"
                )
        for rows in self._sequences.states(texts, self.n_embd()):
            if rows is not None:
                self._check_numbers(rows)
                rows = pooled(rows, self._pooling or MEAN)
                rows = normalized(rows) if normalize else rows
            yield rows

    def _check_numbers(self, outputs: npt.NDArray[np.float32]) -> None:
        if not np.isfinite(outputs).all():
            raise ModelError(f"{self.model_path} is damaged: its results are not numbers")


def _are_ids(items: Sequence[Any]) -> bool:
    return all(isinstance(item, int) for item in items)


def _tools(given: Mapping[str, Any]) -> tuple[Any, Any]:
    """tools and tool_choice of a chat completion, or what these were called earlier."""
    tools, choice = given.get("tools"), given.get("tool_choice")
    if given.get("functions") is not None:
        tools = [{"type": "function", "function": each} for each in given["functions"]]
    if isinstance(given.get("function_call"), Mapping):
        choice = {"type": "function", "function": given["function_call"]}
    return tools, choice
