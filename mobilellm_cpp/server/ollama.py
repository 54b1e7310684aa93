"""Ollama's API, as its clients use it: chat, generate, embed, and what they ask about the model.

As in Ollama, fields and options that are not known are passed over, and answers stream unless they
are asked not to."""

import time
from collections.abc import AsyncIterator, Sequence
from datetime import datetime, timezone
from typing import Any

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import Response

from ..engine.answers import Stream
from ..engine.tools import ToolCall, start
from .answers import Answer, Parts, Whole, to_json
from .embeddings import Vectors
from .errors import ApiError
from .fields import Tool
from .scheduler import Job
from .service import Service
from .tools import offer as offered

VERSION = "0.9.0"  # of Ollama, whose API is meant: clients look at it
LINES = "application/x-ndjson"


class _Fields(BaseModel):
    model_config = ConfigDict(extra="ignore")


class Options(_Fields):
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    typical_p: float | None = None
    repeat_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    num_predict: int | None = None
    stop: list[str] | str | None = None


class _Asked(_Fields):
    model: str
    stream: bool | None = None
    format: str | dict[str, Any] | None = None
    options: Options | None = None
    keep_alive: Any = None

    def sampling(self) -> dict[str, Any]:
        options = self.options or Options()
        found = options.model_dump(exclude_none=True, exclude={"num_predict"})
        if options.num_predict is not None and options.num_predict >= 0:
            found["max_tokens"] = options.num_predict
        if self.format == "json":
            found["response_format"] = {"type": "json_object"}
        elif isinstance(self.format, dict):
            found["json_schema"] = self.format
        elif self.format:
            raise ApiError(400, 'format is "json" or a JSON schema')
        return found


class _Function(_Fields):
    name: str
    arguments: dict[str, Any] = Field(default_factory=dict)


class _Call(_Fields):
    function: _Function


class _Message(_Fields):
    role: str
    content: str | None = None
    images: list[Any] | None = None
    tool_calls: list[_Call] | None = None
    tool_name: str | None = None

    def plain(self) -> dict[str, Any]:
        if self.images:
            raise ApiError(400, "this model reads only text: images cannot be sent")
        message: dict[str, Any] = {"role": self.role, "content": self.content or ""}
        if self.tool_name:
            message["name"] = self.tool_name
        if self.tool_calls:
            message["tool_calls"] = [
                {"id": "", "type": "function", **call.model_dump()} for call in self.tool_calls
            ]
        return message


class ChatAsked(_Asked):
    messages: list[_Message] = Field(default_factory=list)
    tools: list[Tool] | None = None


class GenerateAsked(_Asked):
    prompt: str | None = None
    system: str | None = None
    raw: bool | None = None
    suffix: str | None = None
    images: list[Any] | None = None


class EmbedAsked(_Fields):
    model: str
    input: str | list[str]


class OldEmbedAsked(_Fields):
    model: str
    prompt: str


class ModelAsked(_Fields):
    model: str | None = None
    name: str | None = None  # as it was called before


def router(service: Service) -> APIRouter:
    """The routes under /api."""
    routes = APIRouter(prefix="/api")

    @routes.post("/chat")
    async def chat(request: ChatAsked) -> Response:
        _check_name(service, request.model)
        if not request.messages:
            return _json(_loaded(service, {"message": {"role": "assistant", "content": ""}}))
        messages = [message.plain() for message in request.messages]
        offer = None
        if request.tools:
            if request.format:
                raise ApiError(400, "format does not go with tools")
            tools = [tool.model_dump(exclude_none=True) for tool in request.tools]
            offer = offered(tools, "auto", service.template)
        sampling = request.sampling()
        stream = await service.made(lambda: start(service.llm, messages, offer, sampling))

        def said(piece: str, calls: Sequence[ToolCall] = ()) -> dict[str, Any]:
            message: dict[str, Any] = {"role": "assistant", "content": piece}
            if calls:
                message["tool_calls"] = [
                    {"function": {"name": call.name, "arguments": call.arguments}} for call in calls
                ]
            return {"message": message}

        return _answer(service, request, stream, said)

    @routes.post("/generate")
    async def generate(request: GenerateAsked) -> Response:
        _check_name(service, request.model)
        if request.suffix or request.images:
            raise ApiError(400, f"{'suffix' if request.suffix else 'images'} is not supported")
        prompt = request.prompt
        if not prompt:
            return _json(_loaded(service, {"response": ""}))
        sampling = request.sampling()
        system = [{"role": "system", "content": request.system}] if request.system else []
        messages = [*system, {"role": "user", "content": prompt}]
        stream = await service.made(
            lambda: service.llm.stream(prompt if request.raw else messages, **sampling)
        )
        return _answer(service, request, stream, lambda piece, _=(): {"response": piece})

    @routes.post("/embed")
    async def embed(request: EmbedAsked) -> Response:
        texts = [request.input] if isinstance(request.input, str) else request.input
        return await _embed(service, request.model, texts, old=False)

    @routes.post("/embeddings")
    async def old_embed(request: OldEmbedAsked) -> Response:
        return await _embed(service, request.model, [request.prompt], old=True)

    @routes.get("/version")
    async def version() -> dict[str, str]:
        return {"version": VERSION}

    @routes.get("/tags")
    async def tags() -> dict[str, Any]:
        return {"models": [_entry(service)]}

    @routes.get("/ps")
    async def running() -> dict[str, Any]:
        never = {"expires_at": "9999-12-31T23:59:59Z", "size_vram": 0}
        return {"models": [{**_entry(service), **never}]}

    @routes.post("/show")
    async def show(request: ModelAsked) -> dict[str, Any]:
        _check_name(service, request.model or request.name or "")
        known = service.llm.metadata
        return {
            "modelfile": f"FROM {service.name}",
            "parameters": "",
            "template": service.template,
            "details": _entry(service)["details"],
            "model_info": {key: value for key, value in known.items() if "template" not in key},
            "capabilities": ["completion", "tools", "embedding"],
            "modified_at": _entry(service)["modified_at"],
        }

    return routes


def _check_name(service: Service, name: str) -> None:
    if name.removesuffix(":latest") != service.name.removesuffix(":latest"):
        raise ApiError(404, f"model {name[:100]!r} not found; {service.name!r} is served here")


def _entry(service: Service) -> dict[str, Any]:
    known = service.llm.metadata
    family = known.get("general.architecture", "")
    count = service.llm._model.n_params()
    name = service.name if ":" in service.name else f"{service.name}:latest"
    return {
        "name": name,
        "model": name,
        "modified_at": _time(service.created),
        "size": service.bytes,
        "digest": service.digest,
        "details": {
            "parent_model": "",
            "format": "gguf",
            "family": family,
            "families": [family],
            "parameter_size": f"{count / 1e6:.0f}M" if count < 1e9 else f"{count / 1e9:.1f}B",
            "quantization_level": service.kind,
        },
    }


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, timezone.utc).isoformat().replace("+00:00", "Z")


def _json(value: dict[str, Any]) -> Response:
    return Response(to_json(value), media_type="application/json")


def _loaded(service: Service, said: dict[str, Any]) -> dict[str, Any]:
    """The answer to who asks nothing, so that the model is there."""
    head = {"model": service.name, "created_at": _time(time.time())}
    return {**head, **said, "done": True, "done_reason": "load"}


def _answer(service: Service, request: _Asked, stream: Stream, said: Any) -> Answer:
    job = service.submit([stream])

    def end() -> None:
        service.end(job)

    def line(fields: dict[str, Any]) -> dict[str, Any]:
        return {"model": request.model, "created_at": _time(time.time()), **fields}

    async def parts() -> AsyncIterator[bytes]:
        async for _, piece in job.news():
            if piece is not None:
                yield to_json(line({**said(piece), "done": False})) + b"\n"
        if stream.tool_calls:
            yield to_json(line({**said("", stream.tool_calls), "done": False})) + b"\n"
        yield to_json(line({**said(""), **_ended(job, stream)})) + b"\n"

    async def whole() -> dict[str, Any]:
        text = "".join([piece async for _, piece in job.news() if piece])
        return line({**said(text, stream.tool_calls), **_ended(job, stream)})

    if request.stream is False:
        return Whole(whole, end, service.limits.seconds)
    error = lambda error: to_json(error.body("/api/")) + b"\n"  # noqa: E731
    return Parts(parts(), end, service.limits.seconds, error, LINES)


def _ended(job: Job, stream: Stream) -> dict[str, Any]:
    """The last line: counts, and durations in nanoseconds."""
    now, used = time.monotonic(), stream.usage
    first = job.first or now
    return {
        "done": True,
        "done_reason": "stop" if stream.tool_calls else stream.finish_reason,
        "total_duration": int(1e9 * (now - job.asked)),
        "load_duration": 0,
        "prompt_eval_count": used["prompt_tokens"],
        "prompt_eval_duration": int(1e9 * (first - job.asked)),
        "eval_count": used["completion_tokens"],
        "eval_duration": int(1e9 * (now - first)),
    }


async def _embed(service: Service, name: str, texts: list[str], old: bool) -> Answer | Response:
    _check_name(service, name)
    if not texts:
        return _json({"model": name, "embeddings": []})
    vectors = await service.made(
        lambda: Vectors(service.llm, [service.tokens(text) for text in texts])
    )
    job = service.submit([vectors])

    async def whole() -> dict[str, Any]:
        async for _ in job.news():
            pass
        rows = [row.tolist() for row in vectors.rows]
        if old:
            return {"embedding": rows[0]}
        return {
            "model": name,
            "embeddings": rows,
            "total_duration": int(1e9 * (time.monotonic() - job.asked)),
            "load_duration": 0,
            "prompt_eval_count": vectors.usage["prompt_tokens"],
        }

    return Whole(whole, lambda: service.end(job), service.limits.seconds)
