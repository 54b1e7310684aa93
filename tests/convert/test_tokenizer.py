"""The vocabulary in the file is SentencePiece's; added tokens are tested against llama.cpp."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from checkpoints import make_checkpoint, tokenizer_model
from gguf import GGUFReader
from mobilellm_cpp.convert import convert_checkpoint, open_checkpoint

from mobilellm_cpp import CheckpointError, MobileLLM


def vocabulary(folder: Path) -> dict[str, Any]:
    """The tokenizer's metadata of the converted folder, without its prefix."""
    report = convert_checkpoint(folder, folder.parent / "model.gguf")
    fields = GGUFReader(report.path).fields
    prefix = "tokenizer."
    return {
        name.removeprefix(prefix).removeprefix("ggml."): field.contents()
        for name, field in fields.items()
        if name.startswith(prefix)
    }


def test_pieces(tmp_path: Path) -> None:
    written = vocabulary(make_checkpoint(tmp_path / "m"))
    pieces = sentencepiece.SentencePieceProcessor(model_proto=tokenizer_model(512))
    assert written["model"] == "llama" and written["pre"] == "default"
    assert written["tokens"] == [pieces.id_to_piece(i) for i in range(512)]
    assert written["scores"] == [pieces.get_score(i) for i in range(512)]
    assert written["token_type"][:3] == [2, 3, 3]  # unknown, control, control
    assert written["token_type"][3:259] == [6] * 256  # bytes
    assert set(written["token_type"][259:]) == {1}


def test_special_ids_without_the_configs_help(tmp_path: Path) -> None:
    """The hub's tokenizer_config has empty strings; SentencePiece knows better."""
    folder = make_checkpoint(tmp_path / "m", bos_token_id=..., eos_token_id=None)
    written = vocabulary(folder)
    assert [written[f"{name}_token_id"] for name in ("unknown", "bos", "eos")] == [0, 1, 2]
    assert "padding_token_id" not in written
    assert (written["add_bos_token"], written["add_eos_token"]) == (True, False)


@pytest.mark.parametrize(
    ("config", "key", "expected"),
    [
        ({"eos_token_id": 300}, "eos_token_id", 300),
        ({"eos_token_id": [301, 2]}, "eos_token_id", 301),
        ({"eos_token_id": 512}, "eos_token_id", 2),
        ({"bos_token_id": -1}, "bos_token_id", 1),
        ({"bos_token_id": True}, "bos_token_id", 1),
        ({"bos_token_id": "1"}, "bos_token_id", 1),
        ({"pad_token_id": 0}, "padding_token_id", 0),
        ({"pad_token_id": -1}, "padding_token_id", None),
    ],
)
def test_configured_ids(config: dict[str, Any], key: str, expected: Any, tmp_path: Path) -> None:
    assert vocabulary(make_checkpoint(tmp_path / "m", **config)).get(key) == expected


def test_padding(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "m", vocab=520)
    (folder / "tokenizer.model").write_bytes(tokenizer_model(512))
    written = vocabulary(folder)
    assert written["tokens"][512:] == [f"[PAD{i}]" for i in range(512, 520)]
    assert written["token_type"][512:] == [5] * 8


def test_no_tokenizer_config(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "m")
    (folder / "tokenizer_config.json").unlink()
    written = vocabulary(folder)
    assert (written["add_bos_token"], written["bos_token_id"]) == (True, 1)
    assert "add_space_prefix" not in written  # SentencePiece's default is llama.cpp's


def test_no_space_prefix(tmp_path: Path) -> None:
    """A model trained without the dummy prefix says so in the file."""
    folder = make_checkpoint(tmp_path / "m")
    (folder / "tokenizer.model").write_bytes(tokenizer_model(512, add_dummy_prefix=False))
    assert vocabulary(folder)["add_space_prefix"] is False


@pytest.mark.parametrize(
    ("settings", "file", "expected"),
    [
        ({}, None, None),
        ({"chat_template": "A"}, None, "A"),
        ({"chat_template": "A"}, "B", "B"),
        ({}, "B\u00e9", "B\u00e9"),
        (
            {"chat_template": [{"name": "tool", "template": "T"}]
             + [{"name": "default", "template": "D"}]},
            None,
            "D",
        ),
    ],
)  # fmt: skip
def test_chat_template(
    settings: dict[str, Any], file: str | None, expected: str | None, tmp_path: Path
) -> None:
    folder = make_checkpoint(tmp_path / "m")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    if file is not None:
        (folder / "chat_template.jinja").write_text(file, encoding="utf-8")
    assert vocabulary(folder).get("chat_template") == expected


def test_added_token_without_embedding_is_noted(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "m")
    (folder / "added_tokens.json").write_text('{"<pad>": 512}')
    report = convert_checkpoint(folder, tmp_path / "m.gguf")
    assert len(report.notes) == 1 and "<pad>" in report.notes[0]


def with_templates(folder: Path, files: dict[str, str], settings: Any = None) -> Path:
    checkpoint = make_checkpoint(folder)
    (checkpoint / "tokenizer_config.json").write_text(json.dumps(settings or {}))
    for name, text in files.items():
        (checkpoint / name).parent.mkdir(exist_ok=True)
        (checkpoint / name).write_text(text, encoding="utf-8")
    return checkpoint


NAMED = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
FURTHER = "additional_chat_templates/"


@pytest.mark.parametrize(
    ("settings", "files", "expected"),
    [
        ({"chat_template": NAMED}, {}, {"default": "D", "tool_use": "T"}),
        ({"chat_template": {"default": "D", "a-b": "T"}}, {}, {"default": "D", "a-b": "T"}),
        (
            {"chat_template": "C"},
            {"chat_template.jinja": "J", FURTHER + "rag.jinja": "R"},
            {"default": "J", "rag": "R"},
        ),
        ({}, {FURTHER + "rag.jinja": "R"}, {"rag": "R"}),
        ({}, {"chat_template.json": '{"chat_template": "P"}'}, {"default": "P"}),
        (
            {"chat_template": "C"},
            {"chat_template.json": '{"chat_template": "P"}'},
            {"default": "C"},
        ),
        (
            {},
            {"chat_template.json": json.dumps({"chat_template": NAMED})},
            {"default": "D", "tool_use": "T"},
        ),
    ],
)
def test_chat_templates_wherever_they_are(
    settings: Any, files: dict[str, str], expected: dict[str, str], tmp_path: Path
) -> None:
    written = vocabulary(with_templates(tmp_path / "m", files, settings))
    default = expected.pop("default", None)
    assert written.get("chat_template") == default
    for name, text in expected.items():
        assert written[f"chat_template.{name.replace('-', '_')}"] == text
    assert len(written.get("chat_templates", [])) == len(expected)


def test_named_templates_are_found_by_transformers_and_llama_cpp(tmp_path: Path) -> None:
    """Saved by transformers, read by llama-cpp-python."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    checkpoint = with_templates(tmp_path / "m", {})
    saved = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))
    saved.chat_template = {"default": "D {{ messages[0].content }}", "tool_use": "T"}
    saved.save_pretrained(tmp_path / "t")
    for path in [*(tmp_path / "t").glob("*.jinja"), tmp_path / "t" / FURTHER]:
        path.rename(checkpoint / path.name)
    convert_checkpoint(checkpoint, tmp_path / "m.gguf")
    llm = MobileLLM(tmp_path / "m.gguf", n_ctx=64, n_threads=1)
    assert {"chat_template.default", "chat_template.tool_use"} <= set(llm._chat_handlers)


def test_a_chosen_template(tmp_path: Path) -> None:
    checkpoint = with_templates(tmp_path / "m", {}, {"chat_template": NAMED[:1]})
    assert "--chat-template NAME" in convert_checkpoint(checkpoint, tmp_path / "a.gguf").notes[0]
    assert vocabulary(checkpoint).get("chat_template") is None
    own = tmp_path / "own.jinja"
    own.write_text("O")
    for choice, expected in (("tool_use", "T"), (str(own), "O")):
        report = convert_checkpoint(checkpoint, tmp_path / "m.gguf", chat_template=choice)
        field = GGUFReader(report.path).get_field("tokenizer.chat_template")
        assert field.contents() == expected and not report.notes
    with pytest.raises(CheckpointError, match="'x' is neither one of tool_use nor a file"):
        convert_checkpoint(checkpoint, tmp_path / "m.gguf", chat_template="x")


def test_further_templates_are_part_of_what_is_cached(tmp_path: Path) -> None:
    checkpoint = with_templates(tmp_path / "m", {FURTHER + "rag.jinja": "R"})
    before = open_checkpoint(checkpoint).fingerprint()
    (checkpoint / FURTHER / "rag.jinja").write_text("S")
    assert open_checkpoint(checkpoint).fingerprint() != before
