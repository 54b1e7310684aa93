"""What the endpoints share: the model under its name, its scheduler, and a client's limits."""

import asyncio
import hashlib
import re
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from .. import __version__
from ..engine.answers import Stream
from ..engine.model import MobileLLM
from .errors import ApiError
from .metrics import Metrics
from .scheduler import Job, Scheduler, Work

T = TypeVar("T")


@dataclass
class Limits:
    """max_waiting: requests that wait for a place. seconds: the longest answer. max_bytes: of a
    request."""

    max_waiting: int = 64
    seconds: float = 600.0
    max_bytes: int = 4 << 20


@dataclass
class Service:
    llm: MobileLLM
    name: str
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        self.scheduler = Scheduler(self.llm, self.limits.max_waiting)
        self.metrics = Metrics(self.scheduler)
        stat = Path(self.llm.model_path).stat()
        self.created = int(stat.st_mtime)
        self.bytes = stat.st_size
        words = re.findall(r"\b(?:BF|F|I?Q|TQ)\d\w*", self.llm._model.desc())
        self.kind = words[-1] if words else "unknown"  # Q4_0, F16, ...
        print_of = f"{self.name} {stat.st_size} {stat.st_mtime_ns} {__version__}"
        self.digest = hashlib.sha256(print_of.encode()).hexdigest()
        self.fingerprint = f"fp_{self.digest[:10]}"

    @property
    def template(self) -> str:
        """The model's chat template; empty where it has none."""
        return self.llm.metadata.get("tokenizer.chat_template") or ""

    def close(self) -> None:
        self.scheduler.close()

    def check_name(self, name: str) -> None:
        """A request names the model, so that nobody takes this one for another."""
        if name != self.name:
            raise ApiError(
                404,
                f"the model {name[:100]!r} is not served here; {self.name!r} is",
                code="model_not_found",
                param="model",
            )

    def tokens(self, prompt: str | list[int]) -> list[int]:
        """The ids of a text; ids as they are."""
        if isinstance(prompt, str):
            return self.llm.tokenize(prompt.encode("utf-8", "surrogatepass"))
        return self.llm._checked_tokens(prompt)

    def token_bytes(self, token: int) -> bytes:
        """What a token adds to a text."""
        return self.llm._piece(token, special=True)

    async def made(self, make: Callable[[], T]) -> T:
        """What make() gives, in a thread: texts are tokenized there, and grammars read. Raises Busy
        where submit would."""
        self.scheduler.check_room()
        return await asyncio.to_thread(make)

    def submit(self, works: Sequence[Work]) -> Job:
        """Starts to go on with works. Raises Busy."""
        return self.scheduler.submit(works)

    def end(self, job: Job) -> None:
        """Nobody waits for a job any more; it may have ended by itself."""
        self.scheduler.cancel(job)
        self.metrics.job(job)


def new_id(kind: str) -> str:
    return f"{kind}-{uuid.uuid4().hex}"


def now() -> int:
    return int(time.time())


def as_prompts(given: Any) -> list[Any]:
    """The texts, or lists of token ids, of a field that may hold one or several."""
    return [given] if isinstance(given, str) or isinstance(given[0], int) else list(given)


def usage(streams: Sequence[Stream], n: int = 1) -> dict[str, Any]:
    """Tokens of prompts, of which n streams each were made, and of what was made."""
    prompt = sum(stream.usage["prompt_tokens"] for stream in streams[::n])
    made = sum(stream.usage["completion_tokens"] for stream in streams)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": made,
        "total_tokens": prompt + made,
        "prompt_tokens_details": {"cached_tokens": sum(each.n_found for each in streams[::n])},
    }
