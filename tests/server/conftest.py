"""The demo model, behind a server."""

import pytest
from serving import running

from mobilellm_cpp import MobileLLM
from mobilellm_cpp.cache import resolve


@pytest.fixture(scope="session")
def llm():
    with MobileLLM(resolve(None, None, None), n_threads=1) as llm:
        yield llm


@pytest.fixture(scope="session")
def server(llm):
    with running(llm) as server:
        yield server
