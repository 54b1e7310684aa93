"""SentencePiece vocabularies in GGUF's form."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mobilellm_cpp.errors import CheckpointError

from .config import Config, read_json
from .gguf_file import array_f32, array_i32, array_string, boolean, string, u32

# Token types of GGUF.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)

ADDED_SCORE, PADDING_SCORE = -1000.0, -10000.0  # as llama.cpp's converter sets them


def read_tokenizer(
    folder: Path, config: Config, vocab_size: int
) -> tuple[dict[str, bytes], list[str]]:
    """The tokenizer's metadata for a model with `vocab_size` embeddings, and notes.

    Ids beyond the SentencePiece model are added tokens or padding. The ids of bos and eos come
    from config.json where they are valid, else from SentencePiece, as those of unk and pad do;
    the strings in tokenizer_config.json are not asked, for the hub's are empty.
    """
    pieces, tokens = load_sentencepiece(folder / "tokenizer.model")
    count = len(tokens)
    if count > vocab_size:
        rule = f"must hold the {count} pieces of tokenizer.model"
        raise config.refusal("vocab_size", rule, vocab_size)
    settings: dict[str, Any] = {}
    if (folder / "tokenizer_config.json").exists():
        settings = read_json(folder / "tokenizer_config.json")

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
    for place, token_id, text, special in _added_tokens(folder, settings):
        if token_id >= vocab_size:
            notes.append(f"{place}: {text!r} left out, its id {token_id} has no embedding")
            continue
        types[token_id] = CONTROL if special else USER_DEFINED
        tokens[token_id] = text.encode(errors="replace")
        scores[token_id] = ADDED_SCORE
    _refuse_duplicates(folder, tokens)

    metadata = {
        "tokenizer.ggml.model": string("llama"),
        "tokenizer.ggml.pre": string("default"),
        "tokenizer.ggml.tokens": array_string(tokens),
        "tokenizer.ggml.scores": array_f32(scores),
        "tokenizer.ggml.token_type": array_i32(types),
    }
    for name, own in (
        ("bos", pieces.bos_id()),
        ("eos", pieces.eos_id()),
        ("unk", pieces.unk_id()),
        ("pad", pieces.pad_id()),
    ):
        configured = config.token_id(f"{name}_token_id", vocab_size)
        token_id = own if configured is None else configured
        if token_id >= 0:
            metadata[f"tokenizer.ggml.{_KEYS[name]}_token_id"] = u32(token_id)
    for name, default in (("add_bos_token", True), ("add_eos_token", False)):
        value = settings.get(name)
        metadata[f"tokenizer.ggml.{name}"] = boolean(value if value in (True, False) else default)
    prefix = settings.get("add_prefix_space")
    if not isinstance(prefix, bool) and not _adds_prefix(pieces):
        prefix = False
    if isinstance(prefix, bool):
        metadata["tokenizer.ggml.add_space_prefix"] = boolean(prefix)
    template = _chat_template(folder, settings)
    if template is not None:
        metadata["tokenizer.chat_template"] = string(template)
    return metadata, notes


_KEYS = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}


def load_sentencepiece(path: Path) -> tuple[Any, list[bytes]]:
    """A SentencePieceProcessor of the file, and the texts of its pieces."""
    import sentencepiece

    if not path.exists():
        raise CheckpointError(
            f"{path} is missing: only SentencePiece vocabularies can be converted so far."
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


def _added_tokens(folder: Path, settings: dict[str, Any]) -> list[tuple[str, int, str, bool]]:
    """File, id, text and whether it is special, in the order in which later ones win."""
    added: list[tuple[str, int, str, bool]] = []
    path = folder / "added_tokens.json"
    if path.exists():
        for name, token_id in read_json(path).items():
            if type(token_id) is not int or token_id < 0:
                raise CheckpointError(f"{path}: {name!r} has the impossible id {token_id!r}.")
            added.append((path.name, token_id, name, False))
    path = folder / "tokenizer_config.json"
    decoder = settings.get("added_tokens_decoder", {})
    if not isinstance(decoder, dict):
        raise CheckpointError(f"{path}: added_tokens_decoder is no JSON object.")
    for key, entry in decoder.items():
        text = entry.get("content") if isinstance(entry, dict) else None
        if not key.isdecimal() or not isinstance(text, str) or len(key) > 9:
            raise CheckpointError(f"{path}: added_tokens_decoder is broken at id {key!r}.")
        special = bool(entry.get("special")) or _looks_special(text)
        if not special:
            text = text.replace("\u2581", " ")
        added.append((path.name, int(key), text, special))
    return added


def _looks_special(text: str) -> bool:
    """Whether a token is a control token by its look, whatever its entry says."""
    brackets = (("<|", "|>"), ("<\uff5c", "\uff5c>"), ("<unused", ">"))
    wrapped = any(text.startswith(left) and text.endswith(right) for left, right in brackets)
    return wrapped or text in ("<pad>", "<mask>", "<2mass>", "[@BOS@]")


def _refuse_duplicates(folder: Path, tokens: list[bytes]) -> None:
    """llama.cpp takes no vocabulary in which two ids have one text."""
    ids: dict[bytes, int] = {}
    for token_id, token in enumerate(tokens):
        if token in ids:
            raise CheckpointError(
                f"{folder}: the tokenizer gives ids {ids[token]} and {token_id} the same text "
                f"{token.decode(errors='replace')!r}."
            )
        ids[token] = token_id


def _adds_prefix(pieces: Any) -> bool:
    """Whether SentencePiece itself puts a space before a text."""
    return bool("".join(pieces.encode("a", out_type=str)).startswith("\u2581"))


def _chat_template(folder: Path, settings: dict[str, Any]) -> str | None:
    """The template in tokenizer_config.json (of several the default one), or the file's."""
    template = settings.get("chat_template")
    if isinstance(template, list):
        default = [t for t in template if isinstance(t, dict) and t.get("name") == "default"]
        template = default[-1].get("template") if default else None
    if isinstance(template, str):
        return template
    path = folder / "chat_template.jinja"
    try:
        return path.read_text(encoding="utf-8") if path.exists() else None
    except ValueError:
        raise CheckpointError(f"{path} is no UTF-8 text.") from None
