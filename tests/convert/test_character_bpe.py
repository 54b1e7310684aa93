"""tokenizer.json made of a SentencePiece model, the only tokenizer of a checkpoint, against the
tokenizers library; and the rules of added tokens, which any tokenizer.json may have."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from checkpoints import (
    KINDS,
    characters_json,
    make_checkpoint,
    make_pro,
    make_r1,
    sentences,
    tokenizer_model,
    write_characters,
)
from gguf import GGUFReader
from mobilellm_cpp.convert import convert_checkpoint
from peer import run_on
from tokenizers import AddedToken, Tokenizer

from mobilellm_cpp import MobileLLM
from mobilellm_cpp.errors import CheckpointError
from mobilellm_cpp.inspection.tokenizer_check import TEXTS

SPACES = ("prepend", "replace", "always", "first", "never")
# Every flag, alone and with others; some overlap or hold each other.
ADDED = [
    AddedToken("<|user|>", special=True, normalized=False),
    AddedToken("<|left|>", special=True, normalized=False, lstrip=True),
    AddedToken("<|right|>", special=True, normalized=False, rstrip=True),
    AddedToken("<both>", lstrip=True, rstrip=True, normalized=False),
    AddedToken("<new>"),
    AddedToken("<n w>"),
    AddedToken("<strips>", lstrip=True, rstrip=True),
    AddedToken("abc", normalized=False),
    AddedToken("bcdef", normalized=False),
    AddedToken("<a new one>"),
    AddedToken("new", normalized=False),
    AddedToken(" ab", normalized=False),
]
GLUE = ["", "", " ", "  ", "\n", "\t ", "\u00a0", "\u3000", "\u2581", "a", "."]


def random_texts(n: int, added: list[Any]) -> list[str]:
    """Words, characters of every kind and added tokens in any order."""
    rng = random.Random(0)
    words = " ".join(sentences()[:50]).split()
    parts = [*(token.content for token in added), "<s>", "</s>", "ab", "cdef", "<0x41>"]
    kinds = [lambda: rng.choice(words), lambda: rng.choice(KINDS), lambda: rng.choice(parts)]
    return [
        "".join(rng.choice(kinds)() + rng.choice(GLUE) for _ in range(rng.randint(1, 9)))
        for _ in range(n)
    ]


def converted(folder: Path, fields: dict[str, Any]) -> tuple[MobileLLM, Tokenizer]:
    """The model of a checkpoint with this tokenizer.json, and the library's tokenizer."""
    size = len(fields["model"]["vocab"]) + len(fields["added_tokens"])
    checkpoint = make_checkpoint(folder / "c", vocab=size)
    write_characters(checkpoint, fields)
    convert_checkpoint(checkpoint, folder / "m.gguf")
    library = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    return MobileLLM(folder / "m.gguf", n_ctx=64, n_threads=1), library


@pytest.mark.parametrize("added", [[], ADDED], ids=["plain", "added"])
@pytest.mark.parametrize("spaces", SPACES)
def test_texts_become_the_librarys_tokens(spaces, added, tmp_path):
    llm, library = converted(tmp_path, characters_json(spaces=spaces, added=added))
    for text in [*TEXTS, *random_texts(3000, added)]:
        tokens = llm.tokenize(text.encode(), special=True)
        assert tokens == library.encode(text).ids, repr(text)


@pytest.mark.parametrize("spaces", ["prepend", "first"])
def test_special_tokens_as_plain_text(spaces, tmp_path):
    added = ADDED[:7]
    llm, library = converted(tmp_path, characters_json(spaces=spaces, added=added))
    library.encode_special_tokens = True
    for text in random_texts(500, added):
        tokens = llm.tokenize(text.encode(), special=False)
        assert tokens == library.encode(text).ids, repr(text)


def test_trained_by_the_tokenizers_library(tmp_path):
    """Its trainer keeps one pair for each token, where transformers writes all that SentencePiece
    allows; and Metaspace splits texts into words there."""
    from tokenizers import models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("\u2581", "first", split=True)
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(sentences()[:500], trainer)
    fields = json.loads(tokenizer.to_str())
    fields["added_tokens"] = fields["added_tokens"][:3]
    fields["model"] |= {"byte_fallback": True, "fuse_unk": True, "unk_token": "<unk>"}
    assert len(fields["model"]["merges"]) > 500
    llm, library = converted(tmp_path, fields)
    for text in [*TEXTS, *random_texts(1000, [])]:
        assert llm.tokenize(text.encode(), special=True) == library.encode(text).ids, repr(text)


def test_scores_are_sentencepieces(tmp_path):
    """What tokenizer.model would have given, so any llama.cpp cuts texts as with it."""
    converted(tmp_path, characters_json(spaces="prepend"))
    make_checkpoint(tmp_path / "s", vocab=515)
    (tmp_path / "s" / "tokenizer.model").write_bytes(tokenizer_model(512))
    convert_checkpoint(tmp_path / "s", tmp_path / "s.gguf")
    ours, theirs = GGUFReader(tmp_path / "m.gguf").fields, GGUFReader(tmp_path / "s.gguf").fields
    for key in ("tokens", "scores"):
        name = f"tokenizer.ggml.{key}"
        assert ours[name].contents()[:512] == theirs[name].contents()[:512]
    assert not any(name.startswith("mobilellm.") for name in ours)


STOCK = """
import json, sys
import llama_cpp
path, texts = json.loads(sys.argv[1])
llm = llama_cpp.Llama(path, vocab_only=True, verbose=False)
print(json.dumps([llm.tokenize(text.encode(), special=True) for text in texts]))
"""


@pytest.mark.parametrize("spaces", ["prepend", "first"])
def test_stock_llama_cpp_finds_the_same_tokens(spaces, tmp_path, stock_lib):
    """All of them, or where it passes over keys of ours, those of texts that need none."""
    added = [token for token in ADDED if token.special and not token.lstrip and not token.rstrip]
    fields = characters_json(spaces=spaces, added=added)
    _, library = converted(tmp_path, fields)
    texts = [*TEXTS, *random_texts(1000, added)]
    if spaces == "first":
        special = [token["content"] for token in fields["added_tokens"]]
        texts = [t for t in texts if t[:1] not in " \u2581" and not any(s in t for s in special)]
        assert len(texts) > 100
    done = run_on(stock_lib, STOCK, [str(tmp_path / "m.gguf"), texts])
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout) == [library.encode(text).ids for text in texts]


@pytest.mark.parametrize("bos", [True, False])
def test_a_folder_that_transformers_saved(bos, tmp_path):
    """Its AutoTokenizer and the converted file cut texts alike."""
    from transformers import AutoTokenizer, LlamaTokenizer

    model = characters_json()["model"]
    merges = [tuple(pair) for pair in model["merges"]]
    saved = LlamaTokenizer(vocab=model["vocab"], merges=merges, add_bos_token=bos)
    saved.add_tokens([token for token in ADDED if not token.special])
    saved.add_special_tokens({"extra_special_tokens": [t for t in ADDED if t.special]})
    saved.chat_template = "{{ messages }}"
    checkpoint = make_checkpoint(tmp_path / "c", vocab=len(saved))
    for path in checkpoint.glob("tokenizer*"):
        path.unlink()
    saved.save_pretrained(checkpoint)
    assert not (checkpoint / "tokenizer.model").exists()
    convert_checkpoint(checkpoint, tmp_path / "m.gguf")
    llm = MobileLLM(tmp_path / "m.gguf", n_ctx=64, n_threads=1)
    assert llm.metadata["tokenizer.chat_template"] == saved.chat_template
    library = AutoTokenizer.from_pretrained(checkpoint)
    for text in [*TEXTS, *random_texts(1000, ADDED)]:
        assert llm.tokenize(text.encode(), special=True) == library.encode(text), repr(text)


@pytest.mark.parametrize("make", [make_r1, make_pro])
def test_rules_of_added_tokens_beside_a_vocabulary_of_bytes(make, tmp_path):
    checkpoint = make(tmp_path / "c", vocab=900)
    library = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    size = library.get_vocab_size()
    for token in ADDED:
        (library.add_special_tokens if token.special else library.add_tokens)([token])
    make(tmp_path / "m", vocab=size + len(ADDED))
    library.save(str(tmp_path / "m" / "tokenizer.json"))
    convert_checkpoint(tmp_path / "m", tmp_path / "m.gguf")
    llm = MobileLLM(tmp_path / "m.gguf", n_ctx=64, n_threads=1)
    for text in [*TEXTS, *random_texts(3000, ADDED)]:
        assert llm.tokenize(text.encode(), special=True) == library.encode(text).ids, repr(text)


@pytest.mark.parametrize("make", [make_r1, make_pro])
def test_words_that_are_merged(make, tmp_path):
    """`ignore_merges` false: a word that is a token and that no merges make stays in pieces."""
    checkpoint = make(tmp_path / "c", vocab=900)
    fields = json.loads((checkpoint / "tokenizer.json").read_text())
    fields["model"]["ignore_merges"] = False
    fields["model"]["merges"] = fields["model"]["merges"][::2]
    made = {"".join(pair) for pair in fields["model"]["merges"]}
    fields["model"]["merges"] = [
        pair
        for pair in fields["model"]["merges"]
        if all(len(part) == 1 or part in made for part in pair)
    ]
    (checkpoint / "tokenizer.json").write_text(json.dumps(fields))
    convert_checkpoint(checkpoint, tmp_path / "m.gguf")
    library = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    llm = MobileLLM(tmp_path / "m.gguf", n_ctx=64, n_threads=1)
    for text in [*TEXTS, *sentences()[:200], *random_texts(3000, [])]:
        assert llm.tokenize(text.encode(), special=True) == library.encode(text).ids, repr(text)


def test_a_model_and_a_file_beside_each_other(tmp_path):
    """tokenizer.model is the vocabulary; tokens that the file alone has are there all the same."""
    checkpoint = make_checkpoint(tmp_path / "c", vocab=513)
    write_characters(checkpoint, characters_json(added=ADDED[:1]))
    (checkpoint / "tokenizer.model").write_bytes(tokenizer_model(512))
    convert_checkpoint(checkpoint, tmp_path / "m.gguf")
    llm = MobileLLM(tmp_path / "m.gguf", n_ctx=64, n_threads=1)
    assert llm.tokenize(b"<|user|>", add_bos=False, special=True) == [512]


def test_special_ids(tmp_path):
    llm, _ = converted(tmp_path, characters_json(bos=False))
    assert (llm.token_bos(), llm.token_eos()) == (1, 2)
    assert llm.tokenize(b"") == []


def edit(*path: Any, to: Any) -> Any:
    def change(fields: dict[str, Any]) -> None:
        place: Any = fields
        for step in path[:-1]:
            place = place[step]
        place[path[-1]] = to

    return change


def nothing_makes(fields: dict[str, Any]) -> None:
    """A token whose two halves merge no more."""
    a, b = fields["model"]["merges"].pop(0)
    assert len(a + b) == 2


def a_token_across_words(fields: dict[str, Any]) -> None:
    fields["model"]["vocab"]["a\u2581b"] = len(fields["model"]["vocab"])
    fields["added_tokens"] = fields["added_tokens"][:3]
    fields["pre_tokenizer"]["split"] = True


def a_merge_of_bytes(fields: dict[str, Any]) -> None:
    fields["model"]["vocab"]["<0x41><0x42>"] = len(fields["model"]["vocab"])
    fields["model"]["merges"].append(["<0x41>", "<0x42>"])


META = {"type": "Metaspace", "replacement": "_", "prepend_scheme": "first", "split": False}
PREPEND = {"type": "Prepend", "prepend": "\u2581"}
BAD = {
    "unigram": (edit("model", "type", to="Unigram"), "model is not BPE"),
    "no bytes": (edit("model", "byte_fallback", to=False), "byte_fallback must be true"),
    "a byte missing": (
        lambda fields: fields["model"]["vocab"].pop("<0x41>"),
        "no token for the byte 0x41",
    ),
    "NFKC": (edit("normalizer", to={"type": "NFKC"}), "normalizer is not one that writes spaces"),
    "other space": (edit("pre_tokenizer", to=META), "pre_tokenizer is not one that writes spaces"),
    "no space": (edit("pre_tokenizer", to=None), "pre_tokenizer is not one that writes spaces"),
    "two prefixes": (edit("normalizer", to=PREPEND), "normalizer is not one that writes spaces"),
    "unmade": (nothing_makes, "no merge makes the token"),
    "across": (a_token_across_words, "pre_tokenizer splits at spaces, within which 'a\u2581b'"),
    "bytes merge": (a_merge_of_bytes, "a merge joins the byte '<0x41>'"),
    "ignore_merges": (edit("model", "ignore_merges", to=1), "ignore_merges is neither"),
    "single word": (edit("added_tokens", 0, "single_word", to=True), "single_word of '<unk>'"),
    "another id": (edit("added_tokens", 3, "id", to=514), "'<|user|>' the id 514, the tokenizers"),
    "post": (edit("post_processor", "type", to="RobertaProcessing"), "a step that is unknown"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_llama_cpp_has_nothing_like_is_refused(name, tmp_path):
    change, part = BAD[name]
    fields = characters_json(added=ADDED[:1])
    change(fields)
    checkpoint = make_checkpoint(tmp_path / "c", vocab=515)
    write_characters(checkpoint, fields)
    with pytest.raises(CheckpointError) as caught:
        convert_checkpoint(checkpoint, tmp_path / "m.gguf")
    assert part in str(caught.value) and str(caught.value).startswith(str(checkpoint))


def test_single_word_beside_a_model_is_refused(tmp_path):
    checkpoint = make_checkpoint(tmp_path / "c", vocab=513)
    (checkpoint / "tokenizer.model").write_bytes(tokenizer_model(512))
    entry = {"content": "<x>", "single_word": True}
    settings = {"added_tokens_decoder": {"512": entry}}
    (checkpoint / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match="single_word of '<x>' must be false"):
        convert_checkpoint(checkpoint, tmp_path / "m.gguf")


@pytest.mark.parametrize(
    "spaces, added, parts",
    [
        ("prepend", [], []),
        ("first", [], ["puts a space after each special token", "begins with one"]),
        ("prepend", ADDED[1:3], ["lstrip of '<|left|>'", "rstrip of '<|right|>'"]),
        ("prepend", ADDED[4:7], ["normalized of '<new>' and 2 more"]),
        ("never", ADDED[7:9], ["of added tokens that overlap it finds the longest"]),
        ("never", ADDED[9:11], ["of added tokens that overlap it finds the longest"]),
    ],
)
def test_what_stock_llama_cpp_does_otherwise_is_said(spaces, added, parts, tmp_path):
    checkpoint = make_checkpoint(tmp_path / "c", vocab=520)
    write_characters(checkpoint, characters_json(spaces=spaces, added=added))
    notes = convert_checkpoint(checkpoint, tmp_path / "m.gguf").notes
    assert len(notes) == bool(parts)
    assert all(part in notes[0] for part in parts)
