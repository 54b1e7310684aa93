"""POST /v1/embeddings."""

import base64
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from ..engine.answers import Usage
from ..engine.model import MobileLLM
from .answers import Answer, Whole
from .errors import ApiError
from .fields import EmbeddingRequest
from .service import Service, as_prompts


class Vectors:
    """Embeddings of texts as work for the scheduler: a step of the engine at a time."""

    reads = True  # steps of many tokens

    def __init__(self, llm: MobileLLM, texts: list[list[int]]) -> None:
        total = sum(map(len, texts))
        self.usage: Usage = {
            "prompt_tokens": total,
            "completion_tokens": 0,
            "total_tokens": total,
        }
        self.n_tokens = min(total, llm.n_ctx())  # that have a place at a time, at most
        self.rows: list[npt.NDArray[np.float32]] = []
        self._steps: Iterator[Any] = llm._embedding_steps(texts)

    def advance(self) -> str:
        found = next(self._steps)
        if found is not None:
            self.rows.append(found)
        return ""

    def close(self) -> None:
        self._steps = iter(())


async def answer(service: Service, request: EmbeddingRequest) -> Answer:
    service.check_name(request.model)
    llm = service.llm
    width = llm.n_embd()
    if request.dimensions not in (None, width):
        raise ApiError(400, f"this model has {width} dimensions", param="dimensions")

    def make() -> Vectors:
        return Vectors(llm, [service.tokens(prompt) for prompt in as_prompts(request.input)])

    vectors = await service.made(make)
    job = service.submit([vectors])

    async def whole() -> dict[str, Any]:
        async for _ in job.news():
            pass
        data = [
            {"object": "embedding", "index": index, "embedding": _said(row, request)}
            for index, row in enumerate(vectors.rows)
        ]
        total = vectors.usage["total_tokens"]
        used = {"prompt_tokens": total, "total_tokens": total}
        return {"object": "list", "data": data, "model": service.name, "usage": used}

    return Whole(whole, lambda: service.end(job), service.limits.seconds)


def _said(row: npt.NDArray[np.float32], request: EmbeddingRequest) -> Any:
    if request.encoding_format == "base64":  # what the openai client asks for by itself
        return base64.b64encode(row.astype("<f4").tobytes()).decode()
    return row.tolist()
