"""POST /v1/completions."""

from collections.abc import AsyncIterator
from typing import Any

from ..engine.answers import Stream
from .answers import DONE, Answer, Parts, Whole, event, event_error
from .errors import ApiError
from .fields import MAX_TEXTS, CompletionRequest
from .records import Records
from .service import Service, as_prompts, new_id, now, usage


async def answer(service: Service, request: CompletionRequest) -> Answer:
    service.check_name(request.model)
    n = request.n or 1
    if request.best_of not in (None, n):
        raise ApiError(400, "best_of other than n is not supported", param="best_of")
    if request.suffix:
        raise ApiError(400, "suffix is not supported", param="suffix")
    if request.echo and request.logprobs is not None:
        raise ApiError(400, "echo does not go with logprobs here", param="echo")

    if len(as_prompts(request.prompt)) * n > MAX_TEXTS:
        raise ApiError(400, f"a request makes {MAX_TEXTS} texts at most", param="n")

    def make() -> list[Stream]:
        return [
            service.llm.stream(prompt, **_sampling(request, number))
            for prompt in as_prompts(request.prompt)
            for number in range(n)
        ]

    streams = await service.made(make)
    job = service.submit(streams)
    choices = _Choices(service, request, n, streams)

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


class _Choices:
    def __init__(self, service: Service, request: CompletionRequest, n: int, streams: Any) -> None:
        self._service, self._request, self._streams, self._n = service, request, streams, n
        prompts = as_prompts(request.prompt) if request.echo else []
        self._echoes = [self._text(prompt) for prompt in prompts for _ in range(n)]
        self._records = Records(streams, without_space=False)
        self._length = [len(text) for text in self._echoes] or [0] * len(streams)  # before them
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

    async def whole(self, news: AsyncIterator[tuple[int, str | None]]) -> dict[str, Any]:
        texts = self._echoes or [""] * len(self._streams)
        async for number, piece in news:
            texts[number] += piece or ""
        choices = [self._choice(number, text, True) for number, text in enumerate(texts)]
        return {**self._head, "choices": choices, "usage": usage(self._streams, self._n)}

    async def chunks(self, news: AsyncIterator[tuple[int, str | None]]) -> AsyncIterator[bytes]:
        options = self._request.stream_options
        with_usage = bool(options and options.include_usage)
        rest = {"usage": None} if with_usage else {}
        for number, text in enumerate(self._echoes):
            yield event({**self._head, "choices": [self._choice(number, text, False)], **rest})
        async for number, piece in news:
            choice = self._choice(number, piece or "", piece is None)
            yield event({**self._head, "choices": [choice], **rest})
        if with_usage:
            yield event({**self._head, "choices": [], "usage": usage(self._streams, self._n)})
        yield DONE

    def _choice(self, number: int, text: str, ended: bool) -> dict[str, Any]:
        return {
            "index": number,
            "text": text,
            "logprobs": self._logprobs(number, None if ended else text),
            "finish_reason": self._streams[number].finish_reason if ended else None,
        }

    def _logprobs(self, number: int, piece: str | None) -> dict[str, Any] | None:
        new = self._records.new(number, piece)
        if new is None or (self._request.stream and not new):
            return None
        said: dict[str, Any] = {
            "tokens": [],
            "token_logprobs": [],
            "top_logprobs": [],
            "text_offset": [],
        }
        for record in new:
            text = record.text.decode("utf-8", "replace")
            said["tokens"].append(text)
            said["token_logprobs"].append(record.logprob)
            best = {self._text([token]): logprob for token, logprob in record.best}
            said["top_logprobs"].append(best)
            said["text_offset"].append(self._length[number])
            self._length[number] += len(text)
        return said
