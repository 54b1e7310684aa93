"""SentencePiece vocabularies: tokenizer.model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mobilellm_cpp.errors import CheckpointError

from .added_tokens import AddedToken
from .config import Config
from .vocabulary import (
    BYTE,
    CONTROL,
    NORMAL,
    PADDING_SCORE,
    UNKNOWN,
    UNUSED,
    Vocabulary,
    padding,
)


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
    vocabulary = Vocabulary(
        model="llama",
        pre="default",
        tokens=tokens + padding(count, vocab_size),
        types=types + [UNUSED] * (vocab_size - count),
        scores=scores + [PADDING_SCORE] * (vocab_size - count),
        add_bos=_flag(settings, "add_bos_token", True),
        add_eos=_flag(settings, "add_eos_token", False),
    )
    vocabulary.add(map(_as_text_has_it, added))
    own = {
        "bos": pieces.bos_id(),
        "eos": pieces.eos_id(),
        "unk": pieces.unk_id(),
        "pad": pieces.pad_id(),
    }
    for name, token_id in own.items():
        configured = config.token_id(f"{name}_token_id", vocab_size)
        token_id = token_id if configured is None else configured
        if token_id >= 0:
            vocabulary.ids[name] = token_id
    if _flag(settings, "add_prefix_space", _adds_prefix(pieces)):
        vocabulary.prefix = "every" if _flag(settings, "legacy", True) else "first"
    return vocabulary


def _flag(settings: dict[str, Any], name: str, default: bool) -> bool:
    value = settings.get(name)
    return value if isinstance(value, bool) else default


def _as_text_has_it(token: AddedToken) -> AddedToken:
    """Spaces of a token that is shown are those of the text; no normalizer comes before it."""
    text = token.text if token.special else token.text.replace("\u2581", " ")
    return token._replace(text=text, normalized=False)


def load_sentencepiece(path: Path) -> tuple[Any, list[bytes]]:
    """A SentencePieceProcessor of the file, and the texts of its pieces."""
    import sentencepiece

    if not path.exists():
        raise CheckpointError(f"{path.parent}: tokenizer.model and tokenizer.json are missing.")
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
