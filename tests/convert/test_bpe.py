"""Byte-level vocabularies against the tokenizers library, and what is refused of them."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from checkpoints import CHAT_TEMPLATE, KINDS, SPECIAL_TOKENS, make_pro, make_r1, mixed_lines
from gguf import GGUFReader
from mobilellm_cpp.convert import convert_checkpoint
from tokenizers import Tokenizer

from mobilellm_cpp import MobileLLM
from mobilellm_cpp.errors import CheckpointError

TEXTS = [
    "",
    "Hello world, it's the café's 12345 apples!",
    "I'LL go; don't, WE'VE 'sure'",
    " leading and trailing  ",
    "tabs\tand\n\nlines\r\n   mixed \n x",
    "漢字かな交じり文 と 한국어",
    "🦙 emoji 👩‍👩‍👧 joined",
    "def f(x):\n    return x ** 2  # code\n",
    "http://example.com/a/b?c=d&e=f//",
    "<|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>",
    "a<|eot_id|>b <|eom_id|>",
    "x" * 300,
    "3 33 333 3333 3.33 3,333",
    "\u00a0\u2003 spaces \ufeff",
    "CamelCaseWords and snake_case",
    "ünïcode ÉCOLE naïve été приВет МОСКВА ΑΒΓδεζ",
    "हिन्दी में पाठ ภาษาไทย العَرَبِيَّة",
    "e\u0301a\u0300 \u0301x A\u0301B ǅabc ßẞ ĸĹ 𝐀𝐚 ʰˢ ªº",
    "a/b//c\n//\n /x ++\r\n/ .../\n",
    "'s 'S x's X'S é'LL ll'll 'd'D 'x",
    "Ⅷ½ ٣٤٥٦ 1²³",
    "\u200d\u200b\u0085 \u2028x \ue000\U0010ffff",
]


@pytest.fixture(scope="module", params=["llama3", "llama4"])
def model(request, tmp_path_factory):
    """(kind, checkpoint, GGUF file) with a vocabulary of 900."""
    folder = tmp_path_factory.mktemp("bpe")
    make = make_r1 if request.param == "llama3" else make_pro
    checkpoint = make(folder / "c", vocab=900)
    convert_checkpoint(checkpoint, folder / "m.gguf")
    return request.param, checkpoint, folder / "m.gguf"


def test_texts_become_the_same_tokens(model):
    _, checkpoint, path = model
    library = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    llm = MobileLLM(path, n_ctx=64, n_threads=1)
    for text in TEXTS:
        tokens = llm.tokenize(text.encode(), special=True)
        assert tokens == library.encode(text).ids, text
        plain = llm.detokenize(tokens, special=True).decode()
        assert plain.removeprefix(SPECIAL_TOKENS[0]) == text


def test_random_texts_become_the_same_tokens(model):
    """Words of every kind of character that the expressions tell apart."""
    _, checkpoint, path = model
    library = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    llm = MobileLLM(path, n_ctx=64, n_threads=1)
    rng = random.Random(0)
    for _ in range(3000):
        text = "".join(rng.choices(KINDS, k=rng.randint(1, 12)))
        assert llm.tokenize(text.encode(), special=True) == library.encode(text).ids, repr(text)


@pytest.mark.parametrize("letters", ["a", "A", "\u0301", " ", "/", "1", "é"])
def test_a_long_word_is_no_deep_recursion(model, letters):
    kind, checkpoint, path = model
    library = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    llm = MobileLLM(path, n_ctx=64, n_threads=1)
    text = letters * 100_000
    assert llm.tokenize(text.encode()) == library.encode(text).ids


def test_a_file_for_stock_says_that_words_are_split_otherwise(tmp_path):
    checkpoint = make_pro(tmp_path / "c", qk_norm=False, vocab=900)
    report = convert_checkpoint(checkpoint, tmp_path / "m.gguf", portable=True)
    assert any("combining marks" in note for note in report.notes)
    llm = MobileLLM(tmp_path / "m.gguf", n_ctx=64, n_threads=1)
    library = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    differ = [
        text for text in mixed_lines() if llm.tokenize(text.encode()) != library.encode(text).ids
    ]
    assert len(differ) > 100


def test_a_long_s_is_an_s_without_case(tmp_path):
    convert_checkpoint(make_pro(tmp_path / "c"), tmp_path / "m.gguf")
    library = Tokenizer.from_file(str(tmp_path / "c" / "tokenizer.json"))
    llm = MobileLLM(tmp_path / "m.gguf", n_ctx=64, n_threads=1)
    for text in ("it'\u017f", "'\u017fx", "A'\u017f'S"):
        assert llm.tokenize(text.encode()) == library.encode(text).ids


def test_six_ends_of_a_text(tmp_path):
    ends = [500, 501, 502, 503, 505]
    checkpoint = make_r1(tmp_path / "c", eos_token_id=ends)
    assert not convert_checkpoint(checkpoint, tmp_path / "m.gguf").notes
    llm = MobileLLM(tmp_path / "m.gguf", n_ctx=64, n_threads=1)
    import llama_cpp

    for end in [*ends, 509]:
        assert llama_cpp.llama_vocab_is_eog(llm._model.vocab, end)


def test_a_template_file_goes_before_the_one_in_the_config(tmp_path):
    """As in transformers."""
    checkpoint = make_r1(tmp_path / "c")
    (checkpoint / "chat_template.jinja").write_text("NEW")
    convert_checkpoint(checkpoint, tmp_path / "m.gguf")
    field = GGUFReader(tmp_path / "m.gguf").get_field("tokenizer.chat_template")
    assert field.contents() == "NEW"


def test_every_end_of_turn_id_ends_a_text(model):
    _, _, path = model
    import llama_cpp

    llm = MobileLLM(path, n_ctx=64, n_threads=1)
    ends = [i for i in range(900) if llama_cpp.llama_vocab_is_eog(llm._model.vocab, i)]
    assert ends == [893, 896, 897]  # end_of_text, eom_id, eot_id
    assert (llm.token_bos(), llm.token_eos()) == (892, 897)


def test_generation_config_names_further_ends(tmp_path):
    checkpoint = make_r1(tmp_path / "c", eos_token_id=500)
    (checkpoint / "generation_config.json").write_text('{"eos_token_id": [501, 506]}')
    convert_checkpoint(checkpoint, tmp_path / "m.gguf")
    llm = MobileLLM(tmp_path / "m.gguf", n_ctx=64, n_threads=1)
    import llama_cpp

    for end in (500, 501, 509):  # eos of tokenizer_config.json is 509
        assert llama_cpp.llama_vocab_is_eog(llm._model.vocab, end)


def test_the_chat_template_is_carried_and_used(model):
    _, _, path = model
    field = GGUFReader(path).get_field("tokenizer.chat_template")
    assert field.contents() == CHAT_TEMPLATE
    llm = MobileLLM(path, n_ctx=64, n_threads=1)
    tokens = llm.chat_tokens([{"role": "user", "content": "hi"}])
    assert tokens[0] == llm.token_bos() and tokens[1] != llm.token_bos()
    text = llm.detokenize(tokens, special=True).decode()
    assert text == (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )


def test_ids_without_a_token_are_padding(tmp_path):
    checkpoint = make_r1(tmp_path / "c", vocab=512)
    fields = json.loads((checkpoint / "tokenizer.json").read_text())
    fields["added_tokens"] = fields["added_tokens"][:-2]
    (checkpoint / "tokenizer.json").write_text(json.dumps(fields))
    convert_checkpoint(checkpoint, tmp_path / "m.gguf")
    tokens = GGUFReader(tmp_path / "m.gguf").get_field("tokenizer.ggml.tokens").contents()
    assert tokens[-3:] == ["<|eot_id|>", "[PAD510]", "[PAD511]"]


def edit(path: list[Any], value: Any) -> Any:
    """A change of tokenizer.json: the place that path leads to becomes value, or goes for `...`."""

    def change(fields: dict[str, Any]) -> None:
        place: Any = fields
        for step in path[:-1]:
            place = place[step]
        if value is ...:
            del place[path[-1]]
        else:
            place[path[-1]] = value

    return change


SPLIT = ["pre_tokenizer", "pretokenizers", 0]
TEMPLATE = ["post_processor", "single"]
BAD = {
    "normalizer": (edit(["normalizer"], {"type": "NFC"}), "normalizer must be null"),
    "unigram": (edit(["model", "type"], "Unigram"), "model is not BPE"),
    "no model": (edit(["model"], ...), "model is not BPE"),
    "regex": (edit([*SPLIT, "pattern"], {"Regex": r"\p{L}+"}), "neither Llama 3's nor Llama 4's"),
    "behaviour": (edit([*SPLIT, "behavior"], "Removed"), "neither Llama 3's nor Llama 4's"),
    "ignore_merges": (edit(["model", "ignore_merges"], "no"), "ignore_merges is neither"),
    "no vocab": (edit(["model", "vocab"], ...), "model.vocab is missing"),
    "bad id": (edit(["model", "vocab", "a"], -1), "'a' has the impossible id -1"),
    "id twice": (edit(["model", "vocab", "a"], 5), "two tokens for id 5"),
    "no byte": (edit(["model", "vocab", "a"], ...), "no token for the byte 0x61"),
    "large id": (edit(["model", "vocab", "a"], 512), "vocab_size must hold id 512"),
    "no merges": (edit(["model", "merges"], ...), "model.merges is missing"),
    "merge of one": (edit(["model", "merges"], ["a"]), "'a' is not a merge"),
    "merge of strangers": (
        edit(["model", "merges"], [["a", "zz9"]]),
        "is not a merge of two tokens",
    ),
    "merge to nothing": (edit(["model", "merges"], ["\u0100 \u0100"]), "makes no token"),
    "added": (edit(["added_tokens", 0], {"id": "1"}), "added_tokens is broken"),
    "one word": (edit(["added_tokens", 0, "single_word"], True), "single_word of '<|begin_of"),
    "suffix": (edit(["model", "end_of_word_suffix"], "</w>"), "end_of_word_suffix must be null"),
    "dropout": (edit(["model", "dropout"], 0.1), "dropout must be null"),
    "another bos": (
        edit(["post_processor", "special_tokens", "<|begin_of_text|>", "ids"], [5]),
        "no added token for '<|begin_of_text|>'",
    ),
    "two before": (
        edit(TEMPLATE, [{"SpecialToken": {"id": "a"}}] * 2 + [{"Sequence": {"id": "A"}}]),
        "more than one token",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_llama_cpp_would_split_otherwise_is_refused(tmp_path, name):
    checkpoint = make_r1(tmp_path / "c")
    change, part = BAD[name]
    fields = json.loads((checkpoint / "tokenizer.json").read_text())
    change(fields)
    (checkpoint / "tokenizer.json").write_text(json.dumps(fields))
    assert part in refusal(checkpoint, tmp_path / "m.gguf")


def test_no_vocabulary_at_all(tmp_path):
    checkpoint = make_r1(tmp_path / "c")
    (checkpoint / "tokenizer.json").write_text('{"pre_tokenizer": null}')
    assert "tokenizer.json: model is not BPE" in refusal(checkpoint, tmp_path / "m.gguf")
    (checkpoint / "tokenizer.json").unlink()
    assert "tokenizer.model and tokenizer.json" in refusal(checkpoint, tmp_path / "m.gguf")


def refusal(checkpoint: Path, out: Path, **options: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        convert_checkpoint(checkpoint, out, **options)
    assert not out.exists()
    return str(caught.value)
