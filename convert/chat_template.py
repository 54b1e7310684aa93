"""Chat templates, where and as transformers has kept them over the years."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gguf.constants import Keys

from mobilellm_cpp.errors import CheckpointError

from .config import read_json
from .gguf_file import array_string, string

FILE, FURTHER, JSON = "chat_template.jinja", "additional_chat_templates", "chat_template.json"
DEFAULT = "default"


def chat_templates(
    folder: Path, settings: dict[str, Any], adapter: Path | None = None
) -> dict[str, str]:
    """Templates by name: those in files of their own, as transformers looks for them first, else
    those in tokenizer_config.json (`settings`), else those in chat_template.json. The folder of an
    `adapter` that is merged goes before, if it has any: that is what was trained on."""
    if adapter is not None:
        path = adapter / "tokenizer_config.json"
        if own := chat_templates(adapter, read_json(path) if path.is_file() else {}):
            return own
    texts = {DEFAULT: _text(folder / FILE)} if (folder / FILE).exists() else {}
    if texts := texts | {p.stem: _text(p) for p in sorted((folder / FURTHER).glob("*.jinja"))}:
        return texts
    json, said = folder / JSON, settings.get("chat_template")
    if said is None and json.exists():
        said = read_json(json).get("chat_template")
    if isinstance(said, list):
        pairs = [(t.get("name"), t.get("template")) for t in said if isinstance(t, dict)]
    else:
        pairs = list(said.items()) if isinstance(said, dict) else [(DEFAULT, said)]
    return {name: text for name, text in pairs if isinstance(name, str) and isinstance(text, str)}


def chosen_templates(
    folder: Path,
    settings: dict[str, Any],
    choice: str | None = None,
    adapter: Path | None = None,
) -> tuple[dict[str, bytes], list[str]]:
    """The templates as metadata, the one called `choice` (or in the file of that name) as the
    file's own, and notes."""
    templates = chat_templates(folder, settings, adapter)
    own = chosen(templates, choice)
    further = {_key(name): text for name, text in templates.items() if name != DEFAULT}
    metadata = {}
    if own is not None:
        metadata[Keys.Tokenizer.CHAT_TEMPLATE] = string(own)
    if further:
        metadata[Keys.Tokenizer.CHAT_TEMPLATES] = array_string([n.encode() for n in further])
        key = Keys.Tokenizer.CHAT_TEMPLATE_N
        metadata |= {key.format(name=name): string(text) for name, text in further.items()}
    notes = []
    if own is None and further:
        notes.append(
            f"of the chat templates {', '.join(templates)} none is the default: --chat-template "
            "NAME makes one it"
        )
    return metadata, notes


def chosen(templates: dict[str, str], choice: str | None) -> str | None:
    """The template of that name, or in the file of that name; without a choice the default one.
    Raises CheckpointError where there is no such one."""
    if choice is None:
        return templates.get(DEFAULT)
    if choice in templates:
        return templates[choice]
    if not Path(choice).is_file():
        known = f"one of {', '.join(templates)}" if templates else "a template of this checkpoint"
        raise CheckpointError(f"chat template {choice!r} is neither {known} nor a file.")
    return _text(Path(choice))


def _text(path: Path) -> str:
    if not path.is_file():
        raise CheckpointError(f"{path} is not an ordinary file.")
    try:
        return path.read_text(encoding="utf-8")
    except ValueError:
        raise CheckpointError(f"{path} is not UTF-8 text.") from None


def _key(name: str) -> str:
    """A name as llama.cpp's converter writes it into a key."""
    return "".join(c if c.isascii() and c.isalnum() else "_" for c in name)
