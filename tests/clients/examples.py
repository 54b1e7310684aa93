"""The examples of docs/clients.md, run as they stand."""

import os
import re
import tempfile
from pathlib import Path
from typing import Any

PAGE = Path(__file__).resolve().parents[2] / "docs" / "clients.md"


def run(package: str, model: str) -> dict[str, Any]:
    """Runs the example that imports a package, over a model; the names that it has made."""
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    (example,) = [block for block in blocks if f" {package}" in block]
    names: dict[str, Any] = {}
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.symlink(before / model, Path(folder) / "model.gguf")
        os.chdir(folder)
        try:
            exec(compile(example, PAGE.name, "exec"), names)
        finally:
            os.chdir(before)
    return names
