"""POST /v1/responses: text and tools. Nothing is stored, so a conversation is sent whole."""

from collections.abc import AsyncIterator
from typing import Any

from ..engine.answers import Stream
from .answers import Answer, Parts, Whole, to_json
from .errors import ApiError
from .fields import ResponsesRequest
from .service import Service, new_id, now
from .tools import Offer, decided, start


async def answer(service: Service, request: ResponsesRequest) -> Answer:
    service.check_name(request.model)
    offer = _offer(service, request)
    messages = request.messages()

    def make() -> Stream:
        return start(service.llm, messages, offer, **request.sampling())

    stream = await service.made(make)
    job = service.submit([stream])
    made = _Response(service, request, offer, stream)

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
    return Offer(tools, choice if isinstance(choice, str) else choice.name, service.template)


class _Response:
    def __init__(
        self, service: Service, request: ResponsesRequest, offer: Offer | None, stream: Stream
    ) -> None:
        self._request, self._offer, self._stream = request, offer, stream
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
            "parallel_tool_calls": False,
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

    async def _said(self, news: Any) -> AsyncIterator[Any]:
        """Pieces of the text, or a call."""
        async for _, piece in news if self._offer is None else decided(self._offer, news):
            if piece is not None:
                yield piece

    async def whole(self, news: Any) -> dict[str, Any]:
        text, call = "", None
        async for piece in self._said(news):
            if isinstance(piece, dict):
                call = piece
            else:
                text += piece
        item = self._message(new_id("msg"), text) if call is None else _call(call, "completed")
        return self._ended([item])

    async def events(self, news: Any) -> AsyncIterator[bytes]:
        number = -1

        def event(kind: str, **fields: Any) -> bytes:
            nonlocal number
            number += 1
            return _event({"type": f"response.{kind}", "sequence_number": number, **fields})

        text, item, begun = "", None, False
        name = new_id("msg")
        at: dict[str, Any] = {"item_id": name, "output_index": 0, "content_index": 0}
        async for piece in self._said(news):
            if not begun:
                begun = True
                yield event("created", response=self._head)
                yield event("in_progress", response=self._head)
            if isinstance(piece, dict):
                item = _call(piece, "completed")
                begin = {**item, "status": "in_progress", "arguments": ""}
                where: dict[str, Any] = {"item_id": item["id"], "output_index": 0}
                said = item["arguments"]
                yield event("output_item.added", output_index=0, item=begin)
                yield event("function_call_arguments.delta", **where, delta=said)
                yield event(
                    "function_call_arguments.done", **where, name=item["name"], arguments=said
                )
                continue
            if not text:
                yield event("output_item.added", output_index=0, item=self._message(name, None))
                yield event("content_part.added", **at, part=_part(""))
            text += piece
            yield event("output_text.delta", **at, delta=piece, logprobs=[])
        if not begun:
            yield event("created", response=self._head)
            yield event("in_progress", response=self._head)
        if item is None:
            if not text:
                yield event("output_item.added", output_index=0, item=self._message(name, None))
                yield event("content_part.added", **at, part=_part(""))
            yield event("output_text.done", **at, text=text, logprobs=[])
            yield event("content_part.done", **at, part=_part(text))
            item = self._message(name, text)
        yield event("output_item.done", output_index=0, item=item)
        ended = self._ended([item])
        yield event(ended["status"], response=ended)


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _call(call: dict[str, Any], status: str) -> dict[str, Any]:
    return {
        "id": new_id("fc"),
        "type": "function_call",
        "status": status,
        "call_id": call["id"],
        **call["function"],
    }
