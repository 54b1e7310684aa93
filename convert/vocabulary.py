"""A vocabulary between a checkpoint's tokenizer and GGUF's keys."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

# Token types of GGUF.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)


@dataclass
class Vocabulary:
    """`model` and `pre` are llama.cpp's names of the tokenizer and of how it splits words; tokens,
    types and scores have an entry for each embedding; `ids` are bos, eos, unk and pad where the
    tokenizer itself says them."""

    model: str
    pre: str
    tokens: list[bytes]
    types: list[int]
    add_bos: bool
    add_eos: bool
    scores: list[float] = field(default_factory=list)
    merges: list[bytes] = field(default_factory=list)
    ids: dict[str, int] = field(default_factory=dict)
    add_space_prefix: bool | None = None
    notes: list[str] = field(default_factory=list)


class AddedToken(NamedTuple):
    """A token that is found in a text before the rest is split; `place` is the file that says so.
    A special one is a control token, whose text is not shown."""

    place: str
    id: int
    text: str
    special: bool


def looks_special(text: str) -> bool:
    """Whether a token is a control token by its look, whatever its entry says."""
    brackets = (("<|", "|>"), ("<\uff5c", "\uff5c>"), ("<unused", ">"))
    wrapped = any(text.startswith(left) and text.endswith(right) for left, right in brackets)
    return wrapped or text in ("<pad>", "<mask>", "<2mass>", "[@BOS@]")
