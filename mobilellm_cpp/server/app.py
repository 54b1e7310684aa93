"""The server as an ASGI application."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import FileResponse, Response
from starlette.staticfiles import StaticFiles

from ..engine.model import MobileLLM
from . import chat, completions, embeddings, ollama, responses
from .errors import ApiError, add_handlers
from .fields import ChatRequest, CompletionRequest, EmbeddingRequest, ResponsesRequest
from .gate import Gate
from .service import Limits, Service

PAGE = Path(__file__).parent / "page"
PAGE_HEADERS = {
    "Cache-Control": "no-cache",
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "connect-src 'self'; img-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def create_app(
    llm: MobileLLM,
    name: str,
    *,
    key: str | None = None,
    hosts: Sequence[str] | None = None,
    origins: Sequence[str] = (),
    limits: Limits | None = None,
) -> FastAPI:
    """llm under a name, for any ASGI server; its lifespan ends the thread that goes on with
    answers, never the model. key, hosts and origins: see gate.Gate."""
    limits = limits or Limits()
    service = Service(llm, name, limits)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        service.close()

    app = FastAPI(
        title="mobilellm", lifespan=lifespan, docs_url=None, redoc_url=None, redirect_slashes=False
    )
    app.state.service = service
    add_handlers(app)

    @app.get("/health")
    async def health() -> dict[str, str]:
        if not service.scheduler.alive():
            raise ApiError(503, "the thread that makes answers is gone; restart the server")
        return {"status": "ok"}

    model = {"id": name, "object": "model", "created": service.created, "owned_by": "mobilellm"}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [model]}

    @app.get("/v1/models/{model_id:path}")
    async def one_model(model_id: str) -> dict[str, Any]:
        service.check_name(model_id)
        return model

    @app.get("/metrics")
    async def metrics() -> Response:
        return service.metrics.response()

    @app.post("/v1/chat/completions")
    async def chat_completions(request: ChatRequest) -> Response:
        return await chat.answer(service, request)

    @app.post("/v1/completions")
    async def text_completions(request: CompletionRequest) -> Response:
        return await completions.answer(service, request)

    @app.post("/v1/responses")
    async def respond(request: ResponsesRequest) -> Response:
        return await responses.answer(service, request)

    @app.post("/v1/embeddings")
    async def embed(request: EmbeddingRequest) -> Response:
        return await embeddings.answer(service, request)

    @app.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)  # ollama asks with HEAD
    async def page() -> Response:
        return FileResponse(PAGE / "index.html", headers=PAGE_HEADERS)

    app.mount("/static", StaticFiles(directory=PAGE))
    app.include_router(ollama.router(service))
    app.add_middleware(
        Gate,
        seen=service.metrics.request,
        key=key,
        hosts=hosts,
        origins=origins,
        max_bytes=limits.max_bytes,
    )
    if origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
        )
    return app
