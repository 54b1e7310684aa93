"""llama-cpp-python's own tests: over our library each ends as it does over the stock library, and
with MobileLLM in the place of Llama those pass that pass there.

The models that they download are replaced by ours, so the tests that look for a certain text or
kind of model fail everywhere. The argument is a model that stock llama.cpp runs; MOBILELLM_STOCK
names its source.
"""

import json
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

PLUGIN = """
import json, os
import huggingface_hub
huggingface_hub.hf_hub_download = lambda *_, **__: os.environ["CLIENT_MODEL"]
if "CLIENT_MOBILELLM" in os.environ:
    import llama_cpp, mobilellm_cpp
    llama_cpp.Llama = mobilellm_cpp.MobileLLM
outcomes = {}
def pytest_runtest_logreport(report):
    if report.when == "call" or report.outcome != "passed":
        outcomes[report.nodeid] = report.outcome
def pytest_sessionfinish(session):
    with open(os.environ["CLIENT_OUTCOMES"], "w") as file:
        json.dump(outcomes, file)
"""
# These look at n_tokens while generate waits: MobileLLM counts the token that it has just yielded.
COUNTS = "exact_cached_prompt_reuse_matches_fresh[llama_cpp_transformer"
source = Path(os.environ["MOBILELLM_STOCK"])
stock = source.with_name(source.name + "-stock") / "bin"


def outcomes(folder, **environment):
    """How each test ends, by its name."""
    out = folder / "outcomes.json"
    out.unlink(missing_ok=True)
    own = {"CLIENT_MODEL": sys.argv[1], "CLIENT_OUTCOMES": str(out), "PYTHONPATH": str(folder)}
    command = ["-m", "pytest", "-q", "-p", "substitutes", "--import-mode=importlib", "tests"]
    done = subprocess.run(
        [sys.executable, "-P", *command],
        cwd=next(folder.glob("llama_cpp_python-*")),
        env={**os.environ, **own, **environment},
        capture_output=True,
        text=True,
    )
    if not out.exists():
        raise SystemExit(f"the tests crash:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return json.loads(out.read_text()), done.stdout


with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    (folder / "substitutes.py").write_text(PLUGIN)
    (sdist,) = source.parent.glob("llama_cpp_python-*.tar.gz")
    with tarfile.open(sdist) as tar:
        wanted = [m for m in tar if "/tests/" in m.name or m.name.endswith("vocab-llama-spm.gguf")]
        tar.extractall(folder, [m for m in wanted if "vendor/llama.cpp/tests" not in m.name])
    expected, _ = outcomes(folder, LLAMA_CPP_LIB_PATH=str(stock))
    assert "passed" in expected.values()
    wrong = []
    found, log = outcomes(folder)
    differ = [test for test, outcome in expected.items() if found.get(test) != outcome]
    if differ:
        wrong.append(f"{log[-20000:]}\nWith Llama these end differently:\n" + "\n".join(differ))
    passing = [test for test, outcome in expected.items() if outcome == "passed"]
    found, log = outcomes(folder, CLIENT_MOBILELLM="1")
    differ = [test for test in passing if found.get(test) != "passed" and COUNTS not in test]
    if differ:
        wrong.append(f"{log[-20000:]}\nWith MobileLLM these do not pass:\n" + "\n".join(differ))
    print(f"{len(passing)} of {len(expected)} tests pass over stock")
    sys.exit("\n".join(wrong) if wrong else 0)
