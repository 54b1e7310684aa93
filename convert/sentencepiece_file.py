"""SentencePiece vocabularies: tokenizer.model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mobilellm_cpp.errors import CheckpointError

from .config import Config
from .vocabulary import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    AddedToken,
    Vocabulary,
)

ADDED_SCORE, PADDING_SCORE = -1000.0, -10000.0  # as llama.cpp's converter sets them


def read_sentencepiece(
    folder: Path,
    settings: dict[str, Any],
    added: list[AddedToken],
    config: Config,
    vocab_size: int,
) -> Vocabulary:
    """The vocabulary of tokenizer.model, with added tokens and padding beyond its pieces.

    The ids of bos and eos come from config.json where they are valid, else from SentencePiece, as
    those of unk and pad do; the strings in tokenizer_config.json (`settings`) are not asked, for
    the hub's are empty.
    """
    pieces, tokens = load_sentencepiece(folder / "tokenizer.model")
    count = len(tokens)
    if count > vocab_size:
        rule = f"must hold the {count} pieces of tokenizer.model"
        raise config.refusal("vocab_size", rule, vocab_size)
    scores = [pieces.get_score(i) for i in range(count)]
    types = [_piece_type(pieces, i) for i in range(count)]
    # BPE pieces have their rank as score, those of a unigram model logarithms
    if any(t == NORMAL and not s.is_integer() for t, s in zip(types, scores, strict=True)):
        raise CheckpointError(
            f"{folder / 'tokenizer.model'} is no BPE model: llama.cpp would split texts otherwise."
        )
    tokens += [f"[PAD{i}]".encode() for i in range(count, vocab_size)]
    scores += [PADDING_SCORE] * (vocab_size - count)
    types += [UNUSED] * (vocab_size - count)

    notes = []
    for place, token_id, text, special in added:
        if token_id >= vocab_size:
            notes.append(f"{place}: {text!r} left out, its id {token_id} has no embedding")
            continue
        types[token_id] = CONTROL if special else USER_DEFINED
        tokens[token_id] = text.encode(errors="replace")
        scores[token_id] = ADDED_SCORE

    own = {
        "bos": pieces.bos_id(),
        "eos": pieces.eos_id(),
        "unk": pieces.unk_id(),
        "pad": pieces.pad_id(),
    }
    ids = {}
    for name, token_id in own.items():
        configured = config.token_id(f"{name}_token_id", vocab_size)
        token_id = token_id if configured is None else configured
        if token_id >= 0:
            ids[name] = token_id
    adds = {}
    for name, default in (("add_bos_token", True), ("add_eos_token", False)):
        value = settings.get(name)
        adds[name] = value if isinstance(value, bool) else default
    prefix = settings.get("add_prefix_space")
    if not isinstance(prefix, bool):
        prefix = None if _adds_prefix(pieces) else False
    return Vocabulary(
        model="llama",
        pre="default",
        tokens=tokens,
        types=types,
        scores=scores,
        ids=ids,
        add_bos=adds["add_bos_token"],
        add_eos=adds["add_eos_token"],
        add_space_prefix=prefix,
        notes=notes,
    )


def load_sentencepiece(path: Path) -> tuple[Any, list[bytes]]:
    """A SentencePieceProcessor of the file, and the texts of its pieces."""
    import sentencepiece

    if not path.exists():
        raise CheckpointError(
            f"{path} is missing, and there is no byte-level tokenizer.json in its place."
        )
    try:
        pieces = sentencepiece.SentencePieceProcessor()
        pieces.LoadFromSerializedProto(path.read_bytes())
        texts = [pieces.id_to_piece(i).encode() for i in range(pieces.vocab_size())]
        if not texts:
            raise ValueError("it has no pieces")
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from None
    except (RuntimeError, ValueError):
        raise CheckpointError(f"{path} is no SentencePiece model, or a damaged one.") from None
    return pieces, texts


def _piece_type(pieces: Any, token_id: int) -> int:
    if pieces.is_unknown(token_id):
        return UNKNOWN
    if pieces.is_control(token_id):
        return CONTROL
    if pieces.is_unused(token_id):
        return UNUSED
    return BYTE if pieces.is_byte(token_id) else NORMAL


def _adds_prefix(pieces: Any) -> bool:
    """Whether SentencePiece itself puts a space before a text."""
    return bool("".join(pieces.encode("a", out_type=str)).startswith("\u2581"))
