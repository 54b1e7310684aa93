"""Added tokens: found in a text before the rest is split, by rules of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from mobilellm_cpp.errors import CheckpointError

from .config import read_json
from .tokenizer_file import TokenizerFile


class AddedToken(NamedTuple):
    """`place` is the file that says so. A special one is a control token, whose text is not shown.
    lstrip and rstrip take the spaces before and behind it with it; a normalized one is looked for
    when the others are found, in the text as the normalizer makes it."""

    place: str
    id: int
    text: str
    special: bool
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = False


def added_tokens(
    folder: Path, settings: dict[str, Any], file: TokenizerFile | None
) -> list[AddedToken]:
    """Those of added_tokens.json, of tokenizer.json and of tokenizer_config.json (`settings`): for
    an id that several name the last counts, as in transformers."""
    added: dict[int, AddedToken] = {}
    path = folder / "added_tokens.json"
    if path.exists():
        for name, token_id in read_json(path).items():
            if type(token_id) is not int or token_id < 0:
                raise CheckpointError(f"{path}: {name!r} has the impossible id {token_id!r}.")
            added[token_id] = AddedToken(path.name, token_id, name, False)
    if file is not None:
        added |= {token.id: token for token in file_tokens(file)}
    path = folder / "tokenizer_config.json"
    decoder = settings.get("added_tokens_decoder", {})
    if not isinstance(decoder, dict):
        raise CheckpointError(f"{path}: added_tokens_decoder is not a JSON object.")
    for key, entry in decoder.items():
        if not key.isdecimal() or len(key) > 9 or not _sound(entry):
            raise CheckpointError(f"{path}: added_tokens_decoder is broken at id {key!r}.")
        added[int(key)] = _token(path, int(key), entry)
    return list(added.values())


def file_tokens(file: TokenizerFile) -> list[AddedToken]:
    """Those of tokenizer.json, in its order."""
    entries = file.fields.get("added_tokens") or []
    if not isinstance(entries, list):
        raise file.refusal("added_tokens is not a list")
    found = []
    for entry in entries:
        token_id = entry.get("id") if _sound(entry) else None
        if type(token_id) is not int or token_id < 0:
            raise file.refusal(f"added_tokens is broken at {str(entry)[:60]!r}")
        found.append(_token(file.path, token_id, entry))
    return found


def _sound(entry: Any) -> bool:
    return isinstance(entry, dict) and isinstance(entry.get("content"), str)


def _token(path: Path, token_id: int, entry: dict[str, Any]) -> AddedToken:
    text = entry["content"]
    if entry.get("single_word"):
        raise CheckpointError(
            f"{path}: single_word of {text[:60]!r} must be false: llama.cpp has no such rule."
        )
    return AddedToken(
        path.name,
        token_id,
        text,
        special=bool(entry.get("special")) or looks_special(text),
        lstrip=bool(entry.get("lstrip")),
        rstrip=bool(entry.get("rstrip")),
        normalized=bool(entry.get("normalized", not entry.get("special"))),
    )


def looks_special(text: str) -> bool:
    """Whether a token is a control token by its look, whatever its entry says."""
    brackets = (("<|", "|>"), ("<\uff5c", "\uff5c>"), ("<unused", ">"))
    wrapped = any(text.startswith(left) and text.endswith(right) for left, right in brackets)
    return wrapped or text in ("<pad>", "<mask>", "<2mass>", "[@BOS@]")
