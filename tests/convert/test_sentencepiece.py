"""What a tokenizer.model may hold beside ordinary pieces: tokens are SentencePiece's over random
texts, or the file is refused by what llama.cpp has nothing like."""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from checkpoints import KINDS, make_checkpoint, sentences, tokenizer_model
from mobilellm_cpp.convert import convert_checkpoint

from mobilellm_cpp import CheckpointError, MobileLLM, verify

# Some overlap, some hold others, some hold spaces; one holds a control piece.
USER_DEFINED = (
    *("<custom>", "cust", "tom>", "<cu", "  ", "\u2581\u2581\u2581", "the cat", "\u2581new"),
    *("ab", "bcd", "cdx", "\u00e9", "\n\n", "<s", "</s>x", "12"),
)
PARTS = [*USER_DEFINED, *("abcd", "<s>", "</s>", "<unk>", "<0x41>"), *" \u2581\nac>"]
SMALL: dict[str, Any] = {"layers": 1, "hidden": 32, "heads": 1, "kv_heads": 1, "ffn": 32}


def checkpoint(folder: Path, model: bytes) -> Path:
    make_checkpoint(folder, **SMALL)
    (folder / "tokenizer.model").write_bytes(model)
    return folder


def random_texts(n: int) -> list[str]:
    rng = random.Random(0)
    words = " ".join(sentences()[:50]).split()
    kinds = [lambda: rng.choice(words) + rng.choice(["", " "]), lambda: rng.choice(KINDS)]
    kinds += [lambda: rng.choice(PARTS)] * 3
    return ["".join(rng.choice(kinds)() for _ in range(rng.randint(0, 12))) for _ in range(n)]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"add_dummy_prefix": False},
        {"user_defined_symbols": USER_DEFINED},
        {"user_defined_symbols": USER_DEFINED, "add_dummy_prefix": False},
        {"user_defined_symbols": ("<custom>",), "control_symbols": ("<control>",)},
    ],
    ids=["plain", "no-prefix", "user-defined", "user-defined-no-prefix", "control"],
)
def test_tokens_are_sentencepieces(options: dict[str, Any], tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "m", model := tokenizer_model(512, **options))
    llm = MobileLLM(convert_checkpoint(folder, tmp_path / "m.gguf").path, n_ctx=64, n_threads=1)
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
    for text in random_texts(3000):
        tokens = pieces.encode(text)
        assert llm.tokenize(text.encode(), add_bos=False, special=False) == tokens, text
        if tokens:
            shown = llm.detokenize([*tokens, tokens[-1]])  # the first may lose a space
            rest = pieces.decode([*tokens, tokens[-1]])
            assert shown.decode(errors="replace").strip(" ") == rest.strip(" ")
    assert verify(tmp_path / "m.gguf", folder, n_threads=1).ok


def marked(model: bytes, piece: str, kind: int) -> bytes:
    """The model with a piece of another kind."""
    text = piece.encode()
    entry = re.escape(b"\x0a" + bytes([len(text)]) + text + b"\x15") + b"(?s:.{4})"
    (found,) = re.finditer(b"\x0a" + bytes([len(text) + 7]) + b"(" + entry + b")", model)
    new = found[1] + bytes([0x18, kind])
    return model[: found.start()] + b"\x0a" + bytes([len(new)]) + new + model[found.end() :]


UNUSED = 5


@pytest.mark.parametrize(
    ("options", "more", "reason"),
    [
        ({"normalization_rule_name": "nmt_nfkc"}, b"", "its normalizer nmt_nfkc"),
        ({"normalization_rule_name": "nfkc_cf"}, b"", "its normalizer nfkc_cf"),
        ({"remove_extra_whitespaces": True}, b"", "remove_extra_whitespaces"),
        ({}, b"\x1a\x02\x28\x00", "escape_whitespaces is false"),
        ({"treat_whitespace_as_suffix": True}, b"", "treat_whitespace_as_suffix"),
        ({"byte_fallback": False}, b"", "no pieces for single bytes"),
        ({"denormalization_rule_tsv": True}, b"", "denormalizer_spec"),
    ],
)
def test_refused(options: dict[str, Any], more: bytes, reason: str, tmp_path: Path) -> None:
    if "denormalization_rule_tsv" in options:
        rules = tmp_path / "rules.tsv"
        rules.write_text("41\t61\n")
        options = {"denormalization_rule_tsv": str(rules)}
    folder = checkpoint(tmp_path / "m", tokenizer_model(512, **options) + more)
    with pytest.raises(CheckpointError, match=f"tokenizer.model .*{reason}.*: llama.cpp would"):
        convert_checkpoint(folder, tmp_path / "m.gguf")


def test_pieces_that_are_never_made(tmp_path: Path) -> None:
    """An unused piece, and a control piece that others make: llama.cpp would join them."""
    model = tokenizer_model(512)
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
    words = [pieces.id_to_piece(i) for i in range(259, 512)]
    short = next(word for word in words if len(word) == 2 and word.isalpha())
    folder = checkpoint(tmp_path / "m", marked(model, short, UNUSED))
    with pytest.raises(CheckpointError, match=f"never makes '{short}' of a text"):
        convert_checkpoint(folder, tmp_path / "m.gguf")
    entry = b"\x0a\x02%s\x15"
    other = model.replace(entry % short.encode(), entry % b"<s")
    (folder / "tokenizer.model").write_bytes(other)
    with pytest.raises(CheckpointError, match="never makes '<s>' of a text"):
        convert_checkpoint(folder, tmp_path / "m.gguf")


def test_user_defined_pieces_and_legacy_false(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "m", tokenizer_model(512, user_defined_symbols=("<x>",)))
    (folder / "tokenizer_config.json").write_text('{"legacy": false}')
    with pytest.raises(CheckpointError, match=r"user-defined pieces \('<x>'\).*legacy"):
        convert_checkpoint(folder, tmp_path / "m.gguf")
