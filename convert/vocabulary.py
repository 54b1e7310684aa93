"""A vocabulary between a checkpoint's tokenizer and GGUF's keys."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from .added_tokens import AddedToken

# Token types of GGUF.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
ADDED_SCORE, PADDING_SCORE = -1000.0, -10000.0  # as llama.cpp's converter sets them


@dataclass
class Vocabulary:
    """`model` and `pre` are llama.cpp's names of the tokenizer and of how it splits words; tokens,
    types and scores have an entry for each embedding; `ids` are bos, eos, unk and pad where the
    tokenizer itself says them.

    `prefix` is where a space is put before a text: before "none", before "every" one that begins
    or follows an added token, or before the "first" alone; with "-once" not where there is one.
    `normalizes` says that this is done before the normalized ones of the `added` tokens are looked
    for, and so it is for user-defined `pieces` of a tokenizer.model."""

    model: str
    pre: str
    tokens: list[bytes]
    types: list[int]
    add_bos: bool = False
    add_eos: bool = False
    scores: list[float] = field(default_factory=list)
    merges: list[bytes] = field(default_factory=list)
    ids: dict[str, int] = field(default_factory=dict)
    prefix: str = "none"
    normalizes: bool = False
    pieces: set[int] = field(default_factory=set)
    added: dict[int, AddedToken] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def add(self, added: Iterable[AddedToken]) -> None:
        """Puts added tokens into their places; those that have no embedding are noted."""
        for token in added:
            if token.id >= len(self.tokens):
                self.notes.append(
                    f"{token.place}: {token.text!r} left out, its id {token.id} has no embedding"
                )
                continue
            self.tokens[token.id] = token.text.encode(errors="replace")
            self.types[token.id] = CONTROL if token.special else USER_DEFINED
            if self.scores:
                self.scores[token.id] = ADDED_SCORE
            self.added[token.id] = token
            self.pieces.discard(token.id)


def padding(start: int, end: int) -> list[bytes]:
    """The texts of ids that no token has."""
    return [f"[PAD{i}]".encode() for i in range(start, end)]
