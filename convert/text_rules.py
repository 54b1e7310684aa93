"""What llama.cpp does not know of added tokens and of the space before a text: keys of ours, which
our libllama reads (native/llama/added_tokens.h) and stock llama.cpp passes over."""

from __future__ import annotations

from . import keys
from .gguf_file import array_u32, string
from .vocabulary import CONTROL, UNKNOWN, USER_DEFINED, Vocabulary

LSTRIP, RSTRIP, LATER, NORMALIZED, PIECE = 1, 2, 4, 8, 16
LONG = 256  # bytes of a token from which on it is not asked whether others overlap it


def text_rules(vocabulary: Vocabulary) -> tuple[dict[str, bytes], list[str]]:
    """The keys, none where llama.cpp does the same without them, and in which texts it does
    otherwise."""
    flags = {}
    for token_id, token in vocabulary.added.items():
        flags[token_id] = LSTRIP * token.lstrip + RSTRIP * token.rstrip
        if token.normalized:
            flags[token_id] |= NORMALIZED if vocabulary.normalizes else LATER
    flags |= dict.fromkeys(vocabulary.pieces, PIECE)
    reasons = []
    if vocabulary.pieces:
        reasons.append("it puts spaces only after it has looked for user-defined pieces")
    if vocabulary.prefix.startswith("first"):
        reasons.append("it puts a space after each special token (legacy: false puts none)")
    if vocabulary.prefix.endswith("-once"):
        reasons.append("it puts a space before a text that begins with one, too")
    for name, bits in (("lstrip", LSTRIP), ("rstrip", RSTRIP), ("normalized", NORMALIZED)):
        tokens = [vocabulary.added[i].text for i, own in flags.items() if own & bits]
        if tokens:
            more = f" and {len(tokens) - 1} more" if len(tokens) > 1 else ""
            reasons.append(f"it does not apply {name} of {tokens[0]!r}{more}")
    if not reasons and _overlapping(vocabulary, {i for i, own in flags.items() if own & LATER}):
        reasons.append("of added tokens that overlap it finds the longest, not the first")
    if not reasons:
        return {}, []
    ids = [token_id for token_id, own in flags.items() if own]
    metadata = {keys.SPACE_PREFIX: string(vocabulary.prefix)}
    if ids:
        metadata[keys.ADDED_TOKENS] = array_u32(ids)
        metadata[keys.ADDED_TOKEN_FLAGS] = array_u32([flags[i] for i in ids])
    return metadata, reasons


def _overlapping(vocabulary: Vocabulary, later: set[int]) -> bool:
    """Whether the order in which added tokens are looked for can matter: one ends as another
    begins, or holds one that is looked for before it."""
    special = (CONTROL, USER_DEFINED, UNKNOWN)
    ids = [i for i, kind in enumerate(vocabulary.types) if kind in special]
    texts = [vocabulary.tokens[i] for i in ids]
    if any(len(text) > LONG for text in texts) or len(later) * (len(ids) - len(later)) > 1 << 20:
        return True
    beginnings = {text[:n] for text in texts for n in range(1, len(text))}
    if any(text[n:] in beginnings for text in texts for n in range(1, len(text))):
        return True
    before = [vocabulary.tokens[i] for i in ids if i not in later]
    return any(one in vocabulary.tokens[i] for i in later for one in before)
