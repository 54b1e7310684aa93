"""Whether a file's tokenizer cuts texts as the checkpoint's own library does."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..convert.bpe import spaces, words
from ..convert.chat_template import chat_templates, chosen
from ..convert.checkpoint import Checkpoint
from ..convert.config import read_json
from ..convert.tokenizer import TokenizerFolder
from ..convert.tokenizer_file import TokenizerFile
from ..engine.library import llama_cpp
from ..engine.model import MobileLLM
from ..errors import CheckpointError
from .added_tokens import Added, added_tokens, sentencepiece_tokens, surroundings

# What logits are compared on.
TEXT = """The mill stood where the river bends, three miles below the town. Every morning at
half past six the miller opened the sluice, listened to the wheel, and wrote the height of the
water into a grey book: 1 foot 4, 1 foot 7, on one wet day in 1893 as much as 5 foot 11. "Why do
you write it down?" asked the boy who swept the floor. "Because water forgets," said the miller,
"and paper doesn't." The boy thought about that while he swept. Years later, when there was no
miller any more and the wheel had been sold for scrap, an engineer from the city found forty of
these books in a dry loft. She copied the numbers into a table, drew a curve through them, and
saw at once why the new bridge had been flooded twice. Nobody had asked the river before building
over it. She sent one page of the book, framed, to the council: it hangs there still, between a
map and the portrait of a mayor, and most visitors take it for a shopping list.
"""

TEXTS = (
    "Hello world",
    " two  spaces,   three, and one at the end ",
    "\ttabs\t\tand\nnew\n\nlines\r\n",
    "",
    " ",
    "\n",
    "3.14159, 2,718,281 and 0000 or 12345678901234567890",
    "It's John's; we've said he'd come, they'LL see, I'M sure",
    "def f(x):\n    return {'a': x[0] ** 2, \"b\": not x}  # why?\n",
    "for (int i = 0; i < n; ++i) { sum += a[i] * b[i]; } /* done */",
    '<html><body class="x">&amp; $x_1^2 \\frac{a}{b}$</body></html>',
    "snake_case camelCase SCREAMING_CASE kebab-case path/to/file.txt",
    "Grüße, naïve café, Łódź, Þórr, œuvre, ﬁ ligature, e\u0301 combining",
    "Привет, мир! Καλημέρα κόσμε. שלום עולם. مرحبا بالعالم",
    "你好，世界。こんにちは世界、안녕하세요 세계. नमस्ते दुनिया สวัสดีชาวโลก",
    "emoji 😀 👩‍👩‍👧‍👦 🇩🇪 👍🏽 ❤️ and ☃",
    "no-break\u00a0space, thin\u2009space, zero\u200bwidth, \u2028line, \ufeffmark, \u3000wide",
    "control \x01\x02\x7f characters",
    "\u2581 lower one eighth block",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa!!!!!!!!!!!!!!!!????????????",
    "supercalifragilisticexpialidocious antidisestablishmentarianism",
    "<s> </s> <unk> [INST] <|im_start|> <0x41>",
    "x" * 300,
    TEXT,
)
# Places of the tokens that end a text, beside eos.
ENDS = ("eot", "eom", "fim_pad", "fim_rep", "fim_sep")
SPECIAL = 16  # special tokens that are looked at in a text


@dataclass(frozen=True)
class TokenizerCheck:
    """`texts` were cut by both, `alike` of them into the same tokens; `library` is whose tokens
    the file's were compared with, None where it is not installed. `differences` has a sentence for
    each text that is not, and for each token that should end a text and does not."""

    library: str | None
    texts: int
    alike: int
    differences: list[str]


def check_tokenizer(
    llm: MobileLLM,
    checkpoint: Checkpoint,
    template: str | None = None,
    adapter: Path | None = None,
) -> TokenizerCheck:
    """The file's tokenizer against SentencePiece for tokenizer.model, or the tokenizers library
    for tokenizer.json. `template` is the chat template that was chosen for the file, `adapter` the
    folder of one that was merged."""
    folder = checkpoint.folder
    source = TokenizerFolder(folder)
    settings, file = source.settings, source.file
    prefix = settings.get("add_prefix_space") is not False
    pieces = None if source.from_file else _sentencepiece(folder / "tokenizer.model", prefix)
    tokenizer = None
    added = added_tokens(folder, settings, file.fields if file is not None else None)
    if pieces is not None:
        library = "sentencepiece"
        bare = pieces
        if settings.get("legacy") is False:
            bare = _sentencepiece(folder / "tokenizer.model", False)
        cases = _sentencepiece_cases(llm, checkpoint, pieces, bare, settings, added)
    elif file is not None:
        try:
            import tokenizers
        except ImportError:
            return TokenizerCheck(None, 0, 0, [])
        library, tokenizer = "tokenizers", _tokenizer(file, added, tokenizers)
        cases = _json_cases(llm, tokenizer)
    else:
        raise CheckpointError(f"{folder} has no tokenizer.model and no tokenizer.json.")
    different = [case for case in cases if case[1] != case[2]]
    differences = []
    # of stock llama.cpp's approximation of Llama 4's words only what surrounds them is asked
    approximate = llm.metadata.get("tokenizer.ggml.pre") == "llama4"
    for text, ours, theirs in different:
        if not (approximate and text):
            at = len(os.path.commonprefix([ours, theirs]))
            differences.append(
                f"the tokens of {text[:30]!r} are not those of {library}: from the one at {at} on "
                f"{ours[at : at + 3]}, not {theirs[at : at + 3]}"
            )
    alike = len(cases) - len(different)
    differences += _wrong_templates(llm, chat_templates(folder, settings, adapter), template)
    differences += _wrong_ids(llm, checkpoint, settings, pieces, tokenizer)
    own = _named(settings, "eos", tokenizer) if tokenizer is not None else None
    ends = _ends(checkpoint, llm.n_vocab(), own)
    for token in ends:
        if not llama_cpp.llama_vocab_is_eog(llm._model.vocab, token):
            differences.append(f"token {token} ends a text in the checkpoint and not in the file")
    places = (f"tokenizer.ggml.{name}_token_id" for name in ENDS)
    said = {llm.token_eos(), *(int(llm.metadata[key]) for key in places if key in llm.metadata)}
    if ends and said - set(ends):
        differences.append(f"the file ends texts with token {min(said - set(ends))}, not {ends}")
    return TokenizerCheck(library, len(cases), alike, differences)


def _ends(checkpoint: Checkpoint, vocab: int, own: int | None) -> list[int]:
    """The ids that end a text, by config.json, generation_config.json and the tokenizer itself."""
    path = checkpoint.folder / "generation_config.json"
    said = [own, checkpoint.config.get("eos_token_id")]
    if path.exists():
        said.append(read_json(path).get("eos_token_id"))
    ids = [i for ids in said for i in (ids if isinstance(ids, list) else [ids])]
    return sorted({i for i in ids if type(i) is int and 0 <= i < vocab})


def _wrong_templates(
    llm: MobileLLM, templates: dict[str, str], choice: str | None
) -> Iterator[str]:
    """Any of the checkpoint's may have been chosen, unless it is said which one."""
    own = llm.metadata.get("tokenizer.chat_template")
    said = chosen(templates, choice)
    if own != said and (choice is not None or own not in templates.values()):
        yield "the chat template is not the checkpoint's"
    for name, text in templates.items():
        if name != "default" and text not in llm.metadata.values():
            yield f"the chat template {name} is not in the file"


def _wrong_ids(
    llm: MobileLLM, checkpoint: Checkpoint, settings: dict[str, Any], pieces: Any, tokenizer: Any
) -> list[str]:
    """A sentence for each of bos, unk and pad that is not the checkpoint's: config.json goes before
    SentencePiece's own, and what tokenizer_config.json names of a tokenizer.json before both. A bos
    that the latter puts there itself is seen in the texts."""
    differences = []
    keys = {"bos": "bos", "unk": "unknown", "pad": "padding"}
    if tokenizer is not None and tokenizer.encode("").ids:
        del keys["bos"]
    for name, key in keys.items():
        configured = checkpoint.config.token_id(f"{name}_token_id", llm.n_vocab())
        if pieces is not None:
            own = getattr(pieces, f"{name}_id")()
            expected = own if configured is None else configured
        else:
            own = _named(settings, name, tokenizer)
            expected = configured if own is None else own
        # what llama.cpp takes where the key is absent: SentencePiece's usual ids
        of_characters = llm.metadata.get("tokenizer.ggml.model") == "llama"
        usual = {"bos": "1", "unk": "0"}.get(name) if of_characters else None
        said = llm.metadata.get(f"tokenizer.ggml.{key}_token_id", usual)
        if said != (None if expected is None or expected < 0 else str(expected)):
            differences.append(f"the file's {name} token is {said}, the checkpoint's {expected}")
    return differences


def _named(settings: dict[str, Any], name: str, tokenizer: Any) -> int | None:
    """The id of a token that tokenizer_config.json names, None where there is none."""
    token = settings.get(f"{name}_token")
    text = token.get("content") if isinstance(token, dict) else token
    return tokenizer.token_to_id(text) if isinstance(text, str) else None


def _sentencepiece(path: Path, prefix: bool) -> Any:
    """The SentencePieceProcessor of a file, None where there is none or another kind; without
    `prefix` it puts no space before a text."""
    import sentencepiece

    if not path.exists():
        return None
    model = path.read_bytes()
    if not prefix:
        # a message may be continued: normalizer_spec (3) { add_dummy_prefix (3) = false }
        model += b"\x1a\x02\x18\x00"
    try:
        return sentencepiece.SentencePieceProcessor(model_proto=model)
    except RuntimeError:
        return None


Case = tuple[str, list[int], list[int]]  # a text, the file's tokens, the library's


def _sentencepiece_cases(
    llm: MobileLLM,
    checkpoint: Checkpoint,
    pieces: Any,
    bare: Any,
    settings: dict[str, Any],
    added: list[Added],
) -> list[Case]:
    """Special tokens are plain text to SentencePiece, and are asked for by name."""
    cases = []
    for text in TEXTS:
        if not any(token.text in text for token in added):
            ours = llm.tokenize(text.encode(), add_bos=False)
            cases.append((text, ours, pieces.encode(text)))
    whole = pieces.encode(TEXTS[0])
    for name, adds, own, at in (
        ("bos", settings.get("add_bos_token") is not False, pieces.bos_id(), 0),
        ("eos", settings.get("add_eos_token") is True, pieces.eos_id(), len(whole) + 1),
    ):
        configured = checkpoint.config.token_id(f"{name}_token_id", pieces.vocab_size())
        if adds:
            whole.insert(at, own if configured is None else configured)
    if not any(token.text in TEXTS[0] for token in added):
        cases.append((TEXTS[0], llm.tokenize(TEXTS[0].encode()), whole))
    added = [token for token in added if token.id < llm.n_vocab()]
    known = {token.text for token in added}
    for i in range(pieces.vocab_size()):
        text = pieces.id_to_piece(i)
        if (pieces.is_control(i) or pieces.is_unknown(i)) and text not in known:
            added.append(Added(i, text, True, False, False))
    for token in added[:SPECIAL]:
        for text in surroundings(token.text):
            ours = llm.tokenize(text.encode(), add_bos=False, special=True)
            cases.append((text, ours, sentencepiece_tokens(text, added, pieces, bare)))
    return cases


def _tokenizer(file: TokenizerFile, added: list[Added], tokenizers: Any) -> Any:
    """The Tokenizer of a tokenizer.json with the tokens of tokenizer_config.json, which may be
    other ones or the same with other flags, for whole texts."""
    path = file.path
    words(file) if file.byte_level else spaces(file)  # other expressions may take for ever
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the library raises plain Exceptions, and panics of Rust
        raise CheckpointError(f"{path} cannot be read: {error}.") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    for token in added:
        flags = {"lstrip": token.lstrip, "rstrip": token.rstrip, "normalized": token.normalized}
        add = tokenizer.add_special_tokens if token.special else tokenizer.add_tokens
        add([tokenizers.AddedToken(token.text, special=token.special, **flags)])
    return tokenizer


def _json_cases(llm: MobileLLM, tokenizer: Any) -> list[Case]:
    """With bos where the tokenizer puts one, and special tokens inside of texts."""
    special = [token.content for token in tokenizer.get_added_tokens_decoder().values()]
    texts = [*TEXTS, *(text for token in special[:SPECIAL] for text in surroundings(token))]
    return [
        (text, llm.tokenize(text.encode(), special=True), list(tokenizer.encode(text).ids))
        for text in texts
    ]
