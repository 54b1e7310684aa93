"""Which files of a folder hold the weights, and which tensors the index puts into each."""

from __future__ import annotations

import re
from pathlib import Path

from mobilellm_cpp.errors import CheckpointError

from .config import read_json
from .tensor import shown

# Where weights are looked for, in this order (as transformers does).
SAFETENSORS, SAFETENSORS_INDEX = "model.safetensors", "model.safetensors.index.json"
TORCH, TORCH_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
WEIGHTS = (SAFETENSORS, SAFETENSORS_INDEX, TORCH, TORCH_INDEX)
INDEXES = (SAFETENSORS_INDEX, TORCH_INDEX)
ENDINGS = (".safetensors", ".bin")

SHARD = re.compile(r"(?P<stem>.+)-(?P<i>\d{5})-of-(?P<n>\d{5})(?P<ending>\.safetensors|\.bin)")

# The weight files, each with the names of the tensors that an index puts there, if there is one.
Files = dict[Path, "set[str] | None"]


def weight_files(folder: Path) -> Files:
    """The weight files of a folder."""
    for name in WEIGHTS:
        path = folder / name
        if path.exists():
            return _indexed(path) if name in INDEXES else {path: None}
    # shards whose index was left behind, or a single one, which needs none
    for pattern in ("model-00001-of-?????.safetensors", "pytorch_model-00001-of-?????.bin"):
        for path in sorted(folder.glob(pattern)):
            return files_with(path)
    raise CheckpointError(f"{folder} has no weights: {', '.join(WEIGHTS)} are all missing.")


def files_with(path: Path) -> Files:
    """The weight files that belong to the one file `path`: itself, or all shards beside it."""
    match = SHARD.fullmatch(path.name)
    if match is None:
        return {path: None}
    index = path.with_name(f"{match['stem']}{match['ending']}.index.json")
    if index.exists():
        return _indexed(index)
    files: Files = {}
    for number in range(1, int(match["n"]) + 1):
        shard = f"{match['stem']}-{number:05}-of-{match['n']}{match['ending']}"
        files[path.with_name(shard)] = None
        if not path.with_name(shard).is_file():
            raise CheckpointError(
                f"{path} is one of {int(match['n'])} shards, and {shard} is missing."
            )
    return files


def _indexed(index: Path) -> Files:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: weight_map is missing or is not an object of file names.")
    shards: Files = {}
    ending = ".bin" if index.name.endswith(".bin.index.json") else ".safetensors"
    for tensor, file in weight_map.items():
        puts = f"{index}: weight_map puts {shown(tensor)} into {shown(repr(file))}"
        if not isinstance(file, str) or not _is_plain_name(file) or not file.endswith(ending):
            raise CheckpointError(
                f"{puts}, which is not the name of a {ending} file in this folder."
            )
        path = index.parent / file
        if not path.is_file():
            raise CheckpointError(f"{puts}, but {path} is missing.")
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


def check_whole(path: Path) -> None:
    """Refuse a weight file that a download or a copy left empty or as a mere pointer."""
    try:
        with open(path, "rb") as file:
            start = file.read(24)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from None
    if not start:
        raise CheckpointError(f"{path} is truncated: it is empty, so fetch or copy it again.")
    if start.startswith(b"version https://git-lfs"):
        raise CheckpointError(
            f"{path} is a pointer of Git LFS and not the file itself: run `git lfs pull` there."
        )
    if start.startswith(b"GGUF"):
        raise CheckpointError(f"{path} is a GGUF file by its content: it needs no conversion.")
    if start.startswith((b"<!DOCTYPE", b"<html", b"<!doctype")):
        raise CheckpointError(f"{path} is a web page and not the file itself: fetch it again.")


def check_shard(path: Path, found: set[str], expected: set[str]) -> None:
    """Hold the tensors of a shard against those that the index puts there."""
    if missing := sorted(expected - found):
        raise CheckpointError(
            f"{path} does not hold {shown(missing[0])}, which the index puts there."
        )
    if extra := sorted(found - expected):
        raise CheckpointError(
            f"{path} holds {shown(extra[0])}, which the index does not put there."
        )
