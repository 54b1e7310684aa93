"""A checkpoint folder in the hub's layout: its config and its tensors by name, read lazily."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mobilellm_cpp.errors import CheckpointError

from .adapter import Adapter, is_adapter
from .chat_template import FURTHER
from .config import Config
from .safetensors_file import read_safetensors
from .tensor import Tensor, plain_name, shown
from .tokenizer_file import TOKENIZER_FILES
from .torch_file import read_torch
from .weight_files import (
    ENDINGS,
    INDEXES,
    WEIGHTS,
    check_shard,
    check_whole,
    files_with,
    weight_files,
)


class Checkpoint:
    """A folder with config.json, weights and a tokenizer; `name` is what people call it, and
    `settings` override fields of config.json. `weights` is one of its weight files where others
    than the usual ones are meant. `notes` are remarks on its tensors, once they are read."""

    def __init__(
        self,
        folder: Path,
        name: str,
        settings: Mapping[str, Any] | None = None,
        weights: Path | None = None,
    ) -> None:
        self.folder = folder
        self.name = name
        self.notes: list[str] = []
        for path in (folder / file for file in ("config.json", *WEIGHTS, *TOKENIZER_FILES)):
            if path.exists() and not path.is_file():  # reading a pipe would wait for ever
                raise CheckpointError(f"{path} is not an ordinary file.")
        self.config = Config(folder / "config.json", settings)
        self.weights = weight_files(folder) if weights is None else files_with(weights)

    def tensors(self) -> dict[str, Tensor]:
        """All tensors of all weight files, by their names in the published code; opens the
        files."""
        tensors: dict[str, Tensor] = {}
        for path, names in self.weights.items():
            check_whole(path)
            read = read_torch if path.name.endswith(".bin") else read_safetensors
            found = read(path)
            if names is not None:
                check_shard(path, set(found), names)
            for name, tensor in found.items():
                plain = plain_name(name)
                if plain in tensors:
                    raise CheckpointError(
                        f"{tensor} is there twice: so is {tensors[plain].name} in "
                        f"{tensors[plain].file.name}."
                    )
                tensors[plain] = tensor
        self.notes = []
        if wrapped := [(t.name, plain) for plain, t in tensors.items() if plain != t.name]:
            name, plain = map(shown, wrapped[0])
            self.notes.append(f"{len(wrapped)} names are wrapped: {name} is read as {plain}")
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


def open_source(
    source: str | Path,
    revision: str | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Checkpoint | Adapter:
    """The checkpoint or the adapter in a local folder or of a weight file in one, or else one
    fetched by its hub id. `settings` are for a checkpoint's config.json."""
    path = Path(source).expanduser()
    if not str(source):
        raise CheckpointError("an empty name is neither a folder nor a hub id.")
    if path.exists():
        if revision is not None:
            raise CheckpointError(f"{source} is a local path, and only a hub id has revisions.")
        return _local(path, settings)
    text = str(source)
    if isinstance(source, Path) or not is_hub_id(text):
        raise CheckpointError(f"{source} is neither a folder nor a hub id such as org/name.")
    from .hub import download

    folder, name = download(text, revision), text.rpartition("/")[2]
    return Adapter(folder, name) if is_adapter(folder) else Checkpoint(folder, name, settings)


def open_checkpoint(
    source: str | Path,
    revision: str | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Checkpoint:
    """As open_source, but an adapter is refused."""
    opened = open_source(source, revision, settings)
    if isinstance(opened, Adapter):
        raise CheckpointError(
            f"{source} is a LoRA adapter and not a model: `mobilellm convert` makes an adapter "
            "file of it, or with --merge a whole model."
        )
    return opened


def is_hub_id(text: str) -> bool:
    return text.count("/") == 1 and not text.startswith(("/", ".", "~"))


def _local(path: Path, settings: Mapping[str, Any] | None) -> Checkpoint | Adapter:
    """What is in a folder, or what a file belongs to."""
    folder, weights = path, None
    if not path.is_dir():
        if not path.is_file():
            raise CheckpointError(f"{path} is not an ordinary file.")
        check_whole(path)
        if path.suffix not in ENDINGS:
            raise CheckpointError(
                f"{path} is not a file of weights: give the folder that holds config.json."
            )
        folder, weights = path.parent, path
    name = folder.resolve().name
    if is_adapter(folder):
        return Adapter(folder, name)
    if not (folder / "config.json").exists():
        if not any(folder.iterdir()):
            raise CheckpointError(f"{folder} is empty.")
        if files := sorted(folder.glob("*.gguf")):
            raise CheckpointError(
                f"{folder} holds GGUF files, which need no conversion: "
                f"name one of them, such as {files[0]}, in place of the folder."
            )
    if weights is not None and not weights.name.startswith(("model", "pytorch_model")):
        name = weights.stem
    return Checkpoint(folder, name, settings, weights)
