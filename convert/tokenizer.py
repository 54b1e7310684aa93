"""A checkpoint's tokenizer in GGUF's form, whichever kind it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gguf.constants import Keys

from mobilellm_cpp.errors import CheckpointError

from .added_tokens import added_tokens
from .bpe import LLAMA4, LLAMA4_MERGED, read_bpe
from .chat_template import chosen_templates
from .config import Config, read_json
from .gguf_file import array_f32, array_i32, array_string, boolean, string, u32
from .sentencepiece_file import read_sentencepiece
from .text_rules import text_rules
from .tokenizer_file import TokenizerFile
from .vocabulary import Vocabulary

T = Keys.Tokenizer
ENDS = (T.EOT_ID, T.EOM_ID, T.FIM_REP_ID, T.FIM_SEP_ID, T.FIM_PAD_ID)  # a text ends at each of them


class TokenizerFolder:
    """What a folder says of its tokenizer, each file read once: `settings` are the fields of
    tokenizer_config.json, `file` is tokenizer.json. `from_file` is whether that is the vocabulary:
    where it works on bytes, or there is no tokenizer.model."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.settings = _json(folder / "tokenizer_config.json")
        path = folder / "tokenizer.json"
        self.file = TokenizerFile(path) if path.exists() else None
        self.added = added_tokens(folder, self.settings, self.file)

    @property
    def from_file(self) -> bool:
        has_model = (self.folder / "tokenizer.model").exists()
        return self.file is not None and (self.file.byte_level or not has_model)

    def vocabulary(self, config: Config, vocab_size: int) -> Vocabulary:
        """With an entry for each of `vocab_size` embeddings: ids that no file names are padding.
        Raises CheckpointError for what llama.cpp would use otherwise."""
        if self.file is not None and self.from_file:
            return read_bpe(self.file, self.settings, self.added, config, vocab_size)
        return read_sentencepiece(self.folder, self.settings, self.added, config, vocab_size)


def read_tokenizer(
    folder: Path,
    config: Config,
    vocab_size: int,
    stock: bool,
    template: str | None = None,
    adapter: Path | None = None,
) -> tuple[dict[str, bytes], list[str]]:
    """The tokenizer's metadata for a model with `vocab_size` embeddings, and notes.

    `stock` is whether the file is for stock llama.cpp, too; `template` the chat template to take: a
    name or a file; `adapter` the folder of one that is merged. Raises CheckpointError for a
    vocabulary that llama.cpp would use otherwise.
    """
    source = TokenizerFolder(folder)
    vocabulary = source.vocabulary(config, vocab_size)
    _refuse_duplicates(folder, vocabulary.tokens)
    rules, otherwise = text_rules(vocabulary)
    if vocabulary.pre in (LLAMA4, LLAMA4_MERGED) and stock:
        unmerged = ", and those that no merges make" if vocabulary.pre == LLAMA4 else ""
        vocabulary.pre = "llama4"
        otherwise.append(
            "it splits words with combining marks or with capitals beyond ASCII inside in another "
            f"way{unmerged}"
        )
    notes = list(vocabulary.notes)
    if otherwise and stock:
        notes.append(f"stock llama.cpp cuts some texts otherwise: {'; '.join(otherwise)}")
    metadata = {
        T.MODEL: string(vocabulary.model),
        T.PRE: string(vocabulary.pre),
        T.LIST: array_string(vocabulary.tokens),
        T.TOKEN_TYPE: array_i32(vocabulary.types),
    }
    if vocabulary.scores:
        metadata[T.SCORES] = array_f32(vocabulary.scores)
    if vocabulary.merges:
        metadata[T.MERGES] = array_string(vocabulary.merges)
    ids, further = _special_ids(folder, config, vocabulary)
    metadata |= {key: u32(i) for key, i in ids.items()}
    metadata[T.ADD_BOS] = boolean(vocabulary.add_bos)
    metadata[T.ADD_EOS] = boolean(vocabulary.add_eos)
    if vocabulary.model == "llama" and vocabulary.prefix == "none":
        metadata[T.ADD_PREFIX] = boolean(False)
    templates, unchosen = chosen_templates(folder, source.settings, template, adapter)
    return metadata | rules | templates, [*notes, *further, *unchosen]


def _json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}


def _special_ids(
    folder: Path, config: Config, vocabulary: Vocabulary
) -> tuple[dict[str, int], list[str]]:
    """Ids by GGUF's keys. Every end-of-turn id ends an answer: llama.cpp ends a text at any token
    that stands in one of these places (the last three are of fill-in-the-middle models)."""
    size = len(vocabulary.tokens)
    ids = {}
    for name, key in (("bos", T.BOS_ID), ("unk", T.UNK_ID), ("pad", T.PAD_ID)):
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
        ids[T.EOS_ID] = ends.pop(0)
    for end in list(ends):
        if b"eom" in vocabulary.tokens[end] and T.EOM_ID not in ids:
            ids[T.EOM_ID] = end
            ends.remove(end)
    for key, end in zip([k for k in ENDS if k not in ids], list(ends), strict=False):
        ids[key] = end
        ends.remove(end)
    return ids, [f"token {end} ends a text too, for which the file has no place" for end in ends]


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
