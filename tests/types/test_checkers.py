"""Type checkers find errors in a user's program, and none where there are none."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def mypy(script, folder):
    result = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--cache-dir", folder / "cache", script],
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert result.returncode in (0, 1), result.stderr
    return {int(n) for n in re.findall(rf"^{script.name}:(\d+): error", result.stdout, re.M)}


def pyright(script, folder):
    result = subprocess.run(
        [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable, script],
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert result.returncode in (0, 1), result.stderr
    found = json.loads(result.stdout)["generalDiagnostics"]
    return {d["range"]["start"]["line"] + 1 for d in found if d["severity"] == "error"}


@pytest.mark.parametrize("checker", [mypy, pyright])
@pytest.mark.parametrize("name", ["right.py", "wrong.py"])
def test_checker(checker, name, tmp_path):
    script = tmp_path / name  # away from the folders of this repository
    script.write_text((HERE / name).read_text())
    lines = script.read_text().splitlines()
    wrong = {number for number, line in enumerate(lines, start=1) if "# <-" in line}
    assert checker(script, tmp_path) == wrong
