"""tokenizer.json, parsed once: what both kinds of vocabulary that it may hold are read from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mobilellm_cpp.errors import CheckpointError

from .config import read_json

# what is read of a folder for its tokenizer and its chats
TOKENIZER_FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)

LONGEST = 4096  # characters of a token; longer ones take time and are met in no text
PARTS = {  # a part of the file, and the name of its steps where it is a Sequence
    "normalizer": "normalizers",
    "pre_tokenizer": "pretokenizers",
    "post_processor": "processors",
}


class TokenizerFile:
    """The fields of a tokenizer.json. Each method raises CheckpointError, naming the place, for
    what is broken or what llama.cpp has nothing like."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.fields = read_json(path)

    @property
    def byte_level(self) -> bool:
        """Whether it works on bytes; one made of a SentencePiece model works on characters."""
        return any(step.get("type") == "ByteLevel" for step in self.steps("pre_tokenizer"))

    def refusal(self, rule: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {rule}.")

    def steps(self, part: str) -> list[dict[str, Any]]:
        """The steps of a normalizer, pre-tokenizer or post-processor, alone or in a Sequence."""
        whole = self.fields.get(part)
        if not isinstance(whole, dict):
            return []
        inner = whole.get(PARTS[part])
        steps = inner if whole.get("type") == "Sequence" and isinstance(inner, list) else [whole]
        return [step for step in steps if isinstance(step, dict)]

    def bpe(self) -> dict[str, Any]:
        """The fields of `model`."""
        model = self.fields.get("model")
        if not isinstance(model, dict) or model.get("type") != "BPE":
            raise self.refusal("model is not BPE")
        for name in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
            if model.get(name):
                raise self.refusal(f"{name} must be null: llama.cpp would not apply it")
        if not isinstance(model.get("ignore_merges", False), bool):
            raise self.refusal("ignore_merges is neither true nor false")
        return model

    def vocab(self) -> dict[str, int]:
        """Ids by text."""
        vocab = self.bpe().get("vocab")
        if not isinstance(vocab, dict) or not vocab:
            raise self.refusal("model.vocab is missing or no JSON object")
        seen = set()
        for text, token_id in vocab.items():
            if type(token_id) is not int or token_id < 0:
                raise self.refusal(f"{text[:60]!r} has the impossible id {token_id!r}")
            if len(text) > LONGEST:
                raise self.refusal(f"model.vocab has a token of {len(text)} characters")
            if token_id in seen:
                raise self.refusal(f"model.vocab has two tokens for id {token_id}")
            seen.add(token_id)
        return vocab

    def merges(self, vocab: dict[str, int]) -> list[tuple[str, str]]:
        """The two tokens of each merge, which is a string of them or a list; the first goes first.
        Of a merge that stands twice the last place counts."""
        merges = self.bpe().get("merges")
        if not isinstance(merges, list):
            raise self.refusal("model.merges is missing or no list")
        places: dict[tuple[str, str], int] = {}
        for place, merge in enumerate(merges):
            pair = merge.split(" ") if isinstance(merge, str) else merge
            sound = isinstance(pair, list) and len(pair) == 2
            if not sound or not all(isinstance(part, str) and part in vocab for part in pair):
                raise self.refusal(f"{str(merge)[:60]!r} is not a merge of two tokens")
            if "".join(pair) not in vocab:
                raise self.refusal(f"the merge {str(merge)[:60]!r} makes no token")
            places[pair[0], pair[1]] = place
        return sorted(places, key=places.__getitem__)

    def template(self, ids: dict[str, int]) -> tuple[str | None, str | None]:
        """The special tokens that are put before and after a text; `ids` are those of added
        tokens."""
        for step in self.steps("post_processor"):
            if step.get("type") == "ByteLevel":
                continue
            if step.get("type") != "TemplateProcessing":
                raise self.refusal(f"post_processor has a step that is unknown: {step.get('type')}")
            single = step.get("single")
            items = single if isinstance(single, list) else []
            parts = [item if isinstance(item, dict) else {} for item in items]
            at = [i for i, part in enumerate(parts) if "Sequence" in part]
            special = [part.get("SpecialToken") for part in parts]
            names = [token.get("id") if isinstance(token, dict) else None for token in special]
            if len(at) != 1 or at[0] > 1 or len(parts) > at[0] + 2:
                raise self.refusal("post_processor puts more than one token before or after a text")
            defined = step.get("special_tokens")
            for name in filter(None, names):
                entry = defined.get(name) if isinstance(defined, dict) else None
                if not isinstance(entry, dict) or entry.get("ids") != [ids.get(name)]:
                    raise self.refusal(f"post_processor puts no added token for {name!r}")
            before, after = names[: at[0]], names[at[0] + 1 :]
            return (before[0] if before else None), (after[0] if after else None)
        return None, None
