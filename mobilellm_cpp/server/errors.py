"""What a client is told that something is wrong: OpenAI's shape under /v1, Ollama's under /api."""

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from ..errors import ContextError, MobileLLMError
from .scheduler import Busy

RETRY = {"Retry-After": "1"}  # seconds


class ApiError(Exception):
    """An answer that is an error. code: OpenAI's word for it; param: the field it is about."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.param, self.headers = status, code, param, headers

    def body(self, path: str) -> dict[str, Any]:
        if path.startswith("/api/"):
            return {"error": str(self)}
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        error = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        return {"error": error}

    def response(self, path: str) -> JSONResponse:
        return JSONResponse(self.body(path), self.status, self.headers)


def as_api_error(error: Exception) -> ApiError:
    """What to tell a client of an exception."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, Busy):
        return ApiError(
            503, "too many requests wait already; try again", code="overloaded", headers=RETRY
        )
    if isinstance(error, TimeoutError):
        return ApiError(
            503, "the answer took longer than this server allows", code="timeout", headers=RETRY
        )
    if isinstance(error, RequestValidationError):
        first = error.errors()[0]
        places = [str(part) for part in first["loc"] if part != "body"]
        param = ".".join(places) or None
        if first["type"] == "extra_forbidden":
            return ApiError(400, f"Unrecognized request argument supplied: {param}", param=param)
        if first["type"] == "json_invalid":
            return ApiError(400, "the body is not JSON", code="invalid_json")
        where = f"{param}: " if param else ""
        return ApiError(400, where + first["msg"].removeprefix("Value error, "), param=param)
    if isinstance(error, MobileLLMError):
        if isinstance(error, ContextError):
            return ApiError(400, error.said, code="context_length_exceeded")
        return ApiError(400, str(error))
    if isinstance(error, HTTPException):
        return ApiError(error.status_code, str(error.detail), headers=error.headers)
    return ApiError(500, "the server failed; its log says why", code="internal_error")


def add_handlers(app: FastAPI) -> None:
    """Makes each exception of a request such an answer."""

    async def handle(request: Request, error: Exception) -> JSONResponse:
        return as_api_error(error).response(request.url.path)

    for kind in (
        ApiError,
        Busy,
        TimeoutError,
        MobileLLMError,
        RequestValidationError,
        HTTPException,
        Exception,
    ):
        app.add_exception_handler(kind, handle)
