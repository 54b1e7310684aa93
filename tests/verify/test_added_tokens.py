"""What stands around added tokens: as transformers has it, and as the file is held to it."""

import json
import random

import pytest
import sentencepiece
from checkpoints import make_checkpoint, make_r1, sentences, tokenizer_model
from gguf_edit import U32, rewrite
from tokenizers import AddedToken, Tokenizer
from transformers.models.llama.tokenization_llama import LlamaTokenizer
from transformers.tokenization_utils_sentencepiece import (
    SentencePieceBackend,
    SentencePieceExtractor,
)

from mobilellm_cpp import convert_checkpoint, verify
from mobilellm_cpp.inspection.added_tokens import Added, sentencepiece_tokens

ADDED = [
    Added(512, "<|user|>", True, False, False),
    Added(513, "<|user|>s", True, False, False),
    Added(514, "<|left|>", True, True, False),
    Added(515, "[right]", False, False, True),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("pieces") / "tokenizer.model"
    path.write_bytes(tokenizer_model(512))
    return path


def texts(seed, glue):
    """Words and added tokens in any order, joined by white space or nothing."""
    rng = random.Random(seed)
    parts = [token.text for token in ADDED] + sentences()[seed].split()
    return ["".join(rng.choice(parts) + rng.choice(glue) for _ in range(8)) for _ in range(40)]


def tokens(added):
    flags = [
        (t.text, {"lstrip": t.lstrip, "rstrip": t.rstrip, "special": t.special}) for t in added
    ]
    return [AddedToken(text, normalized=False, **rest) for text, rest in flags]


def test_with_legacy_as_transformers(model):
    class Slow(SentencePieceBackend):
        """transformers' tokenizer over the SentencePiece library."""

    slow = Slow(
        vocab_file=str(model), legacy=True, unk_token="<unk>", special_tokens_pattern="none"
    )
    slow.add_tokens(tokens(ADDED))
    pieces = sentencepiece.SentencePieceProcessor(str(model))
    for text in texts(1, ["", "", " ", "  ", "\n", " \t"]):
        ours = sentencepiece_tokens(text, ADDED, pieces, pieces)
        assert ours == slow.encode(text, add_special_tokens=False), text


def test_without_legacy_as_transformers(model):
    vocab, _, merges = SentencePieceExtractor(str(model)).extract()
    fast = LlamaTokenizer(vocab=vocab, merges=merges, legacy=False)
    fast.add_tokens(tokens(ADDED))
    pieces = sentencepiece.SentencePieceProcessor(str(model))
    bare = sentencepiece.SentencePieceProcessor(
        model_proto=model.read_bytes() + b"\x1a\x02\x18\x00"
    )
    for text in texts(2, ["", "", " ", "\n"]):
        ours = sentencepiece_tokens(text, ADDED, pieces, bare)
        assert ours == fast.encode(text, add_special_tokens=False), text


def entry(text, **flags):
    return {"content": text, "special": True, **flags}


def with_tokens(folder, settings, added):
    checkpoint = make_checkpoint(folder, vocab=516)
    (checkpoint / "tokenizer.model").write_bytes(tokenizer_model(512))
    fields = {**settings, "added_tokens_decoder": added}
    (checkpoint / "tokenizer_config.json").write_text(json.dumps(fields))
    return checkpoint


def test_text_around_added_tokens_is_compared(tmp_path):
    """A file made for a checkpoint whose tokens take no white space, held to one whose do."""
    plain = with_tokens(tmp_path / "plain", {}, {"512": entry("<|user|>")})
    path = convert_checkpoint(plain, tmp_path / "m.gguf").path
    done = verify(path, plain, n_threads=1)
    assert done.ok, done.failures
    for flag in ("lstrip", "rstrip"):
        strips = with_tokens(tmp_path / flag, {}, {"512": entry("<|user|>", **{flag: True})})
        failures = verify(path, strips, n_threads=1).failures
        assert any("'one <|user|> two" in sentence for sentence in failures)
    bare = with_tokens(tmp_path / "bare", {"legacy": False}, {"512": entry("<|user|>")})
    failures = verify(path, bare, n_threads=1).failures
    assert any("'<|user|>text'" in sentence for sentence in failures)


def test_flags_of_a_byte_level_tokenizer_are_compared(tmp_path):
    checkpoint = make_r1(tmp_path / "r1")
    path = convert_checkpoint(checkpoint, tmp_path / "m.gguf").path
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    name = "<|eot_id|>"
    tokenizer.add_special_tokens([AddedToken(name, special=True, rstrip=True, normalized=False)])
    tokenizer.save(str(checkpoint / "tokenizer.json"))
    failures = verify(path, checkpoint, n_threads=1).failures
    assert any(f"one {name} two" in sentence for sentence in failures)


@pytest.mark.parametrize("key", ["unknown", "padding", "bos"])
@pytest.mark.parametrize("make", [make_checkpoint, make_r1])
def test_a_wrong_special_id_fails(key, make, tmp_path):
    checkpoint = make(tmp_path / "c", pad_token_id=7)
    path = convert_checkpoint(checkpoint, tmp_path / "m.gguf").path
    assert verify(path, checkpoint, n_threads=1).ok
    wrong = rewrite(path, tmp_path / "w.gguf", {f"tokenizer.ggml.{key}_token_id": (9, U32)})
    name = {"unknown": "unk", "padding": "pad"}.get(key, key)
    sentences = verify(wrong, checkpoint, n_threads=1).failures
    if (key, make) == ("bos", make_r1):  # which the texts show
        assert sentences and all("tokens of" in sentence for sentence in sentences)
    else:
        assert any(f"the file's {name} token is 9" in sentence for sentence in sentences)
