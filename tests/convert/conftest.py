"""Fixtures of the conversion tests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from checkpoints import make_checkpoint, tokenizer_model

TYPES = ("f32", "f16", "bf16", "q8_0")

# Runs llama.cpp's converter several times in one process, for its imports take seconds.
UPSTREAM = """
import json, os, runpy, sys
script, jobs = sys.argv[1], json.loads(sys.argv[2])
sys.path.insert(0, os.path.dirname(script))
for source, kind, out in jobs:
    sys.argv = [script, source, "--outtype", kind, "--outfile", out]
    runpy.run_path(script, run_name="__main__")
"""


@pytest.fixture(scope="session")
def upstream(
    tmp_path_factory: pytest.TempPathFactory, llama_cpp_source: Path
) -> dict[tuple[str, str], tuple[Path, Path]]:
    """Checkpoint name and type to the folder and to what llama.cpp's converter made of it."""
    home = tmp_path_factory.mktemp("upstream")

    def make(name: str, **options: Any) -> Path:
        return make_checkpoint(home / name, architecture="LlamaForCausalLM", **options)

    odd = make("odd-rows-v1", dtype="f32", hidden=48, heads=3, kv_heads=3, rope_theta=5e5)
    extended = make("Padded-Vocab", dtype="f16", vocab=530, container="sharded", kv_heads=1)
    rename_tokens(extended)
    folders = [
        make("tied-bf16", dtype="bf16", container="bin"),
        make("untied", dtype="f16", tied=False, head_dim=16),
        odd,
        extended,
    ]
    jobs = [
        (str(folder), kind, str(home / f"{folder.name}-{kind}.gguf"))
        for folder in folders
        for kind in TYPES
    ]
    command = [sys.executable, "-c", UPSTREAM, str(llama_cpp_source / "convert_hf_to_gguf.py")]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    done = subprocess.run(
        [*command, json.dumps(jobs)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return {(Path(s).name, kind): (Path(s), Path(out)) for s, kind, out in jobs}


def rename_tokens(folder: Path) -> None:
    """Give a checkpoint of 530 embeddings a vocabulary of 512 pieces and some added tokens."""
    (folder / "tokenizer.model").write_bytes(tokenizer_model(512))
    (folder / "added_tokens.json").write_text(json.dumps({"<extra>": 512, "<lost>": 999}))
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    settings["added_tokens_decoder"] = {
        "1": {"content": "<s>", "special": True},
        "513": {"content": "<|im_start|>", "special": False},
        "514": {"content": "\u2581word", "special": False},
        "700": {"content": "<beyond>", "special": True},
    }
    settings["chat_template"] = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    settings["add_eos_token"] = True
    settings["add_prefix_space"] = False
    path.write_text(json.dumps(settings))


@pytest.fixture
def untouched(tmp_path: Path) -> Iterator[Path]:
    """An output path that has a file; after the test its folder holds that file and no other."""
    folder = tmp_path / "out"
    folder.mkdir()
    path = folder / "model.gguf"
    path.write_bytes(b"what stood there before")
    yield path
    assert path.read_bytes() == b"what stood there before"
    assert os.listdir(folder) == [path.name]
