"""Whether a file lists the tokens of the checkpoint's tokenizer: texts, kinds, scores and merges.

Few texts show a score that is a little off, or a merge that stands a place too early.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ..convert.config import read_json
from ..convert.merge_scores import final_ranks
from ..convert.sentencepiece_proto import read_proto
from ..convert.tokenizer_file import TokenizerFile
from ..engine.gguf_file import GGUFFile
from ..errors import CheckpointError
from .added_tokens import added_tokens

# Token types of GGUF.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
KEYS = "tokenizer.ggml."


NAMES = ("of no kind", "normal", "unknown", "control", "user-defined", "unused", "a byte")


Kinds = tuple[int, ...]


class Token(NamedTuple):
    """What a file may say of a token; None where it may say anything."""

    text: str | None
    kinds: Kinds
    score: float | None

    def __str__(self) -> str:
        kinds = " or ".join(NAMES[kind] if kind in range(7) else str(kind) for kind in self.kinds)
        score = "" if self.score is None else f", score {self.score:g}"
        return f"{self.text!r} ({kinds}{score})"


PADDING = Token(None, (UNUSED,), None)


def check_vocabulary(file: GGUFFile, folder: Path, size: int) -> list[str]:
    """A sentence for each of these questions whose answer is no: are the file's `size` tokens those
    of the checkpoint in `folder`, are they put together in the same way, and by the same merges?"""
    path = folder / "tokenizer.json"
    json = TokenizerFile(path) if path.exists() else None
    by_bytes = json is not None and json.byte_level
    fields = {} if json is None else json.fields
    added = added_tokens(folder, _json(folder / "tokenizer_config.json"), fields)
    if not by_bytes and (folder / "tokenizer.model").exists():
        expected = _pieces(folder / "tokenizer.model")
    else:
        expected = {} if json is None else _words(json, {token.id for token in added})
    for token in added:
        kinds = expected.get(token.id, PADDING).kinds[:1] if token.special else (USER_DEFINED,)
        expected[token.id] = Token(token.text, (CONTROL, *kinds), None)
    wrong = [*_wrong_tokens(file, expected, size)]
    model, kind = file.get(f"{KEYS}model"), "gpt2" if by_bytes else "llama"
    if model != kind:
        wrong.append(f"the file's tokenizer is of the kind {model}, the checkpoint's {kind}")
    if json is not None and by_bytes:
        wrong += _wrong_merges(file, json)
    return wrong


def _words(json: TokenizerFile, added: set[int]) -> dict[int, Token]:
    """What a tokenizer.json lists. One of characters gets scores as if SentencePiece had made it:
    0, -1, ... for what merges make, in their order, and then for the others in theirs; not for the
    ids that are `added`."""
    vocab = json.vocab()
    if json.byte_level:
        return {i: Token(text, (NORMAL,), None) for text, i in vocab.items()}
    kinds = dict.fromkeys(vocab, NORMAL) | {json.bpe().get("unk_token"): UNKNOWN}
    kinds |= dict.fromkeys((f"<0x{byte:02X}>" for byte in range(256)), BYTE)
    ranks = {pair: rank for rank, pair in enumerate(json.merges(vocab))}
    made, _, _ = final_ranks(vocab, ranks)
    normal = [
        text
        for text, i in vocab.items()
        if kinds[text] == NORMAL and text not in made and i not in added
    ]
    order = [*sorted(made, key=made.__getitem__), *sorted(normal, key=vocab.__getitem__)]
    scores = {text: -float(place) for place, text in enumerate(order)}
    return {i: Token(text, (kinds[text],), scores.get(text)) for text, i in vocab.items()}


def _json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}


def _pieces(path: Path) -> dict[int, Token]:
    import sentencepiece

    try:
        pieces = sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes())
    except RuntimeError:
        raise CheckpointError(f"{path} is not a SentencePiece model, or it is damaged.") from None
    expected = {}
    user_defined = read_proto(path.read_bytes()).user_defined  # which the library does not tell
    for i in range(pieces.vocab_size()):
        kind = USER_DEFINED if i in user_defined else NORMAL
        for is_one, other in (
            (pieces.is_unknown, UNKNOWN),
            (pieces.is_control, CONTROL),
            (pieces.is_unused, UNUSED),
            (pieces.is_byte, BYTE),
        ):
            kind = other if is_one(i) else kind
        expected[i] = Token(pieces.id_to_piece(i), (kind,), pieces.get_score(i))
    return expected


def _wrong_tokens(file: GGUFFile, expected: dict[int, Token], size: int) -> Iterator[str]:
    lists = {
        "texts": file.strings(f"{KEYS}tokens"),
        "kinds": file.get(f"{KEYS}token_type"),
        "scores": file.get(f"{KEYS}scores"),
    }
    if not any(token.score is not None for token in expected.values()):
        lists["scores"] = [None] * size
    for name, values in lists.items():
        if not isinstance(values, list) or len(values) != size:
            yield f"the file has no list of the {name} of {size} tokens"
            return
    wrong = []
    for i, (text, kind, score) in enumerate(zip(*lists.values(), strict=True)):
        token = expected.get(i, PADDING)
        alike = token.text is None or _stored(text) == _stored(token.text)
        if not alike or kind not in token.kinds or token.score not in (None, score):
            wrong.append(f"{i}: {Token(text, (kind,), score)}, not {token}")
    if wrong:
        yield f"{len(wrong)} tokens are not the checkpoint's: the first is {wrong[0]}"


def _stored(text: str) -> str:
    """As ggml tells it: up to a NUL, without halves of surrogates, and with spaces of either kind
    (those of an added token are the text's)."""
    return text.partition("\0")[0].encode(errors="replace").decode().replace("\u2581", " ")


def _wrong_merges(file: GGUFFile, json: TokenizerFile) -> Iterator[str]:
    """Of a merge that stands twice the tokenizers library takes the last place, llama.cpp the
    first."""
    theirs = [_stored(" ".join(pair)) for pair in json.merges(json.vocab())]
    ours = list(dict.fromkeys(_stored(merge) for merge in file.strings(f"{KEYS}merges")))
    if ours != theirs:
        at = len(os.path.commonprefix([ours, theirs]))
        yield f"merge {at} is not the checkpoint's: {ours[at : at + 1]}, not {theirs[at : at + 1]}"
