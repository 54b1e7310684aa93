"""POST /v1/responses: text and tools. Nothing is stored, so a conversation is sent whole."""

from collections.abc import AsyncIterator
from typing import Any

from ..engine.answers import Stream
from ..engine.tools import Offer, ToolCall, start
from .answers import Answer, Parts, Whole, to_json
from .errors import ApiError
from .fields import ResponsesRequest
from .scheduler import News
from .service import Service, new_id, now
from .tools import offer as offered


async def answer(service: Service, request: ResponsesRequest) -> Answer:
    service.check_name(request.model)
    offer = _offer(service, request)
    messages = request.messages()

    def make() -> Stream:
        return start(service.llm, messages, offer, request.sampling())

    stream = await service.made(make)
    job = service.submit([stream])
    made = _Response(service, request, stream)

    def end() -> None:
        service.end(job)

    if request.stream:
        return Parts(made.events(job.news()), end, service.limits.seconds, _error)
    return Whole(lambda: made.whole(job.news()), end, service.limits.seconds)


def _error(error: ApiError) -> bytes:
    said = {"type": "error", "code": error.code, "message": str(error), "param": error.param}
    return _event({**said, "sequence_number": 0})


def _event(value: dict[str, Any]) -> bytes:
    return f"event: {value['type']}\n".encode() + b"data: " + to_json(value) + b"\n\n"


def _offer(service: Service, request: ResponsesRequest) -> Offer | None:
    choice = request.tool_choice or "auto"
    if not request.tools or choice == "none":
        if choice not in ("none", "auto"):
            raise ApiError(400, "tool_choice needs tools", param="tool_choice")
        return None
    if request.response_format() is not None:
        raise ApiError(400, "text.format does not go with tools", param="tools")
    tools = [
        {"type": "function", "function": tool.model_dump(exclude_none=True, exclude={"type"})}
        for tool in request.tools
    ]
    name = choice if isinstance(choice, str) else choice.name
    return offered(tools, name, service.template, request.parallel_tool_calls)


class _Response:
    def __init__(self, service: Service, request: ResponsesRequest, stream: Stream) -> None:
        self._stream = stream
        told = request.model_dump(mode="json", exclude_none=True, by_alias=True)
        self._head: dict[str, Any] = {
            "id": new_id("resp"),
            "object": "response",
            "created_at": now(),
            "status": "in_progress",
            "background": False,
            "error": None,
            "incomplete_details": None,
            "instructions": request.instructions,
            "max_output_tokens": request.max_output_tokens,
            "metadata": request.metadata or {},
            "model": service.name,
            "output": [],
            "parallel_tool_calls": bool(request.parallel_tool_calls),
            "previous_response_id": None,
            "store": False,
            "temperature": request.temperature,
            "text": told.get("text") or {"format": {"type": "text"}},
            "tool_choice": told.get("tool_choice", "auto"),
            "tools": told.get("tools", []),
            "top_p": request.top_p,
            "truncation": "disabled",
            "usage": None,
        }

    def _ended(self, output: list[dict[str, Any]]) -> dict[str, Any]:
        whole = self._stream.finish_reason != "length"
        used = self._stream.usage
        return {
            **self._head,
            "status": "completed" if whole else "incomplete",
            "incomplete_details": None if whole else {"reason": "max_output_tokens"},
            "output": output,
            "usage": {
                "input_tokens": used["prompt_tokens"],
                "input_tokens_details": {"cached_tokens": self._stream.n_found},
                "output_tokens": used["completion_tokens"],
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": used["total_tokens"],
            },
        }

    def _message(self, name: str, text: str | None) -> dict[str, Any]:
        """The item of a text; without one, as it begins."""
        whole = text is not None and self._stream.finish_reason != "length"
        status = "in_progress" if text is None else "completed" if whole else "incomplete"
        content = [] if text is None else [_part(text)]
        return {
            "id": name,
            "type": "message",
            "status": status,
            "role": "assistant",
            "content": content,
        }

    async def whole(self, news: News) -> dict[str, Any]:
        text = "".join([piece async for _, piece in news if piece])
        calls = [_call(call) for call in self._stream.tool_calls]
        return self._ended(calls or [self._message(new_id("msg"), text)])

    async def events(self, news: News) -> AsyncIterator[bytes]:
        number = -1

        def event(kind: str, **fields: Any) -> bytes:
            nonlocal number
            number += 1
            return _event({"type": f"response.{kind}", "sequence_number": number, **fields})

        text, begun = "", False
        name = new_id("msg")
        at: dict[str, Any] = {"item_id": name, "output_index": 0, "content_index": 0}

        def begin_message() -> list[bytes]:
            return [
                event("output_item.added", output_index=0, item=self._message(name, None)),
                event("content_part.added", **at, part=_part("")),
            ]

        async for _, piece in news:
            if not begun:
                begun = True
                yield event("created", response=self._head)
                yield event("in_progress", response=self._head)
            if piece:
                for each in [] if text else begin_message():
                    yield each
                text += piece
                yield event("output_text.delta", **at, delta=piece, logprobs=[])
        items = [_call(call) for call in self._stream.tool_calls]
        for index, item in enumerate(items):
            begin = {**item, "status": "in_progress", "arguments": ""}
            where: dict[str, Any] = {"item_id": item["id"], "output_index": index}
            said = item["arguments"]
            yield event("output_item.added", output_index=index, item=begin)
            yield event("function_call_arguments.delta", **where, delta=said)
            yield event("function_call_arguments.done", **where, name=item["name"], arguments=said)
            yield event("output_item.done", output_index=index, item=item)
        if not items:
            for each in [] if text else begin_message():
                yield each
            yield event("output_text.done", **at, text=text, logprobs=[])
            yield event("content_part.done", **at, part=_part(text))
            items = [self._message(name, text)]
            yield event("output_item.done", output_index=0, item=items[0])
        ended = self._ended(items)
        yield event(ended["status"], response=ended)


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _call(call: ToolCall) -> dict[str, Any]:
    return {
        "id": new_id("fc"),
        "type": "function_call",
        "status": "completed",
        "call_id": call.id,
        **call.as_openai()["function"],
    }
