"""A text while it is made: its pieces, why it ended, and what is cut from it."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypedDict

import numpy as np
import numpy.typing as npt

from .sequence import Sequence as TokenSequence
from .tools import ToolCall


class LogProb(NamedTuple):
    """A token of an answer: its id and bytes, the log of its probability, before anything was done
    to the distribution, and the likeliest tokens there with theirs."""

    token: int
    text: bytes
    logprob: float
    best: list[tuple[int, float]]


class Usage(TypedDict):
    """Tokens of a prompt and of what follows it."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Stream(Iterator[str]):
    """The pieces of a text as it is made. Once it has ended, finish_reason says why: "stop" (the
    model ended it, or a stop string came), "length" (max_tokens, or the context is full). usage
    counts the tokens so far. logprobs, where they were asked for, has a record for each token of
    the text. tool_calls: the functions that it has called, where tools were offered; it has no text
    then, and finish_reason is "tool_calls". close() ends it."""

    def __init__(self, n_prompt: int) -> None:
        self.finish_reason: str | None = None
        self.logprobs: list[LogProb] | None = None
        self.tool_calls: list[ToolCall] = []
        self._n_prompt = n_prompt
        self._n_made = 0
        self._n_found = 0
        self._pieces: Any = iter(())
        self._sequence: TokenSequence | None = None
        self._sampler: Any = None

    @property
    def usage(self) -> Usage:
        return {
            "prompt_tokens": self._n_prompt,
            "completion_tokens": self._n_made,
            "total_tokens": self._n_prompt + self._n_made,
        }

    def __next__(self) -> str:
        piece = ""
        while not piece:
            piece = next(self._pieces)
        return piece

    def advance(self) -> str:
        """One step of the engine at most, for a thread that goes on with several streams: the text
        that came of it, often none. Raises StopIteration at the end."""
        if self._sequence is not None and not self._sequence.step(self._sampler):
            return ""
        piece: str = next(self._pieces)
        return piece

    @property
    def reads(self) -> bool:
        """Whether the prompt is still to be computed, which takes longer steps than an answer."""
        return self._sequence is not None and self._sequence.reads

    @property
    def n_found(self) -> int:
        """Tokens of the prompt that an earlier one began with, so that they were not computed
        again."""
        return self._n_found

    @property
    def n_tokens(self) -> int:
        """Tokens of the prompt and of the text so far."""
        return self._n_prompt + self._n_made

    def close(self) -> None:
        """Ends it; its place is free."""
        self._pieces.close()
        self._sequence = None

    def _stop(self, text: str) -> None:
        """A stop string came: text, the end of what was made, does not count, nor do the records of
        tokens within it."""
        self.finish_reason, self._sequence = "stop", None
        rest = len(text.encode("utf-8", "replace"))
        while self.logprobs and len(self.logprobs[-1].text) <= rest:
            rest -= len(self.logprobs.pop().text)


class Answer(str):
    """An answer; finish_reason, usage and logprobs are those of Stream. tool_calls are the
    functions that it calls; then it has no text, and finish_reason is "tool_calls"."""

    finish_reason: str | None
    usage: Usage
    logprobs: list[LogProb] | None
    tool_calls: list[ToolCall]

    @classmethod
    def of(cls, text: str, stream: Stream) -> "Answer":
        """What a stream that has ended has given."""
        answer = cls(text)
        answer.finish_reason, answer.usage = stream.finish_reason, stream.usage
        answer.logprobs, answer.tool_calls = stream.logprobs, stream.tool_calls
        return answer

    def message(self) -> dict[str, Any]:
        """The assistant's message that it is, in OpenAI's form."""
        calls = [call.as_openai() for call in self.tool_calls]
        return {
            "role": "assistant",
            "content": str(self),
            **({"tool_calls": calls} if calls else {}),
        }


class Bias:
    """A logits processor: adds to the logits of tokens."""

    def __init__(self, bias: Mapping[int, float]) -> None:
        self._tokens, self._added = list(bias), np.array(list(bias.values()), np.float32)

    def __call__(self, _: Any, logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        logits[self._tokens] += self._added
        return logits


def log_prob(token: int, text: bytes, logits: npt.NDArray[np.float32], n_best: int) -> LogProb:
    top = float(logits.max())
    total = top + math.log(float(np.exp(logits - top, dtype=np.float64).sum()))
    some = np.argpartition(-logits, n_best)[:n_best] if n_best < len(logits) else range(len(logits))
    best = sorted(((int(i), float(logits[i]) - total) for i in some), key=lambda b: (-b[1], b[0]))
    return LogProb(token, text, float(logits[token]) - total, best)


def until_stop(
    pieces: Iterator[str], stop: Sequence[str], stream: Stream | None = None
) -> Iterator[str]:
    """Passes pieces on up to the first stop string, a text for each; holds back what may become
    one."""
    held = ""
    for piece in pieces:
        held += piece
        found = min((at for text in stop if (at := held.find(text)) >= 0), default=-1)
        if found >= 0:
            if stream is not None:
                stream._stop(held[found:])
            held = held[:found]
            break
        safe = len(held) - max((_overlap(held, text) for text in stop), default=0)
        yield held[:safe]
        held = held[safe:]
    if held:
        yield held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of text that begins stop."""
    return next(n for n in range(min(len(text), len(stop)), -1, -1) if text.endswith(stop[:n]))


def without_leading_space(pieces: Iterator[str]) -> Iterator[str]:
    started = False
    for piece in pieces:
        if not started:
            piece = piece.lstrip(" ")
        started = started or bool(piece)
        yield piece


def chunks_without_leading_space(chunks: Iterator[Any]) -> Iterator[Any]:
    """Chunks of a chat completion, each with at most one choice."""
    started = False
    for chunk in chunks:
        for choice in chunk["choices"]:
            content = choice["delta"].get("content")
            if isinstance(content, str) and not started:
                choice["delta"]["content"] = content.lstrip(" ")
                started = bool(choice["delta"]["content"])
        yield chunk
