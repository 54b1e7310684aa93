"""Fixtures that several folders of tests use."""

import os
import signal
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # for `import checkpoints`, `import stock`
os.environ.pop("MOBILELLM_KERNELS", None)  # read once a process
os.environ["MOBILELLM_CONFIG"] = os.devnull  # defaults of whoever runs the tests
# a shell's background job ignores Ctrl-C, and so would every program that the tests start and stop
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def llama_cpp_source() -> Path:
    """The unpatched llama.cpp source, converter included."""
    folder = os.environ.get("MOBILELLM_STOCK")
    if not folder:
        pytest.fail("the tests compare with stock llama.cpp: run them with `make test`")
    return Path(folder)


@pytest.fixture(scope="session")
def stock_lib(llama_cpp_source: Path) -> Path:
    """The folder with the unpatched libllama."""
    return llama_cpp_source.with_name(llama_cpp_source.name + "-stock") / "bin"
