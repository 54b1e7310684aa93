"""Byte-level BPE vocabularies: tokenizer.json, as Llama 3 (R1) and Llama 4 (Pro) have it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mobilellm_cpp.errors import CheckpointError

from .config import Config, read_json
from .vocabulary import (
    CONTROL,
    NORMAL,
    UNUSED,
    USER_DEFINED,
    AddedToken,
    Vocabulary,
    looks_special,
)

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
LLAMA4 = "llama4"
# How a tokenizer.json splits words, and llama.cpp's name for it (of the second an approximation).
PRE_TOKENIZERS = {
    _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+": "llama-bpe",
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTIONS}?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTIONS}?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+": LLAMA4,
}


def is_byte_level(path: Path) -> bool:
    """Whether a tokenizer.json is there and works on bytes (one made of a SentencePiece model
    works on characters, and tokenizer.model says more)."""
    if not path.exists():
        return False
    return any(step.get("type") == "ByteLevel" for step in _steps(read_json(path), "pre_tokenizer"))


def read_bpe(
    folder: Path,
    settings: dict[str, Any],
    added: list[AddedToken],
    config: Config,
    vocab_size: int,
) -> Vocabulary:
    """The vocabulary of tokenizer.json; ids that it does not name are padding.

    bos and eos are those that tokenizer_config.json (`settings`) names. Raises CheckpointError
    for whatever would make llama.cpp split a text in another way than this file says.
    """
    path = folder / "tokenizer.json"
    fields = read_json(path)
    if fields.get("normalizer") is not None:
        raise CheckpointError(f"{path}: normalizer must be null: llama.cpp would not apply it.")
    model = fields.get("model")
    if not isinstance(model, dict) or model.get("type") != "BPE":
        raise CheckpointError(f"{path}: model is no BPE.")
    pre = _pre_tokenizer(path, fields)
    if model.get("ignore_merges") is not True:
        raise CheckpointError(f"{path}: ignore_merges must be true, as llama.cpp takes it to be.")
    for name in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        if model.get(name):
            raise CheckpointError(f"{path}: {name} must be null: llama.cpp would not apply it.")
    vocab = _vocab(path, model)
    extra = _added_tokens(path, fields)
    highest = max([*vocab.values(), *(token.id for token in extra)])
    if highest >= vocab_size:
        raise config.refusal("vocab_size", f"must hold id {highest} of tokenizer.json", vocab_size)

    tokens = [f"[PAD{i}]".encode() for i in range(vocab_size)]
    types = [UNUSED] * vocab_size
    for text, token_id in vocab.items():
        if types[token_id] != UNUSED:
            raise CheckpointError(f"{path}: model.vocab has two tokens for id {token_id}.")
        tokens[token_id] = text.encode(errors="replace")
        types[token_id] = NORMAL
    notes = []
    ids = {}
    for place, token_id, text, special in [*extra, *added]:
        if token_id >= vocab_size:
            notes.append(f"{place}: {text!r} left out, its id {token_id} has no embedding")
            continue
        tokens[token_id] = text.encode(errors="replace")
        types[token_id] = CONTROL if special else USER_DEFINED
        ids[text] = token_id

    first, last = _template(path, fields, ids)
    named = {name: _named(settings, f"{name}_token") for name in ("bos", "eos", "unk", "pad")}
    named["bos"] = first or named["bos"]
    named["eos"] = last or named["eos"]
    return Vocabulary(
        model="gpt2",
        pre=pre,
        tokens=tokens,
        types=types,
        merges=_merges(path, model, vocab),
        ids={name: ids[text] for name, text in named.items() if text in ids},
        add_bos=first is not None,
        add_eos=last is not None,
        notes=notes,
    )


def _steps(fields: dict[str, Any], part: str) -> list[dict[str, Any]]:
    """The steps of a pre-tokenizer or post-processor, alone or in a Sequence."""
    whole = fields.get(part)
    if not isinstance(whole, dict):
        return []
    inner = whole.get("pretokenizers" if part == "pre_tokenizer" else "processors")
    steps = inner if whole.get("type") == "Sequence" and isinstance(inner, list) else [whole]
    return [step for step in steps if isinstance(step, dict)]


def _pre_tokenizer(path: Path, fields: dict[str, Any]) -> str:
    steps = _steps(fields, "pre_tokenizer")
    if [step.get("type") for step in steps] == ["Split", "ByteLevel"]:
        split, level = steps
        pattern = split.get("pattern")
        regex = pattern.get("Regex") if isinstance(pattern, dict) else None
        plain = split.get("behavior") == "Isolated" and not split.get("invert")
        bare = not level.get("add_prefix_space") and not level.get("use_regex", True)
        if isinstance(regex, str) and regex in PRE_TOKENIZERS and plain and bare:
            return PRE_TOKENIZERS[regex]
    raise CheckpointError(
        f"{path}: pre_tokenizer is neither Llama 3's nor Llama 4's: "
        "llama.cpp would split texts otherwise."
    )


def _vocab(path: Path, model: dict[str, Any]) -> dict[str, int]:
    vocab = model.get("vocab")
    if not isinstance(vocab, dict) or not vocab:
        raise CheckpointError(f"{path}: model.vocab is missing or no JSON object.")
    for text, token_id in vocab.items():
        if type(token_id) is not int or token_id < 0:
            raise CheckpointError(f"{path}: {text[:60]!r} has the impossible id {token_id!r}.")
    for byte, character in enumerate(byte_characters()):
        if character not in vocab:
            raise CheckpointError(f"{path}: model.vocab has no token for the byte {byte:#04x}.")
    return vocab


def byte_characters() -> list[str]:
    """The character that stands for each byte in byte-level BPE (GPT-2's `bytes_to_unicode`):
    itself where it is printable, else the next one from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def _merges(path: Path, model: dict[str, Any], vocab: dict[str, int]) -> list[bytes]:
    """`left right` of each merge, which is a string of that form or a list of the two."""
    merges = model.get("merges")
    if not isinstance(merges, list):
        raise CheckpointError(f"{path}: model.merges is missing or no list.")
    found = []
    for merge in merges:
        pair = merge.split(" ") if isinstance(merge, str) else merge
        sound = isinstance(pair, list) and len(pair) == 2
        if not sound or not all(isinstance(part, str) and part in vocab for part in pair):
            raise CheckpointError(f"{path}: {str(merge)[:60]!r} is no merge of two tokens.")
        if "".join(pair) not in vocab:
            raise CheckpointError(f"{path}: the merge {str(merge)[:60]!r} makes no token.")
        found.append(" ".join(pair).encode())
    return found


def _added_tokens(path: Path, fields: dict[str, Any]) -> list[AddedToken]:
    added = fields.get("added_tokens") or []
    if not isinstance(added, list):
        raise CheckpointError(f"{path}: added_tokens is no list.")
    found = []
    for entry in added:
        token_id = entry.get("id") if isinstance(entry, dict) else None
        text = entry.get("content") if isinstance(entry, dict) else None
        if type(token_id) is not int or token_id < 0 or not isinstance(text, str):
            raise CheckpointError(f"{path}: added_tokens is broken at {str(entry)[:60]!r}.")
        for name in ("lstrip", "rstrip", "single_word"):
            if entry.get(name):
                raise CheckpointError(
                    f"{path}: {name} of {text[:60]!r} must be false: llama.cpp would not apply it."
                )
        special = bool(entry.get("special")) or looks_special(text)
        found.append(AddedToken(path.name, token_id, text, special))
    return found


def _template(
    path: Path, fields: dict[str, Any], ids: dict[str, int]
) -> tuple[str | None, str | None]:
    """The special tokens that are put before and after a text; `ids` are those of added tokens."""
    for step in _steps(fields, "post_processor"):
        if step.get("type") != "TemplateProcessing":
            continue
        single = step.get("single")
        items = single if isinstance(single, list) else []
        parts = [item if isinstance(item, dict) else {} for item in items]
        at = [i for i, part in enumerate(parts) if "Sequence" in part]
        special = [part.get("SpecialToken") for part in parts]
        names = [token.get("id") if isinstance(token, dict) else None for token in special]
        if len(at) != 1 or at[0] > 1 or len(parts) > at[0] + 2:
            raise CheckpointError(
                f"{path}: post_processor puts more than one token before or after a text."
            )
        defined = step.get("special_tokens")
        for name in filter(None, names):
            entry = defined.get(name) if isinstance(defined, dict) else None
            if not isinstance(entry, dict) or entry.get("ids") != [ids.get(name)]:
                raise CheckpointError(f"{path}: post_processor puts no added token for {name!r}.")
        before, after = names[: at[0]], names[at[0] + 1 :]
        return (before[0] if before else None), (after[0] if after else None)
    return None, None


def _named(settings: dict[str, Any], name: str) -> str | None:
    """The text of a token of tokenizer_config.json, there a string or an object."""
    token = settings.get(name)
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None
