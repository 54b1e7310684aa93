"""A checkpoint folder in the hub's layout: its config and its tensors by name, read lazily."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mobilellm_cpp.errors import CheckpointError

from .chat_template import FURTHER
from .config import Config, read_json
from .safetensors_file import read_safetensors
from .tensor import Tensor, shown
from .torch_file import read_torch

# Where weights are looked for, in this order (as transformers does).
SAFETENSORS, SAFETENSORS_INDEX = "model.safetensors", "model.safetensors.index.json"
TORCH, TORCH_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
WEIGHTS = (SAFETENSORS, SAFETENSORS_INDEX, TORCH, TORCH_INDEX)
INDEXES = (SAFETENSORS_INDEX, TORCH_INDEX)

TOKENIZER_FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)


class Checkpoint:
    """A folder with config.json, weights and a tokenizer; `name` is what people call it, and
    `settings` override fields of config.json."""

    def __init__(self, folder: Path, name: str, settings: Mapping[str, Any] | None = None) -> None:
        self.folder = folder
        self.name = name
        for path in (folder / file for file in ("config.json", *WEIGHTS, *TOKENIZER_FILES)):
            if path.exists() and not path.is_file():  # reading a pipe would wait for ever
                raise CheckpointError(f"{path} is no ordinary file.")
        self.config = Config(folder / "config.json", settings)
        self.weights = weight_files(folder)

    def tensors(self) -> dict[str, Tensor]:
        """All tensors of all weight files; opens the files."""
        tensors: dict[str, Tensor] = {}
        for path, names in self.weights.items():
            read = read_torch if path.name.endswith(".bin") else read_safetensors
            found = read(path)
            if names is not None:
                _check_shard(path, set(found), names)
            tensors |= found
        return tensors

    @property
    def files(self) -> list[Path]:
        """All files that a conversion reads."""
        names = ("config.json", *INDEXES, *TOKENIZER_FILES)
        further = (self.folder / FURTHER).glob("*.jinja")
        paths = [*(self.folder / name for name in names), *further, *self.weights]
        return sorted(path for path in paths if path.exists())

    def fingerprint(self) -> str:
        """A key of the contents of all files that a conversion reads."""
        digest = hashlib.blake2b(digest_size=16)
        for path in self.files:
            digest.update(f"{path.name}\0{path.stat().st_size}\0".encode())
            with open(path, "rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
        return digest.hexdigest()


def weight_files(folder: Path) -> dict[Path, set[str] | None]:
    """The weight files; for shards with the names of the tensors that the index puts there."""
    for name in WEIGHTS:
        path = folder / name
        if not path.exists():
            continue
        return _shards(path) if name.endswith(".index.json") else {path: None}
    raise CheckpointError(f"{folder} has no weights: {', '.join(WEIGHTS)} are all missing.")


def _shards(index: Path) -> dict[Path, set[str] | None]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: weight_map is missing or no object of file names.")
    shards: dict[Path, set[str] | None] = {}
    ending = ".bin" if index.name == TORCH_INDEX else ".safetensors"
    for tensor, file in weight_map.items():
        puts = f"{index}: weight_map puts {shown(tensor)} into {shown(repr(file))}"
        if not isinstance(file, str) or not _is_plain_name(file) or not file.endswith(ending):
            raise CheckpointError(f"{puts}, which is no name of a {ending} file in this folder.")
        path = index.parent / file
        if not path.is_file():
            raise CheckpointError(f"{puts}, and {path} is missing.")
        if path not in shards and not _stays_inside(index.parent, path):
            raise CheckpointError(f"{puts}, a link that leaves this folder.")
        names = shards.setdefault(path, set())
        if names is not None:
            names.add(tensor)
    return shards


def _is_plain_name(file: str) -> bool:
    return file not in ("", ".", "..") and not any(c in file for c in "/\\:\0")


def _stays_inside(folder: Path, path: Path) -> bool:
    """Whether a link ends in the folder, or in the blobs of the hub cache that it belongs to."""
    home, target = folder.resolve(), path.resolve()
    in_cache = home.parent.name == "snapshots" and target.parent == home.parent.parent / "blobs"
    return target.is_relative_to(home) or in_cache


def _check_shard(path: Path, found: set[str], expected: set[str]) -> None:
    if missing := sorted(expected - found):
        raise CheckpointError(
            f"{path} does not hold {shown(missing[0])}, which the index puts there."
        )
    if extra := sorted(found - expected):
        raise CheckpointError(
            f"{path} holds {shown(extra[0])}, which the index does not put there."
        )


def open_checkpoint(
    source: str | Path,
    revision: str | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Checkpoint:
    """The checkpoint in a local folder, or else one fetched by its hub id."""
    folder = Path(source).expanduser()
    if not str(source):
        raise CheckpointError("an empty name is neither a folder nor a hub id.")
    if folder.is_dir():
        if revision is not None:
            raise CheckpointError(f"{source} is a folder here: a revision is one of a hub id.")
        return Checkpoint(folder, folder.resolve().name, settings)
    if folder.exists():
        raise CheckpointError(f"{source} is a file: give the folder that holds config.json.")
    text = str(source)
    if isinstance(source, Path) or text.count("/") != 1 or text.startswith(("/", ".", "~")):
        raise CheckpointError(f"{source} is neither a folder nor a hub id such as org/name.")
    from .hub import download

    return Checkpoint(download(text, revision), text.rpartition("/")[2], settings)
