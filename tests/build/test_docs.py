"""What the documents claim about files and commands."""

import json
import re
import runpy
from pathlib import Path

import numpy as np
import pytest
from checkpoints import make_checkpoint
from safetensors.numpy import save_file

from mobilellm_cpp import convert_checkpoint
from mobilellm_cpp.cache import DEMO

ROOT = Path(__file__).resolve().parents[2]


def test_the_bytes_in_gguf_md_stand_in_a_converted_file(tmp_path):
    text = (ROOT / "docs" / "gguf.md").read_text()
    block = text.split("## Byte for byte")[1].split("```")[1]
    digits = [
        re.match(r"(?:[0-9a-f]{2} )+|(?:[0-9a-f]{2} ?)+", line) for line in block.splitlines()
    ]
    wanted = bytes.fromhex("".join(match[0] for match in digits if match))
    assert len(wanted) == 64
    make_checkpoint(tmp_path / "c", layers=2, sharing=True)
    convert_checkpoint(tmp_path / "c", tmp_path / "m.gguf")
    assert wanted in (tmp_path / "m.gguf").read_bytes()


def test_no_document_names_a_missing_file():
    for document in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for path in re.findall(r"\]\((?!http)([^)#]+)\)", document.read_text()):
            assert (document.parent / path).exists(), f"{document.name} links to {path}"


def test_cli_md_is_the_help_of_the_program():
    page = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    now = runpy.run_path(str(ROOT / "docs" / "cli.py"))["page"]()
    assert page == now, "run `.venv/bin/python docs/cli.py`"


def test_the_examples_of_python_md_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_adapter(tmp_path / "my-adapter")
    names = {}
    page = (ROOT / "docs" / "python.md").read_text()
    for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        try:
            exec(compile(block, "docs/python.md", "exec"), names)
        except Exception as error:
            pytest.fail(f"{type(error).__name__}: {error} in\n{block}")
    assert "Marta Bell" in names["result"]["choices"][0]["message"]["content"]
    assert names["check"].ok


def make_adapter(folder):
    """A PEFT folder for the demo model, of rank 2, over one matrix."""
    width = json.loads((DEMO / "config.json").read_text())["hidden_size"]
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    weights = {name.format("A"): np.ones((2, width), np.float32)}
    weights[name.format("B")] = np.zeros((width, 2), np.float32)
    folder.mkdir()
    save_file(weights, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
