"""A hub id is fetched from the hub: here a small server that answers as the hub does."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import pytest
from adapters import peft_model
from checkpoints import make_checkpoint
from mobilellm_cpp.convert import convert_adapter, convert_checkpoint

from mobilellm_cpp.errors import CheckpointError

# In a process of its own, for huggingface_hub reads its settings when it is imported. Waits
# between tries are left out, and files written in pieces of 4 KB instead of 10 MB.
WORKER = """
import sys, time
import huggingface_hub.constants
time.sleep = lambda seconds: None
huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE = 4096
from mobilellm_cpp.convert import Adapter, convert_adapter, convert_checkpoint, open_source
from mobilellm_cpp.errors import CheckpointError
try:
    source = open_source(sys.argv[1], sys.argv[3] or None)
    convert = convert_adapter if isinstance(source, Adapter) else convert_checkpoint
    convert(source, sys.argv[2], **({"base": sys.argv[4]} if sys.argv[4] else {}))
except CheckpointError as error:
    sys.exit(str(error))
"""

SHARD = "model-00002-of-00003.safetensors"


class Hub(ThreadingHTTPServer):
    """Serves folders as the revisions of org/model; `asked` are the files that were fetched, with
    the Range that was asked for. What goes wrong is set by a test:

    `status` answers whatever has the key in its path with that status; `gated` asks for the token
    hf_good; `cut` sends only so many bytes of a file, each time the next number; `stuck` is a file
    of which half is sent, then nothing; `short` a file that lost its end on the server; `ranges`
    whether the server can send a part of a file.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.revisions = {"main": folder}
        self.asked: list[tuple[str, str | None]] = []
        self.status: dict[str, int] = {}
        self.gated = False
        self.cut: dict[str, list[int]] = {}
        self.stuck = self.short = ""
        self.ranges = True
        self.is_stuck, self.go_on = threading.Event(), threading.Event()

    def find(self, revision: str) -> tuple[str, Path] | None:
        """Commit and folder of a branch, tag or commit."""
        commits = {r: hashlib.sha1(r.encode()).hexdigest() for r in self.revisions}
        for name, commit in commits.items():
            if revision in (name, commit):
                return commit, self.revisions[name]
        return None

    def names(self) -> list[str]:
        return [name for name, _ in self.asked]

    def handle_error(self, *arguments: object) -> None:
        pass  # a client that was killed


class Answer(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *arguments: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        parts = [unquote(part) for part in self.path.partition("?")[0].strip("/").split("/")]
        for part, status in self.server.status.items():
            if part in self.path:
                return self.reply(status, b"", {})
        if parts[0] == "api":  # api/models/org/model, then /revision/R or /tree/R
            repo, revision = parts[2:4], parts[5] if len(parts) > 4 else "main"
        else:  # org/model/resolve/R/file
            repo, revision = parts[:2], parts[3]
        if repo != ["org", "model"]:
            return self.reply(401, b"", {"X-Error-Code": "RepoNotFound"})
        found = self.server.find(revision)
        if found is None:
            return self.reply(404, b"", {"X-Error-Code": "RevisionNotFound"})
        commit, folder = found
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        files = {str(path.relative_to(folder)): path for path in paths}
        if parts[0] == "api":
            info: object = {
                "id": "org/model",
                "sha": commit,
                "siblings": [{"rfilename": name} for name in files],
            }
            if "tree" in parts:
                info = [
                    {"type": "file", "path": name, "oid": "0", "size": path.stat().st_size}
                    for name, path in files.items()
                ]
            kind = {"Content-Type": "application/json"}
            return self.reply(200, json.dumps(info).encode(), kind)
        token = self.headers["Authorization"]
        if self.server.gated and token != "Bearer hf_good":
            return self.reply(403 if token else 401, b"", {"X-Error-Code": "GatedRepo"})
        name = "/".join(parts[4:])
        if name not in files:
            return self.reply(404, b"", {"X-Error-Code": "EntryNotFound"})
        self.send_file(name, files[name].read_bytes(), commit)

    def send_file(self, name: str, content: bytes, commit: str) -> None:
        server = self.server
        etag = hashlib.sha256(content).hexdigest()
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": commit}
        status, stop = 200, len(content)
        if self.command == "GET":
            asked = self.headers["Range"]
            server.asked.append((name, asked))
            if server.short == name:
                content = content[:-100]
                stop = len(content)
            if asked and server.ranges:
                start = int(asked.removeprefix("bytes=").rstrip("-"))
                headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
                status, content = 206, content[start:]
            if server.cut.get(name):
                stop = server.cut[name].pop(0)
            if server.stuck == name:
                stop = len(content) // 2
        self.reply(status, content, headers, stop)
        if self.command == "GET" and server.stuck == name:
            self.wfile.flush()
            server.is_stuck.set()
            server.go_on.wait()

    def reply(
        self, status: int, content: bytes, headers: dict[str, str], stop: int | None = None
    ) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content[:stop])


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    folder = make_checkpoint(tmp_path / "org" / "model", container="sharded")
    server = Hub(folder)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.go_on.set()
    server.shutdown()
    thread.join()
    server.server_close()


def start(
    hub: Hub,
    tmp_path: Path,
    repo: str = "org/model",
    revision: str = "",
    base: str = "",
    **settings: str,
) -> subprocess.Popen[str]:
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
    command = [sys.executable, "-c", WORKER, repo, str(tmp_path / "hub.gguf"), revision, base]
    empty = tmp_path / "empty"  # a folder org/model would be taken before the hub's
    empty.mkdir(exist_ok=True)
    return subprocess.Popen(
        command,
        env=environment,
        cwd=empty,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def convert(hub: Hub, tmp_path: Path, *source: str, **settings: str) -> bytes:
    """The file that was made of the hub's checkpoint."""
    process = start(hub, tmp_path, *source, **settings)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    out = tmp_path / "hub.gguf"
    content = out.read_bytes()
    out.unlink()
    return content


def refusal(hub: Hub, tmp_path: Path, *source: str, **settings: str) -> str:
    """The sentence of a refusal."""
    process = start(hub, tmp_path, *source, **settings)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1 and "Traceback" not in errors, errors
    assert not (tmp_path / "hub.gguf").exists()
    message = errors.strip().splitlines()[-1]
    assert message.startswith(source[0] if source else "org/model") and message.endswith(".")
    return message


def local(folder: Path, tmp_path: Path) -> bytes:
    """What is made of the same files in a folder of the same name."""
    return convert_checkpoint(folder, tmp_path / "local.gguf").path.read_bytes()


def test_fetch(hub: Hub, tmp_path: Path) -> None:
    """What a conversion reads, and nothing else; the second time from the cache."""
    folder = hub.revisions["main"]
    wanted = {path.name for path in folder.iterdir()}
    further = {  # files with the same content would be fetched once
        "added_tokens.json": '{"<extra>": 511}',
        "chat_template.jinja": "{{ messages[0].content }}",
        "generation_config.json": '{"eos_token_id": 2}',
        "tokenizer.json": "{}",
    }
    for name, text in further.items():
        (folder / name).write_text(text)
    wanted |= set(further)
    (folder / "original").mkdir()
    for name in (
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
        "consolidated.safetensors",
        "training_args.bin",
        "README.md",
        "model.onnx",
        "original/consolidated.00.pth",
        "original/tokenizer.model",
        "original/config.json",
    ):
        (folder / name).write_bytes(b"not wanted")
    expected = local(folder, tmp_path)
    assert convert(hub, tmp_path) == expected
    assert sorted(hub.names()) == sorted(wanted)

    hub.asked.clear()
    assert convert(hub, tmp_path) == expected
    assert hub.asked == []  # all in the cache
    assert convert(hub, tmp_path, HF_HUB_OFFLINE="1") == expected
    assert convert(hub, tmp_path, HF_ENDPOINT="http://127.0.0.1:9") == expected
    hub.status["/api/"] = 503
    assert convert(hub, tmp_path) == expected


def test_bin(hub: Hub, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "other" / "model", container="sharded-bin")
    (folder / "training_args.bin").write_bytes(b"not wanted")
    hub.revisions["main"] = folder
    assert convert(hub, tmp_path) == local(folder, tmp_path)
    assert "training_args.bin" not in hub.names()


def test_revisions(hub: Hub, tmp_path: Path) -> None:
    """A branch whose name has slashes, and a commit; each is cached by itself."""
    main = local(hub.revisions["main"], tmp_path)
    branch = "stage1/step-500"
    hub.revisions[branch] = make_checkpoint(tmp_path / "stage" / "model", seed=1)
    staged = local(hub.revisions[branch], tmp_path)
    assert staged != main
    assert convert(hub, tmp_path, "org/model", branch) == staged
    assert convert(hub, tmp_path) == main
    found = hub.find(branch)
    assert found is not None
    for revision in (branch, found[0]):
        assert convert(hub, tmp_path, "org/model", revision, HF_HUB_OFFLINE="1") == staged
    message = refusal(hub, tmp_path, "org/model", "stage2", HF_HUB_OFFLINE="1")
    assert "org/model at revision stage2 is no folder here" in message


def test_a_folder_has_no_revisions(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="only a hub id has revisions"):
        convert_checkpoint(hub.revisions["main"], tmp_path / "m.gguf", revision="main")


@pytest.mark.parametrize(
    ("repo", "revision", "needle"),
    [
        ("org/unknown", "", "neither a folder here nor a model on the hub"),
        ("org/model", "not/here", "org/model at revision not/here does not exist"),
        ("bad id!/x", "", "valid hub id"),
    ],
)
def test_refused(repo: str, revision: str, needle: str, hub: Hub, tmp_path: Path) -> None:
    assert needle in refusal(hub, tmp_path, repo, revision)


def test_gated(hub: Hub, tmp_path: Path) -> None:
    """The hub tells anyone what is in a gated repository, and gives its files to some."""
    hub.gated = True
    page = f"http://127.0.0.1:{hub.server_port}/org/model"
    message = refusal(hub, tmp_path)
    assert f"accept its terms at {page}, then run `hf auth login` or set HF_TOKEN" in message
    message = refusal(hub, tmp_path, HF_TOKEN="hf_other")
    assert f"your token has no access to it: ask for access at {page}" in message
    expected = local(hub.revisions["main"], tmp_path)
    assert convert(hub, tmp_path, HF_TOKEN="hf_good") == expected
    assert convert(hub, tmp_path) == expected  # cached


@pytest.mark.parametrize(
    ("status", "token", "needle"),
    [
        (401, "", "neither a folder here nor a model on the hub"),
        (401, "hf_wrong", "the hub refuses your token"),
        (403, "hf_narrow", "403 Forbidden"),
        (500, "", "no complete copy"),
    ],
)
def test_status(status: int, token: str, needle: str, hub: Hub, tmp_path: Path) -> None:
    hub.status["/api/"] = status
    assert needle in refusal(hub, tmp_path, HF_TOKEN=token)


def test_a_shard_cannot_be_had(hub: Hub, tmp_path: Path) -> None:
    """Then what is there of the snapshot is not used, and later the rest is fetched."""
    hub.status[f"/{SHARD}"] = 500
    message = refusal(hub, tmp_path)
    assert "500" in message and "no complete copy" in message
    assert "no complete copy" in refusal(hub, tmp_path, HF_HUB_OFFLINE="1")
    hub.status.clear()
    before = hub.names()
    assert convert(hub, tmp_path) == local(hub.revisions["main"], tmp_path)
    assert hub.names()[len(before) :] == [SHARD]


def test_no_network(hub: Hub, tmp_path: Path) -> None:
    message = refusal(hub, tmp_path, HF_ENDPOINT="http://127.0.0.1:9")
    assert "cannot be fetched from the hub (" in message and "refused" in message
    message = refusal(hub, tmp_path, HF_HUB_OFFLINE="1")
    assert "cannot be fetched from the hub (" in message and "HF_HUB_OFFLINE" in message


@pytest.mark.parametrize("ranges", [True, False])
def test_connection_cut(ranges: bool, hub: Hub, tmp_path: Path) -> None:
    """The rest is asked for; a server that sends the whole instead is understood."""
    hub.cut[SHARD] = [40_960, 8_192]
    hub.ranges = ranges
    assert convert(hub, tmp_path) == local(hub.revisions["main"], tmp_path)
    asked = [part for name, part in hub.asked if name == SHARD]
    assert asked == [None, "bytes=40960-", "bytes=49152-" if ranges else "bytes=8192-"]


def test_connection_cut_for_good(hub: Hub, tmp_path: Path) -> None:
    hub.cut[SHARD] = [40_000, *[0] * 20]
    assert "no complete copy" in refusal(hub, tmp_path)
    snapshots = tmp_path / "cache" / "hub" / "models--org--model" / "snapshots"
    assert not list(snapshots.glob(f"*/{SHARD}"))
    hub.cut.clear()
    assert convert(hub, tmp_path) == local(hub.revisions["main"], tmp_path)


def test_killed_while_fetching(hub: Hub, tmp_path: Path) -> None:
    hub.stuck = SHARD
    process = start(hub, tmp_path)
    assert hub.is_stuck.wait(60)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    hub.go_on.set()
    hub.stuck = ""
    assert "no complete copy" in refusal(hub, tmp_path, HF_HUB_OFFLINE="1")
    hub.asked.clear()
    assert convert(hub, tmp_path) == local(hub.revisions["main"], tmp_path)
    assert SHARD in hub.names() and "config.json" not in hub.names()


def test_shorter_than_announced(hub: Hub, tmp_path: Path) -> None:
    hub.short = SHARD
    message = refusal(hub, tmp_path)
    assert "file should be of size" in message and "no complete copy" in message


def test_no_room_in_the_cache(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    message = refusal(hub, tmp_path, HF_HOME=str(tmp_path / "file" / "cache"))
    assert "cannot be put into the hub cache" in message and "Not a directory" in message


def test_no_weights(hub: Hub, tmp_path: Path) -> None:
    """A repository of another kind: the sentence is that for a folder."""
    folder = hub.revisions["main"]
    for path in folder.glob("model*"):
        path.unlink()
    process = start(hub, tmp_path)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1 and "has no weights" in errors.splitlines()[-1]


def test_an_adapter_and_its_base(hub: Hub, tmp_path: Path) -> None:
    """Of the base nothing but config.json; the second time from the cache."""
    peft_model(make_checkpoint(tmp_path / "base")).save_pretrained(tmp_path / "lora")
    expected = convert_adapter(tmp_path / "lora", tmp_path / "a.gguf").path.read_bytes()
    config = tmp_path / "lora" / "adapter_config.json"
    fields = json.loads(config.read_text()) | {"base_model_name_or_path": "org/model"}
    config.write_text(json.dumps(fields))
    hub.revisions["lora"] = tmp_path / "lora"
    title = b"Model"  # by the repository's name
    got = convert(hub, tmp_path, "org/model", "lora")
    assert got[-4096:] == expected[-4096:] and title in got
    asked = ["adapter_config.json", "adapter_model.safetensors", "config.json"]
    assert sorted(hub.names()) == asked
    assert convert(hub, tmp_path, "org/model", "lora", HF_HUB_OFFLINE="1") == got
    del hub.revisions["main"]
    assert convert(hub, tmp_path, "org/model", "lora", HF_ENDPOINT="http://127.0.0.1:9") == got


def test_the_revision_of_an_adapters_base(hub: Hub, tmp_path: Path) -> None:
    """The one in adapter_config.json is for the base that stands beside it, not for --base."""
    peft_model(make_checkpoint(tmp_path / "base")).save_pretrained(tmp_path / "lora")
    expected = convert_adapter(tmp_path / "lora", tmp_path / "a.gguf").path.read_bytes()
    hub.revisions |= {
        "main": make_checkpoint(tmp_path / "other", hidden=96),
        "v2": tmp_path / "base",
    }
    config = tmp_path / "lora" / "adapter_config.json"
    fields = json.loads(config.read_text()) | {"base_model_name_or_path": "org/model"}
    lora = str(tmp_path / "lora")
    process = start(hub, tmp_path, lora, base="org/model")
    assert "config.json makes it" in process.communicate(timeout=60)[1]
    config.write_text(json.dumps(fields))
    process = start(hub, tmp_path, lora)
    assert "config.json makes it" in process.communicate(timeout=60)[1]
    config.write_text(json.dumps(fields | {"revision": "v2"}))
    assert convert(hub, tmp_path, lora) == expected
    process = start(hub, tmp_path, lora, base="org/model")
    assert "config.json makes it" in process.communicate(timeout=60)[1]
    config.write_text(json.dumps(fields | {"revision": "v3"}))
    assert "org/model at revision v3 does not exist" in start(hub, tmp_path, lora).communicate()[1]
    config.write_text(json.dumps(fields | {"revision": ["v2"]}))
    with pytest.raises(CheckpointError, match="revision must be a string, not"):
        convert_adapter(lora, tmp_path / "b.gguf")
