"""BPE vocabularies of tokenizer.json: of bytes, as Llama 3 (R1) and Llama 4 (Pro) have them, or of
characters, as the tokenizers library makes them of a SentencePiece model."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from .added_tokens import AddedToken, file_tokens
from .config import Config
from .merge_scores import final_ranks
from .tokenizer_file import TokenizerFile
from .vocabulary import (
    ADDED_SCORE,
    BYTE,
    NORMAL,
    PADDING_SCORE,
    UNKNOWN,
    UNUSED,
    Vocabulary,
    padding,
)

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
# How a tokenizer.json splits words, and llama.cpp's names for it: where a word that is a token is
# taken as it is, and where every word is merged from its bytes (`ignore_merges`).
LLAMA4, LLAMA4_MERGED = "mobilellm", "mobilellm-merges"
PRE_TOKENIZERS = {
    _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+": ("llama-bpe", "smaug-bpe"),
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTIONS}?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTIONS}?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+": (LLAMA4, LLAMA4_MERGED),
}
SPACE = "\u2581"  # what stands for a space in a vocabulary of characters


def read_bpe(
    file: TokenizerFile,
    settings: dict[str, Any],
    added: list[AddedToken],
    config: Config,
    vocab_size: int,
) -> Vocabulary:
    """The vocabulary of tokenizer.json; ids that it does not name are padding.

    bos and eos are those that it puts around a text, else those that tokenizer_config.json
    (`settings`) names. Raises CheckpointError for whatever would make llama.cpp split a text in
    another way than this file says.
    """
    vocab = file.vocab()
    if (highest := max(vocab.values())) >= vocab_size:
        raise config.refusal("vocab_size", f"must hold id {highest} of tokenizer.json", vocab_size)
    tokens, types = padding(0, vocab_size), [UNUSED] * vocab_size
    for text, token_id in vocab.items():
        tokens[token_id] = text.encode(errors="replace")
        types[token_id] = NORMAL
    vocabulary = Vocabulary(model="", pre="", tokens=tokens, types=types)
    vocabulary.add(added)
    fill = _of_bytes if file.byte_level else _of_characters
    fill(vocabulary, file, vocab)
    _check_ids(file, vocab)
    ids = vocab | {token.text: token.id for token in vocabulary.added.values()}
    first, last = file.template({text: i for text, i in ids.items() if i in vocabulary.added})
    named = {
        "bos": first or _named(settings, "bos_token"),
        "eos": last or _named(settings, "eos_token"),
        "unk": _named(settings, "unk_token") or _named(file.bpe(), "unk_token"),
        "pad": _named(settings, "pad_token"),
    }
    vocabulary.ids = {name: ids[text] for name, text in named.items() if text in ids}
    vocabulary.add_bos, vocabulary.add_eos = first is not None, last is not None
    return vocabulary


def _check_ids(file: TokenizerFile, vocab: dict[str, int]) -> None:
    """The tokenizers library takes no notice of the ids of added tokens: it counts on from those of
    the vocabulary."""
    free = len(vocab)
    for token in file_tokens(file):
        expected = vocab.get(token.text, free)
        if token.id != expected:
            raise file.refusal(
                f"added_tokens gives {token.text[:60]!r} the id {token.id}, the tokenizers library "
                f"{expected}"
            )
        free = max(free, token.id + 1)


def _of_bytes(vocabulary: Vocabulary, file: TokenizerFile, vocab: dict[str, int]) -> None:
    if file.fields.get("normalizer") is not None:
        raise file.refusal("normalizer must be null: llama.cpp would not apply it")
    for byte, character in enumerate(byte_characters()):
        if character not in vocab:
            raise file.refusal(f"model.vocab has no token for the byte {byte:#04x}")
    vocabulary.model = "gpt2"
    vocabulary.pre = words(file)
    vocabulary.merges = [" ".join(pair).encode() for pair in file.merges(vocab)]


def words(file: TokenizerFile) -> str:
    """llama.cpp's name for how a vocabulary of bytes splits texts."""
    steps = file.steps("pre_tokenizer")
    if [step.get("type") for step in steps] == ["Split", "ByteLevel"]:
        split, level = steps
        pattern = split.get("pattern")
        regex = pattern.get("Regex") if isinstance(pattern, dict) else None
        plain = split.get("behavior") == "Isolated" and not split.get("invert")
        bare = not level.get("add_prefix_space") and not level.get("use_regex", True)
        if isinstance(regex, str) and regex in PRE_TOKENIZERS and plain and bare:
            whole, merged = PRE_TOKENIZERS[regex]
            return whole if file.bpe().get("ignore_merges") else merged
    raise file.refusal(
        "pre_tokenizer is neither Llama 3's nor Llama 4's: llama.cpp would split texts differently"
    )


def byte_characters() -> list[str]:
    """The character that stands for each byte in byte-level BPE (GPT-2's `bytes_to_unicode`):
    itself where it is printable, else the next one from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def _of_characters(vocabulary: Vocabulary, file: TokenizerFile, vocab: dict[str, int]) -> None:
    types = vocabulary.types
    if file.bpe().get("byte_fallback") is not True:
        raise file.refusal("byte_fallback must be true, as llama.cpp takes it to be")
    for byte in range(256):
        token_id = vocab.get(f"<0x{byte:02X}>")
        if token_id is None:
            raise file.refusal(f"model.vocab has no token for the byte {byte:#04x}")
        types[token_id] = BYTE
    unknown = vocab.get(_named(file.bpe(), "unk_token") or "")
    if unknown is not None and types[unknown] == NORMAL:
        types[unknown] = UNKNOWN
    vocabulary.prefix, vocabulary.normalizes, splits = spaces(file)
    normal = [text for text, i in vocab.items() if types[i] == NORMAL]
    if splits and (across := _first(text for text in normal if SPACE in text[1:])):
        raise file.refusal(f"pre_tokenizer splits at spaces, within which {across} would be made")
    vocabulary.model, vocabulary.pre = "llama", "default"
    scores = _scores(file, vocab, set(normal))
    vocabulary.scores = [
        PADDING_SCORE if kind == UNUSED else scores.get(token.decode(), ADDED_SCORE)
        for token, kind in zip(vocabulary.tokens, types, strict=True)
    ]


def _scores(file: TokenizerFile, vocab: dict[str, int], normal: set[str]) -> dict[str, float]:
    """By text 0, -1, ... as SentencePiece counts: first what merges make, in their order."""
    merges = file.merges(vocab)
    if bytewise := _first(part for pair in merges for part in pair if _BYTE.fullmatch(part)):
        raise file.refusal(f"a merge joins the byte {bytewise}: llama.cpp merges characters only")
    ranks, joined, apart = final_ranks(vocab, {pair: i for i, pair in enumerate(merges)})
    if unmade := _first(text for text in joined if text in normal):
        raise file.refusal(f"no merge makes the token {unmade}, which llama.cpp would join")
    if file.bpe().get("ignore_merges") and (unmade := _first(normal.intersection(apart))):
        raise file.refusal(f"ignore_merges must be false: no merge makes the token {unmade}")
    made = sorted(ranks, key=ranks.__getitem__)
    others = sorted(normal.difference(ranks), key=vocab.__getitem__)
    special = dict.fromkeys(vocab, 0.0)  # bytes and special tokens, as in SentencePiece
    return special | {text: -float(place) for place, text in enumerate([*made, *others])}


_BYTE = re.compile("<0x[0-9A-F]{2}>")


def spaces(file: TokenizerFile) -> tuple[str, bool, bool]:
    """Where a vocabulary of characters puts a space before a text (Vocabulary.prefix), whether its
    normalizer does it, and whether it splits texts at spaces."""
    normalizers, pre_tokenizers = file.steps("normalizer"), file.steps("pre_tokenizer")
    kinds = sorted(str(step.get("type")) for step in normalizers)
    replaces = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    prepends = {"type": "Prepend", "prepend": SPACE}
    known = kinds in (["Replace"], ["Prepend", "Replace"]) and not pre_tokenizers
    if known and all(step in (replaces, prepends) for step in normalizers):
        return ("every" if len(kinds) == 2 else "none"), True, False
    if normalizers:
        raise file.refusal(
            f"normalizer is not one that writes spaces as {SPACE} alone ({', '.join(kinds)}): "
            "llama.cpp would not apply it"
        )
    kinds = [str(step.get("type")) for step in pre_tokenizers]
    step = pre_tokenizers[0] if kinds == ["Metaspace"] else {}
    scheme = step.get("prepend_scheme", "always")
    if step.get("add_prefix_space") is False:
        scheme = "never"
    prefixes = {"always": "every-once", "first": "first-once", "never": "none"}
    if step.get("replacement") != SPACE or scheme not in prefixes:
        raise file.refusal(
            f"pre_tokenizer is not one that writes spaces as {SPACE} ({', '.join(kinds)}): "
            "llama.cpp would split texts differently"
        )
    return prefixes[scheme], False, step.get("split") is not False


def _first(texts: Iterable[str]) -> str | None:
    """One of the texts, as it may stand in a sentence; None where there is none."""
    text = next(iter(texts), None)
    return None if text is None else repr(text[:60])


def _named(settings: dict[str, Any], name: str) -> str | None:
    """The text of a token of tokenizer_config.json, there a string or an object."""
    token = settings.get(name)
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) and text else None
