"""POST /v1/chat/completions."""

from collections.abc import AsyncIterator
from typing import Any

from ..engine.answers import LogProb, Stream
from ..engine.tools import Offer, start
from .answers import DONE, Answer, Parts, Whole, event, event_error
from .errors import ApiError
from .fields import ChatRequest
from .records import Records
from .scheduler import News
from .service import Service, new_id, now, usage
from .tools import offer as offered


async def answer(service: Service, request: ChatRequest) -> Answer:
    service.check_name(request.model)
    n = request.n or 1
    if request.top_logprobs is not None and not request.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs: true", param="top_logprobs")
    offer = _offer(service, request)
    messages = [message.plain() for message in request.messages]

    def make() -> list[Stream]:
        return [
            start(service.llm, messages, offer, _sampling(request, number)) for number in range(n)
        ]

    streams = await service.made(make)
    job = service.submit(streams)
    choices = _Choices(service, request, streams)

    def end() -> None:
        service.end(job)

    if request.stream:
        return Parts(choices.chunks(job.news()), end, service.limits.seconds, event_error)
    return Whole(lambda: choices.whole(job.news()), end, service.limits.seconds)


def _offer(service: Service, request: ChatRequest) -> Offer | None:
    choice = request.tool_choice or "auto"
    if not request.tools or choice == "none":
        if request.tool_choice not in (None, "none", "auto"):
            raise ApiError(400, "tool_choice needs tools", param="tool_choice")
        return None
    if request.form_names():
        raise ApiError(400, f"{request.form_names()[0]} does not go with tools", param="tools")
    tools = [tool.model_dump(exclude_none=True) for tool in request.tools]
    name = choice if isinstance(choice, str) else choice.function.name
    return offered(tools, name, service.template, request.parallel_tool_calls)


def _sampling(request: ChatRequest, number: int) -> dict[str, Any]:
    sampling = request.sampling(number)
    if request.response_format is not None:
        sampling["response_format"] = request.response_format
    if request.logprobs:
        sampling["logprobs"] = request.top_logprobs or 0
    limit = request.max_completion_tokens
    sampling["max_tokens"] = request.max_tokens if limit is None else limit
    return sampling


class _Choices:
    """The choices of one answer, as their texts come."""

    def __init__(self, service: Service, request: ChatRequest, streams: list[Stream]) -> None:
        self._service, self._request, self._streams = service, request, streams
        self._records = Records(streams, without_space=not request.form_names())
        self._head = {
            "id": new_id("chatcmpl"),
            "object": "chat.completion.chunk" if request.stream else "chat.completion",
            "created": now(),
            "model": service.name,
            "system_fingerprint": service.fingerprint,
        }

    async def whole(self, news: News) -> dict[str, Any]:
        texts = [""] * len(self._streams)
        async for number, piece in news:
            texts[number] += piece or ""
        choices = [self._choice(number, text) for number, text in enumerate(texts)]
        return {**self._head, "choices": choices, "usage": self._usage()}

    def _choice(self, number: int, text: str) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        stream = self._streams[number]
        if calls := stream.tool_calls:
            message |= {"content": None, "tool_calls": [call.as_openai() for call in calls]}
        return {
            "index": number,
            "message": message,
            "logprobs": self._logprobs(number, None),
            "finish_reason": stream.finish_reason,
        }

    async def chunks(self, news: News) -> AsyncIterator[bytes]:
        options = self._request.stream_options
        with_usage = bool(options and options.include_usage)
        rest = {"usage": None} if with_usage else {}
        begun: set[int] = set()
        async for number, piece in news:
            choice: dict[str, Any] = {"index": number, "delta": {}, "logprobs": None}
            choice["finish_reason"] = None
            if number not in begun:
                begun.add(number)
                first = {"role": "assistant", "content": "", "refusal": None}
                yield event({**self._head, "choices": [{**choice, "delta": first}], **rest})
            stream = self._streams[number]
            for place, call in enumerate(stream.tool_calls if piece is None else ()):
                delta = {"tool_calls": [{"index": place, **call.as_openai()}]}
                yield event({**self._head, "choices": [{**choice, "delta": delta}], **rest})
            choice["logprobs"] = self._logprobs(number, piece)
            if piece is not None:
                choice["delta"] = {"content": piece}
            else:
                choice["finish_reason"] = stream.finish_reason
            yield event({**self._head, "choices": [choice], **rest})
        if with_usage:
            yield event({**self._head, "choices": [], "usage": self._usage()})
        yield DONE

    def _usage(self) -> dict[str, Any]:
        return usage(self._streams, len(self._streams))

    def _logprobs(self, number: int, piece: str | None) -> dict[str, Any] | None:
        new = self._records.new(number, piece)
        if new is None or (self._request.stream and not new):
            return None
        return {"content": [self._logprob(record) for record in new], "refusal": None}

    def _logprob(self, record: LogProb) -> dict[str, Any]:
        def said(token: int, logprob: float) -> dict[str, Any]:
            text = self._service.token_bytes(token)
            shown = text.decode("utf-8", "replace")
            return {"token": shown, "logprob": logprob, "bytes": list(text)}

        best = [said(*each) for each in record.best]
        return {**said(record.token, record.logprob), "top_logprobs": best}
