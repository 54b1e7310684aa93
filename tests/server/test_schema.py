"""Schemathesis over the server's own OpenAPI: whatever is sent, the server does not fail.

`SCHEMATHESIS_EXAMPLES=1000 pytest tests/server/test_schema.py` looks longer."""

import os

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from serving import running

from mobilellm_cpp import MobileLLM
from mobilellm_cpp.cache import resolve

EXAMPLES = int(os.environ.get("SCHEMATHESIS_EXAMPLES", "6"))


@pytest.fixture(scope="module")
def small():
    """A server whose answers are short: the context holds 128 tokens."""
    with (
        MobileLLM(resolve(None, None, None), n_threads=1, n_ctx=128) as llm,
        running(llm) as server,
    ):
        yield server
        assert server.idle()


@pytest.mark.parametrize("mode", list(schemathesis.GenerationMode))
def test_nothing_makes_it_fail(small, mode):
    schema = schemathesis.openapi.from_url(f"{small.url}/openapi.json")
    seen = set()
    statuses = set()
    for result in schema.get_all_operations():
        operation = result.ok()

        @given(operation.as_strategy(generation_mode=mode))
        @settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
        def call(case):
            if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
                case.body["model"] = "demo"  # or all would end there
            response = case.call()
            statuses.add(response.status_code)
            assert response.status_code < 500, (case.as_curl_command(), response.text)

        try:
            call()
        except Unsatisfiable:
            continue  # there is nothing to spoil: no parameter and no body
        seen.add(operation.label)
    assert "POST /v1/chat/completions" in seen and "POST /api/chat" in seen
    assert {200, 400} & statuses
