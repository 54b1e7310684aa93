"""MobileLLM: a GGUF file as a Python object, and a llama_cpp.Llama: what takes one takes it."""

import codecs
import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import ModelError
from ..quant.types import WeightType
from .gguf_file import context_length, kv_bytes, open_gguf
from .library import Pieces, decode, guard, llama_cpp, sample, tokenize
from .llama_base import Formatter, LlamaBase
from .threads import default_threads

Message = dict[str, str]  # {"role": "system" | "user" | "assistant", "content": ...}

# For files without a chat template: the base models, which continue a dialogue as text.
PLAIN_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'system' %}{{ m['content'] }}\n"
    "{% elif m['role'] == 'user' %}User: {{ m['content'] }}\nAssistant:"
    "{% else %} {{ m['content'] }}\n{% endif %}{% endfor %}"
)
MAX_THREADS = 512  # of ggml
PLAIN_STOP: tuple[str, ...] = ("\nUser:", "\nAssistant:")


def _memory() -> int:
    """Bytes of this machine's memory."""
    if not hasattr(os, "sysconf"):
        return sys.maxsize
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _bytes(text: str) -> bytes:
    """UTF-8; what no UTF-8 can say (undecodable bytes of a shell) is left to the tokenizer."""
    return text.encode("utf-8", "surrogatepass")


def _check_messages(messages: Sequence[Message]) -> None:
    sound = isinstance(messages, (list, tuple)) and all(
        isinstance(message, dict)
        and isinstance(message.get("role"), str)
        and isinstance(message.get("content"), str)
        for message in messages
    )
    if not messages or not sound:
        raise ModelError('messages must be a list of {"role": ..., "content": ...}, at least one')


class MobileLLM(LlamaBase):
    """A loaded model.

    model_path: a GGUF file of architecture `mobilellm`, or any that llama.cpp runs.
    n_ctx: context in tokens; 0 takes what the file says, at most 8192.
    n_threads: 0 takes the physical cores, or as many as a container's CPU quota is worth.
    flash_attn: None is on, which a quantized KV cache needs, except for an f32 KV cache, which
    upstream's flash attention would round to f16.
    Other arguments are those of llama_cpp.Llama; logging is off, and so is swa_full: the KV cache
    of a layer with a sliding window holds the window, not the context. Raises ModelError with the
    reason when the file cannot be used.
    """

    def __init__(
        self,
        model_path: str | os.PathLike[str],
        *,
        n_ctx: int = 0,
        n_threads: int = 0,
        flash_attn: bool | None = None,
        verbose: bool = False,
        **kwargs: Any,
    ) -> None:
        self._stack = contextlib.ExitStack()  # what Llama.__del__ closes, should we stop early
        path = os.fspath(model_path)
        threads = n_threads or default_threads()
        kwargs.setdefault("n_threads_batch", threads)
        for name, value, low, high in [
            ("n_ctx", n_ctx, 0, 1 << 28),
            ("n_batch", kwargs.get("n_batch", 1), 1, 1 << 28),
            ("n_threads", threads, 1, MAX_THREADS),
            ("n_threads_batch", kwargs["n_threads_batch"], 1, MAX_THREADS),
        ]:
            if not low <= value <= high:
                raise ModelError(f"{name} is {value}, outside {low} to {high}")
        lora = kwargs.get("lora_path")
        if lora is not None and not os.path.isfile(lora):
            raise ModelError(f"{lora}: no such file")
        if not kwargs.get("embedding"):  # else pooled outputs take the place of those of tokens
            kwargs.setdefault("pooling_type", llama_cpp.LLAMA_POOLING_TYPE_NONE)
        kwargs.setdefault("swa_full", False)
        if flash_attn is None:
            flash_attn = llama_cpp.GGML_TYPE_F32 not in (kwargs.get("type_k"), kwargs.get("type_v"))
        needed = 0
        with open_gguf(path) as file:
            self._context = n_ctx or min(context_length(file) or 512, 8192)
            with contextlib.suppress(ModelError):  # the loader says it better
                needed = kv_bytes(file, self._context)
        if needed > _memory():
            raise ModelError(
                f"{path}: a context of {self._context} tokens needs a KV cache of "
                f"{needed / 2**30:.0f} GiB, more memory than this machine has"
            )
        with guard(path, verbose):
            super().__init__(
                path,
                n_ctx=self._context,
                n_threads=threads,
                flash_attn=flash_attn,
                verbose=verbose,
                **kwargs,
            )
        self._piece = Pieces(self._model.vocab)
        self._model.detokenize = self._piece.text  # completions ask for all of it each time
        self._ctx.decode = lambda batch: decode(self.ctx, batch.batch)
        self._ctx.kv_cache_seq_rm = self._remove
        template = self.metadata.get("tokenizer.chat_template")
        self._stop = () if template else PLAIN_STOP
        self._template = Formatter(
            template=template or PLAIN_TEMPLATE,
            eos_token=self._token_text(self.token_eos()),
            bos_token=self._token_text(self.token_bos()),
        )
        if not template and not {"chat_format", "chat_handler"} & set(kwargs):
            handler = llama_cpp.llama_chat_format.chat_formatter_to_chat_completion_handler
            self._chat_handlers["plain"] = handler(self._plain)
            self.chat_format: str | None = "plain"

    def _remove(self, sequence: int, start: int, stop: int) -> bool:
        """Forgets positions; False, and nothing done, where what is kept cannot be continued:
        sliding layers may have dropped tokens that the one at start would see."""
        sequence = max(sequence, 0)
        memory = llama_cpp.llama_get_memory(self.ctx)
        window = llama_cpp.llama_model_n_swa(self.model)
        if window and start > 0:
            first = llama_cpp.llama_memory_seq_pos_min(memory, sequence)
            if first > max(0, start - window + 1):
                return False
        return bool(llama_cpp.llama_memory_seq_rm(memory, sequence, start, stop))

    def _plain(self, **arguments: Any) -> Any:
        """The plain template for create_chat_completion, with the stop strings it needs."""
        formatted = self._template(**arguments)
        formatted.stop = [*PLAIN_STOP, *formatted.stop]
        return formatted

    @classmethod
    def from_checkpoint(
        cls,
        source: str | Path,
        type: WeightType = "q4_0",
        *,
        revision: str | None = None,
        **kwargs: Any,
    ) -> "MobileLLM":
        """The model of a checkpoint folder or hub id, converted to `type` once and cached.

        The cache is keyed by the checkpoint's content. kwargs go to MobileLLM. Raises
        CheckpointError when the checkpoint cannot be converted.
        """
        from ..cache import converted

        return cls(converted(source, type, revision=revision), **kwargs)

    def n_ctx(self) -> int:
        """The context in tokens as asked for. llama.cpp rounds it up; Llama's buffers do not."""
        return self._context

    def tokenize(self, text: bytes, add_bos: bool = True, special: bool = False) -> list[int]:
        """Token ids of UTF-8 text. Raises ModelError where the vocabulary cannot spell it."""
        return tokenize(self._model.vocab, text, add_bos, special)

    def chat_tokens(self, messages: Sequence[Message]) -> list[int]:
        """The prompt for the next answer: the file's chat template over messages, as token ids.

        Files without a template get plain `User:` and `Assistant:` lines. Special tokens that are
        written out in a message count as such.
        """
        _check_messages(messages)
        try:
            prompt = self._template(messages=list(messages)).prompt
        except Exception as error:  # templates are programs of strangers
            reason = " ".join(str(error).split())
            raise ModelError(f"the chat template of this file fails: {reason}") from error
        # the template writes bos itself when it wants one
        tokens = self.tokenize(_bytes(prompt), add_bos=False, special=True)
        bos = self.token_bos()
        if self._model.add_bos_token() and bos >= 0 and tokens[:1] != [bos]:
            tokens.insert(0, bos)
        return tokens

    def stream(
        self,
        prompt: str | Sequence[Message],
        *,
        max_tokens: int | None = None,
        temperature: float = 0.8,
        top_k: int = 40,
        top_p: float = 0.95,
        min_p: float = 0.05,
        repeat_penalty: float = 1.0,
        seed: int | None = None,
        stop: Sequence[str] = (),
    ) -> Iterator[str]:
        """Yields the continuation of a text, or the answer to messages, in pieces as it is made.

        Ends at an end-of-text token, at a stop string (not yielded), after max_tokens, or where
        the context is full. temperature 0 is greedy; the same seed gives the same text. One model
        holds one context: end a stream before the next one begins. Raises ModelError when the
        prompt does not fit into the context.
        """
        stop = (stop,) if isinstance(stop, str) else tuple(stop)
        if max_tokens is not None and max_tokens < 0:
            raise ModelError(f"max_tokens is {max_tokens}; leave it out for no limit")
        if isinstance(prompt, str):
            tokens = self.tokenize(_bytes(prompt), special=True)
        else:
            tokens = self.chat_tokens(prompt)
            stop += self._stop
        room = self.n_ctx() - len(tokens)
        if room < 1:
            raise ModelError(
                f"the prompt has {len(tokens)} tokens, and the context holds {self.n_ctx()}"
            )
        if not tokens:
            raise ModelError("the prompt is empty")
        budget = room if max_tokens is None else min(room, max_tokens)
        pieces = self._pieces(
            tokens,
            budget,
            seed,
            temp=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repeat_penalty=repeat_penalty,
        )
        text = _until_stop(pieces, stop)
        return text if isinstance(prompt, str) else _without_leading_space(text)

    def _pieces(
        self, tokens: list[int], budget: int, seed: int | None, **sampling: Any
    ) -> Iterator[str]:
        """Up to budget generated tokens as text; bytes that are no UTF-8 become U+FFFD."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.set_seed(llama_cpp.LLAMA_DEFAULT_SEED if seed is None else seed)
        if budget > 0:
            for count, token in enumerate(self.generate(tokens, **sampling), start=1):
                if llama_cpp.llama_vocab_is_eog(self._model.vocab, token):
                    break
                yield decoder.decode(self._piece(token))
                if count == budget:
                    break
        yield decoder.decode(b"", final=True)

    def chat(self, messages: Sequence[Message], **sampling: Any) -> str:
        """The answer to messages, whole. sampling: the arguments of stream."""
        return "".join(self.stream(messages, **sampling))

    def _init_sampler(self, *arguments: Any, **sampling: Any) -> Any:
        """Llama's chain of samplers, in one call that refuses logits that are no numbers."""
        sampler = super()._init_sampler(*arguments, **sampling)
        chain, path = sampler.sampler, self.model_path
        n_best = 0 if arguments else _best_needed(**sampling)
        sampler.sample = lambda context, idx=-1: sample(chain, context.ctx, idx, n_best, path)
        return sampler

    def _check_numbers(self, outputs: npt.NDArray[np.float32]) -> None:
        if not np.isfinite(outputs).all():
            raise ModelError(f"{self.model_path} is damaged: what it computes are no numbers")

    def logits(
        self, tokens: Sequence[int], positions: Sequence[int] | None = None
    ) -> npt.NDArray[np.float32]:
        """float32 [n_tokens, n_vocab]: the logits after each of tokens, from an empty context; with
        positions [len(positions), n_vocab]: those after the tokens at these places.

        Raises ModelError for no tokens, more than n_ctx, or ids outside the vocabulary.
        """
        tokens = [int(token) for token in tokens]
        wanted = np.arange(len(tokens))[slice(None) if positions is None else list(positions)]
        out = np.empty((len(wanted), self.n_vocab()), np.float32)
        for start, stop in self._decode(tokens):
            got = np.ctypeslib.as_array(self._ctx.get_logits(), (stop - start, self.n_vocab()))
            here = (start <= wanted) & (wanted < stop)
            out[here] = got[wanted[here] - start]
        self.reset()
        self._check_numbers(out)
        return out

    def embeddings(self, texts: Sequence[str], normalize: bool = True) -> npt.NDArray[np.float32]:
        """float32 [len(texts), n_embd]: the mean over a text's tokens of the last hidden state
        (after the final norm), scaled to length 1 unless normalize is False."""
        if isinstance(texts, str):
            raise ModelError("embeddings takes a list of texts, not one text")
        out = np.empty((len(texts), self.n_embd()), np.float32)
        llama_cpp.llama_set_embeddings(self.ctx, True)
        try:
            for row, text in zip(out, texts, strict=True):
                tokens = self.tokenize(_bytes(text))
                total = np.zeros(self.n_embd(), np.float64)
                for start, stop in self._decode(tokens):
                    pointer = llama_cpp.llama_get_embeddings(self.ctx)
                    got = np.ctypeslib.as_array(pointer, (stop - start, self.n_embd()))
                    self._check_numbers(got)
                    total += got.sum(0, dtype=np.float64)
                row[:] = total / len(tokens)
        finally:
            llama_cpp.llama_set_embeddings(self.ctx, self.context_params.embeddings)
            self.reset()
        if normalize:
            lengths = np.linalg.norm(out.astype(np.float64), axis=1, keepdims=True)
            out = (out / np.maximum(lengths, 1e-12)).astype(np.float32)
        return out

    def _decode(self, tokens: Sequence[int]) -> Iterator[tuple[int, int]]:
        """Runs tokens from an empty context, batch by batch, with an output for each; yields
        [start, stop) of each batch while its outputs can be read."""
        n_vocab = self.n_vocab()
        if not tokens or len(tokens) > self.n_ctx():
            raise ModelError(
                f"{len(tokens)} tokens given, and the context holds 1 to {self.n_ctx()}"
            )
        if bad := [token for token in tokens if not 0 <= token < n_vocab]:
            raise ModelError(f"token {bad[0]} is outside the vocabulary of {n_vocab}")
        self.reset()
        self._ctx.kv_cache_clear()
        for start in range(0, len(tokens), self.n_batch):
            batch = tokens[start : start + self.n_batch]
            self._batch.set_batch(batch=batch, n_past=start, logits_all=True)
            self._ctx.decode(self._batch)
            yield start, start + len(batch)

    def _token_text(self, token: int) -> str:
        return self._model.token_get_text(token) if token >= 0 else ""


def _best_needed(
    top_k: int = 40,
    temp: float = 0.8,
    repeat_penalty: float = 1.0,
    frequency_penalty: float = 0.0,
    presence_penalty: float = 0.0,
    mirostat_mode: int = 0,
    logits_processor: Any = None,
    grammar: Any = None,
    **_: Any,
) -> int:
    """How many of the likeliest tokens Llama's chain of samplers starts from; 0: from all, or from
    more than its top-k finds by a sort of all (128)."""
    penalties = (repeat_penalty, frequency_penalty, presence_penalty)
    if logits_processor is not None or grammar is not None or penalties != (1, 0, 0):
        return 0
    if temp == 0:
        return 1
    return top_k if temp > 0 and mirostat_mode == 0 and 0 < top_k <= 128 else 0


def _until_stop(pieces: Iterator[str], stop: Sequence[str]) -> Iterator[str]:
    """Passes pieces on up to the first stop string; holds back what may become one."""
    held = ""
    for piece in pieces:
        held += piece
        found = min((at for text in stop if (at := held.find(text)) >= 0), default=-1)
        if found >= 0:
            held = held[:found]
            break
        safe = len(held) - max((_overlap(held, text) for text in stop), default=0)
        if safe:
            yield held[:safe]
            held = held[safe:]
    if held:
        yield held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of text that begins stop."""
    return next(n for n in range(min(len(text), len(stop)), -1, -1) if text.endswith(stop[:n]))


def _without_leading_space(pieces: Iterator[str]) -> Iterator[str]:
    started = False
    for piece in pieces:
        if not started:
            piece = piece.lstrip(" ")
        started = started or bool(piece)
        if piece:
            yield piece
