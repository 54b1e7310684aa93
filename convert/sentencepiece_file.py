"""SentencePiece vocabularies: tokenizer.model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mobilellm_cpp.errors import CheckpointError

from .added_tokens import AddedToken
from .config import Config
from .sentencepiece_proto import BPE, ModelProto, read_proto
from .vocabulary import (
    BYTE,
    CONTROL,
    NORMAL,
    PADDING_SCORE,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    Vocabulary,
    padding,
)

SPACE = "\u2581".encode()


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
    path = folder / "tokenizer.model"
    pieces, tokens, proto = load_sentencepiece(path)
    count = len(tokens)
    if count > vocab_size:
        rule = f"must hold the {count} pieces of tokenizer.model"
        raise config.refusal("vocab_size", rule, vocab_size)
    scores = [pieces.get_score(i) for i in range(count)]
    types = [_piece_type(pieces, proto, i) for i in range(count)]
    if rule := _not_as_llama_cpp(proto, tokens, types):
        raise CheckpointError(f"{path} {rule}: llama.cpp would split texts differently.")
    for i in proto.user_defined:  # shown as they stand
        tokens[i] = tokens[i].replace(SPACE, b" ")
    vocabulary = Vocabulary(
        model="llama",
        pre="default",
        tokens=tokens + padding(count, vocab_size),
        types=types + [UNUSED] * (vocab_size - count),
        scores=scores + [PADDING_SCORE] * (vocab_size - count),
        add_bos=_flag(settings, "add_bos_token", True),
        add_eos=_flag(settings, "add_eos_token", False),
        pieces=set(proto.user_defined),
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
    if vocabulary.pieces and vocabulary.prefix == "first":
        raise CheckpointError(
            f"{path} has user-defined pieces ({tokens[min(vocabulary.pieces)].decode()!r}), beside "
            "which tokenizer_config.json must not set legacy to false: llama.cpp has no such rule."
        )
    return vocabulary


def _not_as_llama_cpp(proto: ModelProto, tokens: list[bytes], types: list[int]) -> str:
    """What this model does to a text that llama.cpp does not, in a few words, or ""."""
    if proto.model_type != BPE:
        return "is not a BPE model"
    if proto.rule:
        return f"changes characters by its normalizer {proto.rule}"
    if proto.removes_spaces:
        return "removes spaces that stand twice or at an end (remove_extra_whitespaces)"
    if not proto.escapes_spaces:
        return "has pieces with plain spaces (escape_whitespaces is false)"
    if proto.space_behind:
        return "puts spaces behind words (treat_whitespace_as_suffix)"
    if proto.denormalizes:
        return "changes characters of texts that it makes (denormalizer_spec)"
    if types.count(BYTE) != 256:
        return "has no pieces for single bytes (byte_fallback)"
    # user-defined pieces are cut out of a text before others are joined
    texts = {text for text, kind in zip(tokens, types, strict=True) if kind != USER_DEFINED}

    def symbol(text: bytes) -> bool:
        return text in texts or len(text.decode(errors="replace")) == 1

    for text, kind in zip(tokens, types, strict=True):
        if kind in (NORMAL, USER_DEFINED):
            continue
        if any(symbol(text[:cut]) and symbol(text[cut:]) for cut in range(1, len(text))):
            return f"never makes {text.decode()!r} of a text, although two other pieces make it"
    return ""


def _flag(settings: dict[str, Any], name: str, default: bool) -> bool:
    value = settings.get(name)
    return value if isinstance(value, bool) else default


def _as_text_has_it(token: AddedToken) -> AddedToken:
    """Spaces of a token that is shown are those of the text; no normalizer comes before it."""
    text = token.text if token.special else token.text.replace("\u2581", " ")
    return token._replace(text=text, normalized=False)


def load_sentencepiece(path: Path) -> tuple[Any, list[bytes], ModelProto]:
    """A SentencePieceProcessor of the file, the texts of its pieces, and what else it says."""
    import sentencepiece

    if not path.exists():
        raise CheckpointError(f"{path.parent}: tokenizer.model and tokenizer.json are missing.")
    try:
        pieces = sentencepiece.SentencePieceProcessor()
        data = path.read_bytes()
        pieces.LoadFromSerializedProto(data)
        proto = read_proto(data)
        texts = [pieces.id_to_piece(i).encode() for i in range(pieces.vocab_size())]
        if not texts:
            raise ValueError("it has no pieces")
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from None
    except (RuntimeError, ValueError):
        raise CheckpointError(f"{path} is not a SentencePiece model, or it is damaged.") from None
    return pieces, texts, proto


def _piece_type(pieces: Any, proto: ModelProto, token_id: int) -> int:
    if token_id in proto.user_defined:
        return USER_DEFINED
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
