"""verify of what tokenizer.json can hold: right files pass, and every planted fault is found."""

import json

import pytest
from checkpoints import (
    characters_json,
    make_checkpoint,
    make_pro,
    make_r1,
    tokenizer_model,
    write_characters,
)
from gguf import GGUFReader
from gguf_edit import ARRAY, F32, STRING, U32, rewrite
from tokenizers import AddedToken

from mobilellm_cpp import CheckpointError, convert_checkpoint, verify

ADDED = [
    AddedToken("<|user|>", special=True, normalized=False, rstrip=True),
    AddedToken("<new>", lstrip=True),
]


def characters(folder, spaces):
    checkpoint = make_checkpoint(folder, vocab=514)
    write_characters(checkpoint, characters_json(512, spaces, ADDED))
    return checkpoint


def merged(folder, make):
    """A vocabulary of bytes with a word that no merges make."""
    checkpoint = make(folder, vocab=512)
    fields = json.loads((checkpoint / "tokenizer.json").read_text())
    fields["model"]["ignore_merges"] = False
    # so that "Hello" stays in pieces
    vocab = fields["model"]["vocab"]
    last = next(text for text, token_id in vocab.items() if token_id == 503)
    fields["model"]["merges"] = [m for m in fields["model"]["merges"] if "".join(m) != last]
    del vocab[last]
    vocab["Hello"] = 503
    (checkpoint / "tokenizer.json").write_text(json.dumps(fields))
    return checkpoint


MAKE = {
    **{
        spaces: lambda folder, spaces=spaces: characters(folder, spaces)
        for spaces in ("prepend", "replace", "always", "first", "never")
    },
    "merged r1": lambda folder: merged(folder, make_r1),
    "merged pro": lambda folder: merged(folder, make_pro),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """By name a checkpoint and its file."""
    folder = tmp_path_factory.mktemp("kinds")
    made = {}

    def get(name):
        if name not in made:
            checkpoint = MAKE[name](folder / name / "c")
            path = convert_checkpoint(checkpoint, folder / name / "m.gguf").path
            made[name] = checkpoint, path
        return made[name]

    return get


@pytest.mark.parametrize("name", MAKE)
def test_right_files_pass(name, files):
    checkpoint, path = files(name)
    done = verify(path, checkpoint, n_threads=1)
    assert done.ok, done.failures
    assert done.tokenizer.library == "tokenizers" and done.tokenizer.alike > 24


def scores_backwards(path):
    scores = GGUFReader(path).fields["tokenizer.ggml.scores"].contents()
    return {"tokenizer.ggml.scores": (scores[::-1], ARRAY, F32)}


RULE = "mobilellm.tokenizer."
FAULTS = {
    "scores": ("first", scores_backwards),
    "another space": ("first", lambda _: {RULE + "space_prefix": ("every-once", STRING)}),
    "a space twice": ("first", lambda _: {RULE + "space_prefix": ("first", STRING)}),
    "no space": ("always", lambda _: {RULE + "space_prefix": ("none", STRING)}),
    "no rules": ("prepend", lambda _: {RULE + "space_prefix": None}),
    "no flags": ("never", lambda _: {RULE + "added_token_flags": ([0, 0], ARRAY, U32)}),
    "flags swapped": ("never", lambda _: {RULE + "added_token_flags": ([5, 2], ARRAY, U32)}),
    "not normalized": ("prepend", lambda _: {RULE + "added_token_flags": ([2, 1], ARRAY, U32)}),
    "whole words": ("merged r1", lambda _: {"tokenizer.ggml.pre": ("llama-bpe", STRING)}),
    "whole words, Llama 4": ("merged pro", lambda _: {"tokenizer.ggml.pre": ("mobilellm", STRING)}),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_fail(fault, files, tmp_path):
    name, change = FAULTS[fault]
    checkpoint, path = files(name)
    done = verify(rewrite(path, tmp_path / "m.gguf", change(path)), checkpoint, n_threads=1)
    assert done.failures == done.tokenizer.differences != []


def test_chat_templates(tmp_path):
    checkpoint = make_checkpoint(tmp_path / "c")
    named = [{"name": name, "template": f"{{{{ '{name}' }}}}"} for name in ("default", "rag")]
    (checkpoint / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    own = tmp_path / "own.jinja"
    own.write_text("{{ 'own' }}")
    path = tmp_path / "m.gguf"
    for choice in (None, "rag", str(own)):
        convert_checkpoint(checkpoint, path, chat_template=choice)
        assert verify(path, checkpoint, chat_template=choice, n_threads=1).ok
        failures = verify(path, checkpoint, n_threads=1).failures
        assert failures == (
            ["the chat template is not the checkpoint's"] if choice == str(own) else []
        )
    wrong = rewrite(path, tmp_path / "w.gguf", {"tokenizer.chat_template.rag": ("x", STRING)})
    failures = verify(wrong, checkpoint, chat_template=str(own), n_threads=1).failures
    assert failures == ["the chat template rag is not in the file"]


def test_an_expression_that_takes_for_ever_is_not_run(tmp_path):
    """The tokenizers library would run whatever stands in tokenizer.json."""
    checkpoint = make_r1(tmp_path / "c")
    path = convert_checkpoint(checkpoint, tmp_path / "m.gguf").path
    fields = json.loads((checkpoint / "tokenizer.json").read_text())
    bomb = r"^(a|aa|[\s\S])*(?:[\s\S]*[\s\S]*)*(?!\S)\z.$"
    fields["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {"Regex": bomb}
    (checkpoint / "tokenizer.json").write_text(json.dumps(fields))
    with pytest.raises(CheckpointError, match="neither Llama 3's nor Llama 4's"):
        verify(path, checkpoint, n_threads=1)


def test_a_file_beside_a_model_adds_its_tokens(tmp_path):
    checkpoint = characters(tmp_path / "c", "first")
    (checkpoint / "tokenizer.model").write_bytes(tokenizer_model(512))
    path = convert_checkpoint(checkpoint, tmp_path / "m.gguf").path
    done = verify(path, checkpoint, n_threads=1)
    assert done.ok and done.tokenizer.library == "sentencepiece"
