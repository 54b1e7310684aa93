"""POST /v1/completions."""

from collections.abc import AsyncIterator, Sequence
from typing import Any

from ..engine.answers import LogProb, Stream, Usage
from ..engine.scores import Scores
from .answers import DONE, Answer, Parts, Whole, event, event_error
from .errors import ApiError
from .fields import MAX_TEXTS, CompletionRequest
from .records import Records
from .scheduler import News, Work
from .service import Service, as_prompts, new_id, now, usage

Said = list[tuple[str, LogProb | None]]  # texts of tokens with their records; None: the first one


async def answer(service: Service, request: CompletionRequest) -> Answer:
    service.check_name(request.model)
    n = request.n or 1
    if request.best_of not in (None, n):
        raise ApiError(400, "best_of other than n is not supported", param="best_of")
    if request.suffix:
        raise ApiError(400, "suffix is not supported", param="suffix")
    if len(as_prompts(request.prompt)) * n > MAX_TEXTS:
        raise ApiError(400, f"a request makes {MAX_TEXTS} texts at most", param="n")

    def make() -> list[Stream]:
        return [
            service.llm.stream(prompt, **_sampling(request, number))
            for prompt in as_prompts(request.prompt)
            for number in range(n)
        ]

    streams = await service.made(make)
    choices = _Choices(service, request, n, streams)
    job = service.submit(choices.works)

    def end() -> None:
        service.end(job)

    if request.stream:
        return Parts(choices.chunks(job.news()), end, service.limits.seconds, event_error)
    return Whole(lambda: choices.whole(job.news()), end, service.limits.seconds)


def _sampling(request: CompletionRequest, number: int) -> dict[str, Any]:
    sampling = request.sampling(number)
    sampling["max_tokens"] = 16 if request.max_tokens is None else request.max_tokens
    if request.logprobs is not None:
        sampling["logprobs"] = request.logprobs
    return sampling


class _Echoed:
    """A stream behind the log probabilities of its prompt, as one work."""

    def __init__(self, scores: Scores, stream: Stream) -> None:
        self.scores, self._stream = scores, stream

    @property
    def reads(self) -> bool:
        return self.scores.reads or self._stream.reads

    @property
    def n_tokens(self) -> int:
        return self._stream.n_tokens

    @property
    def usage(self) -> Usage:
        return self._stream.usage

    def advance(self) -> str:
        return "" if self.scores.step() else self._stream.advance()

    def close(self) -> None:
        self.scores.close()
        self._stream.close()


class _Choices:
    def __init__(
        self, service: Service, request: CompletionRequest, n: int, streams: list[Stream]
    ) -> None:
        self._service, self._request, self._streams, self._n = service, request, streams, n
        self._prompts = as_prompts(request.prompt) if request.echo else []
        self._echoes = [self._text(prompt) for prompt in self._prompts for _ in range(n)]
        self._records = Records(streams, without_space=False)
        self._length = [len(text) for text in self._echoes] or [0] * len(streams)  # before them
        self._scores: list[Scores] = []  # of prompts
        self.works: Sequence[Work] = streams
        if request.logprobs is not None and self._prompts:
            tokens = map(service.tokens, self._prompts)
            self._scores = [Scores(service.llm, each, request.logprobs) for each in tokens]
            self._length = [0] * len(streams)
            self.works = [
                _Echoed(self._scores[number // n], stream) for number, stream in enumerate(streams)
            ]
        self._head = {
            "id": new_id("cmpl"),
            "object": "text_completion",
            "created": now(),
            "model": service.name,
            "system_fingerprint": service.fingerprint,
        }

    def _text(self, prompt: str | list[int]) -> str:
        if isinstance(prompt, str):
            return prompt
        return b"".join(map(self._service.token_bytes, prompt)).decode("utf-8", "replace")

    async def whole(self, news: News) -> dict[str, Any]:
        texts = self._echoes or [""] * len(self._streams)
        async for number, piece in news:
            texts[number] += piece or ""
        choices = [self._choice(number, text, True) for number, text in enumerate(texts)]
        return {**self._head, "choices": choices, "usage": usage(self._streams, self._n)}

    async def chunks(self, news: News) -> AsyncIterator[bytes]:
        options = self._request.stream_options
        with_usage = bool(options and options.include_usage)
        rest = {"usage": None} if with_usage else {}
        waiting = set(range(len(self._echoes)))  # for their prompt
        async for number, piece in news:
            if number in waiting:
                waiting.discard(number)
                said = self._logprobs(number, self._of_prompt(number) if self._scores else None)
                echo = {"index": number, "text": self._echoes[number], "logprobs": said}
                choice = {**echo, "finish_reason": None}
                yield event({**self._head, "choices": [choice], **rest})
            choice = self._choice(number, piece or "", piece is None)
            yield event({**self._head, "choices": [choice], **rest})
        if with_usage:
            yield event({**self._head, "choices": [], "usage": usage(self._streams, self._n)})
        yield DONE

    def _choice(self, number: int, text: str, ended: bool) -> dict[str, Any]:
        records = self._records.new(number, None if ended else text)
        said: Said | None = None
        if records is not None:
            said = [(record.text.decode("utf-8", "replace"), record) for record in records]
            if not self._request.stream:
                said = [*self._of_prompt(number), *said]
        return {
            "index": number,
            "text": text,
            "logprobs": self._logprobs(number, said),
            "finish_reason": self._streams[number].finish_reason if ended else None,
        }

    def _of_prompt(self, number: int) -> Said:
        """The records of a prompt's tokens. Those of a text spell that text."""
        if not self._scores:
            return []
        given, scores = self._prompts[number // self._n], self._scores[number // self._n]
        said = [
            (self._text([token]), record)
            for token, record in zip(scores.tokens, scores.records, strict=True)
        ]
        if isinstance(given, str):
            if scores.tokens[0] == self._service.llm.token_bos():
                del said[0]
            if said and said[0][0].startswith(" ") and not given.startswith(" "):
                said[0] = (said[0][0][1:], said[0][1])
        return said

    def _logprobs(self, number: int, said: Said | None) -> dict[str, Any] | None:
        if said is None or (self._request.stream and not said):
            return None
        told: dict[str, Any] = {
            "tokens": [text for text, _ in said],
            "token_logprobs": [record and record.logprob for _, record in said],
            "top_logprobs": [
                record and {self._text([token]): logprob for token, logprob in record.best}
                for _, record in said
            ],
            "text_offset": [],
        }
        for text, _ in said:
            told["text_offset"].append(self._length[number])
            self._length[number] += len(text)
        return told
