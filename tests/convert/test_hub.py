"""A hub id is fetched from the hub: here a small server that answers as the hub does."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from checkpoints import make_checkpoint
from mobilellm_cpp.convert import convert_checkpoint

COMMIT = "0123456789abcdef0123456789abcdef01234567"

# In a process of its own, for huggingface_hub reads its settings when it is imported.
WORKER = """
import sys
from mobilellm_cpp.convert import convert_checkpoint
from mobilellm_cpp.errors import CheckpointError
try:
    print(convert_checkpoint(sys.argv[1], sys.argv[2], revision=sys.argv[3] or None).notes)
except CheckpointError as error:
    sys.exit(str(error))
"""


class Hub(ThreadingHTTPServer):
    """Serves one folder as org/model; `asked` are the files that were fetched."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.folder = folder
        self.asked: list[str] = []


class Answer(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *arguments: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        parts = self.path.partition("?")[0].strip("/").split("/")
        names = sorted(path.name for path in self.server.folder.iterdir())
        if parts[:4] == ["api", "models", "org", "gated"]:
            self.reply(403, b"", {"X-Error-Code": "GatedRepo"})
        elif "org/model" not in self.path:
            self.reply(401, b"", {"X-Error-Code": "RepoNotFound"})
        elif "nothere" in parts:
            self.reply(404, b"", {"X-Error-Code": "RevisionNotFound"})
        elif "tree" in parts:
            entries = [{"type": "file", "path": n, "oid": "0", "size": 1} for n in names]
            self.reply(200, json.dumps(entries).encode(), {"Content-Type": "application/json"})
        elif parts[0] == "api":
            info = {"id": "org/model", "sha": COMMIT, "siblings": [{"rfilename": n} for n in names]}
            self.reply(200, json.dumps(info).encode(), {"Content-Type": "application/json"})
        elif parts[-1] in names:
            content = (self.server.folder / parts[-1]).read_bytes()
            if self.command == "GET":
                self.server.asked.append(parts[-1])
            etag = hashlib.sha256(content).hexdigest()
            self.reply(200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT})
        else:
            self.reply(404, b"", {"X-Error-Code": "EntryNotFound"})

    def reply(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    folder = make_checkpoint(tmp_path / "org" / "model", container="sharded")
    for other in ("pytorch_model.bin", "README.md", "model.onnx"):
        (folder / other).write_bytes(b"not wanted")
    server = Hub(folder)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def fetch(
    hub: Hub, tmp_path: Path, repo: str, revision: str = "", **settings: str
) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
        "HF_HOME": str(tmp_path / "cache"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        **settings,
    }
    for name in ("HF_HUB_OFFLINE", "HF_TOKEN"):
        if name not in settings:
            environment.pop(name, None)
    command = [sys.executable, "-c", WORKER, repo, str(tmp_path / "hub.gguf"), revision]
    empty = tmp_path / "empty"  # a folder org/model would be taken before the hub's
    empty.mkdir(exist_ok=True)
    return subprocess.run(command, env=environment, cwd=empty, capture_output=True, text=True)


def test_fetch(hub: Hub, tmp_path: Path) -> None:
    done = fetch(hub, tmp_path, "org/model")
    assert done.returncode == 0, done.stderr
    local = convert_checkpoint(hub.folder, tmp_path / "local.gguf")
    assert (tmp_path / "hub.gguf").read_bytes() == local.path.read_bytes()
    assert "pytorch_model.bin" not in hub.asked and "README.md" not in hub.asked
    assert "model.onnx" not in hub.asked and "tokenizer.model" in hub.asked

    hub.asked.clear()
    assert fetch(hub, tmp_path, "org/model").returncode == 0
    assert hub.asked == []  # all in the cache
    offline = fetch(hub, tmp_path, "org/model", HF_HUB_OFFLINE="1")
    assert offline.returncode == 0, offline.stderr
    unreachable = fetch(hub, tmp_path, "org/model", HF_ENDPOINT="http://127.0.0.1:9")
    assert unreachable.returncode == 0, unreachable.stderr


@pytest.mark.parametrize(
    ("repo", "revision", "needle"),
    [
        ("org/unknown", "", "neither a folder here nor a model on the hub"),
        ("org/gated", "", "is gated"),
        ("org/model", "nothere", "org/model at revision nothere does not exist"),
        ("bad id!/x", "", "valid hub id"),
    ],
)
def test_refused(repo: str, revision: str, needle: str, hub: Hub, tmp_path: Path) -> None:
    done = fetch(hub, tmp_path, repo, revision)
    message = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1 and repo in message and needle in message, done.stderr
    assert not (tmp_path / "hub.gguf").exists()


def test_no_network(hub: Hub, tmp_path: Path) -> None:
    done = fetch(hub, tmp_path, "org/model", HF_ENDPOINT="http://127.0.0.1:9")
    message = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1 and "cannot be reached" in message, done.stderr
