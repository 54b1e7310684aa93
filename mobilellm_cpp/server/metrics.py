"""GET /metrics: what the server does, for Prometheus."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from starlette.responses import Response

from .scheduler import Job, Scheduler

SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)


class Metrics:
    """Those of one server, whatever else the process counts."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._registry = registry = CollectorRegistry()
        self._requests = Counter(
            "mobilellm_requests",
            "Requests by path and status.",
            ["path", "status"],
            registry=registry,
        )
        self._seconds = Histogram(
            "mobilellm_request_seconds",
            "From a request to the end of its answer.",
            ["path"],
            buckets=SECONDS,
            registry=registry,
        )
        self._first = Histogram(
            "mobilellm_first_token_seconds",
            "From a request to the first piece of its answer, the time in the queue included.",
            buckets=SECONDS,
            registry=registry,
        )
        self._prompt = Counter(
            "mobilellm_prompt_tokens", "Tokens of prompts that were answered.", registry=registry
        )
        self._made = Counter("mobilellm_completion_tokens", "Tokens of answers.", registry=registry)
        going = Gauge("mobilellm_answers_going", "Answers that go on now.", registry=registry)
        going.set_function(lambda: scheduler.count()[0])
        waiting = Gauge("mobilellm_answers_waiting", "Answers that wait.", registry=registry)
        waiting.set_function(lambda: scheduler.count()[1])

    def request(self, path: str, status: int, seconds: float) -> None:
        self._requests.labels(path, str(status)).inc()
        self._seconds.labels(path).observe(seconds)

    def job(self, job: Job) -> None:
        """A job that has ended."""
        for work in job.works:
            self._prompt.inc(work.usage["prompt_tokens"])
            self._made.inc(work.usage["completion_tokens"])
        if job.first is not None:
            self._first.observe(job.first - job.asked)

    def response(self) -> Response:
        return Response(generate_latest(self._registry), media_type=CONTENT_TYPE_LATEST)
