"""A checkpoint's tokenizer in GGUF's form, whichever kind it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mobilellm_cpp.errors import CheckpointError

from .bpe import LLAMA4, is_byte_level, read_bpe
from .config import Config, read_json
from .gguf_file import array_f32, array_i32, array_string, boolean, string, u32
from .sentencepiece_file import read_sentencepiece
from .vocabulary import AddedToken, Vocabulary, looks_special


def read_tokenizer(
    folder: Path, config: Config, vocab_size: int, stock: bool
) -> tuple[dict[str, bytes], list[str]]:
    """The tokenizer's metadata for a model with `vocab_size` embeddings, and notes.

    A byte-level tokenizer.json is read as such, else tokenizer.model. Ids that neither names are
    padding. `stock` is whether the file is for stock llama.cpp, too. Raises CheckpointError for a
    vocabulary that llama.cpp would use otherwise.
    """
    settings = _json(folder / "tokenizer_config.json")
    added = _added_tokens(folder, settings)
    if is_byte_level(folder / "tokenizer.json"):
        vocabulary = read_bpe(folder, settings, added, config, vocab_size)
    else:
        vocabulary = read_sentencepiece(folder, settings, added, config, vocab_size)
    _refuse_duplicates(folder, vocabulary.tokens)
    if vocabulary.pre == LLAMA4 and stock:
        vocabulary.notes.append(
            "stock llama.cpp cuts some words otherwise than this tokenizer: those with combining "
            "marks or with capitals beyond ASCII inside, and those that no merges make"
        )
    elif vocabulary.pre == LLAMA4:
        vocabulary.pre = "mobilellm"  # exact, in our build
    metadata = {
        "tokenizer.ggml.model": string(vocabulary.model),
        "tokenizer.ggml.pre": string(vocabulary.pre),
        "tokenizer.ggml.tokens": array_string(vocabulary.tokens),
        "tokenizer.ggml.token_type": array_i32(vocabulary.types),
    }
    if vocabulary.scores:
        metadata["tokenizer.ggml.scores"] = array_f32(vocabulary.scores)
    if vocabulary.merges:
        metadata["tokenizer.ggml.merges"] = array_string(vocabulary.merges)
    ids, notes = _special_ids(folder, config, vocabulary)
    metadata |= {f"tokenizer.ggml.{name}_token_id": u32(i) for name, i in ids.items()}
    metadata["tokenizer.ggml.add_bos_token"] = boolean(vocabulary.add_bos)
    metadata["tokenizer.ggml.add_eos_token"] = boolean(vocabulary.add_eos)
    if vocabulary.add_space_prefix is not None:
        metadata["tokenizer.ggml.add_space_prefix"] = boolean(vocabulary.add_space_prefix)
    template = chat_template(folder, settings)
    if template is not None:
        metadata["tokenizer.chat_template"] = string(template)
    return metadata, [*vocabulary.notes, *notes]


def _json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}


def _special_ids(
    folder: Path, config: Config, vocabulary: Vocabulary
) -> tuple[dict[str, int], list[str]]:
    """Ids by GGUF's names. Every end-of-turn id ends an answer: llama.cpp ends a text at any token
    that stands in one of these places (the last three are of fill-in-the-middle models)."""
    size = len(vocabulary.tokens)
    ids = {}
    for name, key in (("bos", "bos"), ("unk", "unknown"), ("pad", "padding")):
        token_id = vocabulary.ids.get(name)
        if token_id is None:
            token_id = config.token_id(f"{name}_token_id", size)
        if token_id is not None:
            ids[key] = token_id
    generation = _json(folder / "generation_config.json").get("eos_token_id")
    ends: list[int] = []
    for said in ([vocabulary.ids.get("eos")], config.get("eos_token_id"), generation):
        for end in said if isinstance(said, list) else [said]:
            if type(end) is int and 0 <= end < size and end not in ends:
                ends.append(end)
    if ends:
        ids["eos"] = ends.pop(0)
    for end in list(ends):
        if b"eom" in vocabulary.tokens[end] and "eom" not in ids:
            ids["eom"] = end
            ends.remove(end)
    places = ("eot", "eom", "fim_rep", "fim_sep", "fim_pad")
    for key, end in zip([k for k in places if k not in ids], list(ends), strict=False):
        ids[key] = end
        ends.remove(end)
    return ids, [f"token {end} ends a text too, for which the file has no place" for end in ends]


def _added_tokens(folder: Path, settings: dict[str, Any]) -> list[AddedToken]:
    """In the order in which later ones win."""
    added: list[AddedToken] = []
    path = folder / "added_tokens.json"
    if path.exists():
        for name, token_id in read_json(path).items():
            if type(token_id) is not int or token_id < 0:
                raise CheckpointError(f"{path}: {name!r} has the impossible id {token_id!r}.")
            added.append(AddedToken(path.name, token_id, name, False))
    path = folder / "tokenizer_config.json"
    decoder = settings.get("added_tokens_decoder", {})
    if not isinstance(decoder, dict):
        raise CheckpointError(f"{path}: added_tokens_decoder is no JSON object.")
    for key, entry in decoder.items():
        text = entry.get("content") if isinstance(entry, dict) else None
        if not key.isdecimal() or not isinstance(text, str) or len(key) > 9:
            raise CheckpointError(f"{path}: added_tokens_decoder is broken at id {key!r}.")
        special = bool(entry.get("special")) or looks_special(text)
        if not special:
            text = text.replace("\u2581", " ")
        added.append(AddedToken(path.name, int(key), text, special))
    return added


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


def chat_template(folder: Path, settings: dict[str, Any]) -> str | None:
    """The file's template, which goes first as in transformers, or the one in
    tokenizer_config.json (of several the default one)."""
    path = folder / "chat_template.jinja"
    try:
        if path.exists():
            return path.read_text(encoding="utf-8")
    except ValueError:
        raise CheckpointError(f"{path} is no UTF-8 text.") from None
    template = settings.get("chat_template")
    if isinstance(template, list):
        default = [t for t in template if isinstance(t, dict) and t.get("name") == "default"]
        template = default[-1].get("template") if default else None
    return template if isinstance(template, str) else None
