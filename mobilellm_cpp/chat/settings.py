"""What `/set` shows and changes: arguments of sampling, the form of answers, and how they look."""

import json
from collections.abc import Iterable, Iterator
from typing import Any

from ..engine.sampling_types import SETTINGS
from ..texts import written_or_read
from .storage import ChatError
from .talk import FORMS, Talk

MAX_TOKENS = 512  # of an answer, where nobody says otherwise
TEXTS = {
    "stop": "a text before which an answer ends, or a JSON list of them",
    "schema": "the JSON schema of answers: its text or a file",
    "grammar": "the GBNF grammar of answers: its text or a file",
    "regex": "what an answer matches as a whole",
    "lark": "the Lark grammar of answers: its text or a file",
}
THINKING = ("show", "hide")
SHORT = {"temp": "temperature", "tokens": "max_tokens", "json_schema": "schema"}
DEFAULT = ("default", "none", "off")


def shown(talk: Talk, name: str | None = None) -> Iterator[str]:
    """The settings, or one of them, a line each."""
    known = {**talk.settings, **talk.conversation.sampling}
    rows: dict[str, tuple[Any, str]] = {
        key: (known.get(key, setting.default), setting.meaning) for key, setting in SETTINGS.items()
    }
    rows.update({key: (talk.settings.get(key), meaning) for key, meaning in TEXTS.items()})
    rows["thinking"] = (THINKING[not talk.show_thinking], "what a model thinks before it answers")
    if name is not None:
        rows = {(key := _known(name)): rows[key]}
    for key, (value, meaning) in rows.items():
        text = "none" if value is None else value if isinstance(value, str) else json.dumps(value)
        text = " ".join(text.split())
        yield f"{key:17}  {text if len(text) <= 40 else f'{text[:39]}…':8}  {meaning}"


def change(talk: Talk, name: str, text: str) -> None:
    """Sets what a person typed. Raises ChatError or ModelError for what cannot be."""
    name, text = _known(name), text.strip()
    if name == "thinking":
        if text not in THINKING:
            raise ChatError(f"thinking is {' or '.join(THINKING)}")
        talk.show_thinking = text == "show"
    elif text in DEFAULT:
        talk.set(name, MAX_TOKENS if name == "max_tokens" else None)
    elif name == "stop":
        talk.set(name, _stop(text))
    elif name in FORMS:
        talk.set(name, text if name == "regex" else written_or_read(text))
    else:
        try:
            value = SETTINGS[name].kind(text)
        except ValueError:
            raise ChatError(f"{name} is a number: {SETTINGS[name].meaning}") from None
        if name == "max_tokens" and value < 1:
            raise ChatError("max_tokens is 1 at least")
        talk.set(name, value)


def completions(talk: Talk) -> Iterable[str]:
    """Names that may stand behind /set."""
    return [*SETTINGS, *TEXTS, *(f"thinking {word}" for word in THINKING)]


def _known(name: str) -> str:
    name = name.lower().replace("-", "_")
    name = SHORT.get(name, name)
    if name not in (*SETTINGS, *TEXTS, "thinking"):
        raise ChatError(f"there is no setting {name[:40]}; /set lists them")
    return name


def _stop(text: str) -> Any:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    return value if isinstance(value, (str, list)) else text.replace("\\n", "\n")
