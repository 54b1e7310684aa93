"""What transformers makes of a text with added tokens in it.

A tokenizer.json does this itself. Over a SentencePiece model the added tokens are cut out of a text
first, from left to right, the longest where several begin; what is left between them SentencePiece
splits piece by piece (transformers 4, tokenization_utils.py and tokenization_llama.py).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..convert.config import read_json


@dataclass(frozen=True)
class Added:
    """A token outside of the tokenizer's own file. `lstrip` and `rstrip` take the white space
    before and after it away; `normalized` is the tokenizers library's."""

    id: int
    text: str
    special: bool
    lstrip: bool
    rstrip: bool
    normalized: bool = False


def added_tokens(
    folder: Path, settings: dict[str, Any], file: dict[str, Any] | None = None
) -> list[Added]:
    """The tokens of added_tokens.json, of tokenizer.json (`file`) and of tokenizer_config.json
    (`settings`), of which the later ones count."""
    found: dict[str, Added] = {}
    if (folder / "added_tokens.json").exists():
        for name, number in read_json(folder / "added_tokens.json").items():
            if name and type(number) is int:
                found[name] = Added(number, name, False, False, False)
    decoder = settings.get("added_tokens_decoder")
    entries = [(e.get("id"), e) for e in (file or {}).get("added_tokens") or []]
    entries += decoder.items() if isinstance(decoder, dict) else []
    for key, entry in entries:
        text = entry.get("content") if isinstance(entry, dict) else None
        if text and isinstance(text, str) and str(key).isdecimal():
            special = entry.get("special") is True
            lstrip, rstrip = entry.get("lstrip") is True, entry.get("rstrip") is True
            normalized = entry.get("normalized", not special) is True
            found[text] = Added(int(key), text, special, lstrip, rstrip, normalized)
    return list(found.values())


def sentencepiece_tokens(text: str, added: list[Added], pieces: Any, bare: Any) -> list[int]:
    """The ids of a text without bos. `pieces` is the SentencePieceProcessor, `bare` the one that
    puts no space before what follows a token: the same one where `legacy` is true."""
    if not added:
        return list(pieces.encode(text))
    tokens = {token.text: token for token in added}
    longest = sorted(tokens, key=len, reverse=True)
    parts = re.split(f"({'|'.join(map(re.escape, longest))})", text)
    ids: list[int] = []
    for i, part in enumerate(parts):
        if i % 2:
            ids.append(tokens[part].id)
            continue
        if i and tokens[parts[i - 1]].rstrip:
            part = part.lstrip()
        if i + 1 < len(parts) and tokens[parts[i + 1]].lstrip:
            part = part.rstrip()
        ids += (bare if i else pieces).encode(part)
    return ids


def surroundings(token: str) -> tuple[str, ...]:
    """Texts that show what a token does to its neighbours."""
    return f"{token}text", f"one {token} two  {token}\n", f"one{token}two {token}{token}"
