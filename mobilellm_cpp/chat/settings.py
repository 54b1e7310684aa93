"""What `/set` shows and changes: arguments of sampling, the form of answers, and how they look."""

import json
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from .storage import ChatError
from .talk import FORMS, Talk

# What sampling takes where nothing was set, and what it means.
SAMPLING: dict[str, tuple[float | None, str]] = {
    "temperature": (0.8, "0 always takes the likeliest token"),
    "top_k": (40, "only so many of the likeliest tokens; 0: all"),
    "top_p": (0.95, "only the likeliest tokens that are so probable together; 1: all"),
    "min_p": (0.05, "only tokens so probable, relative to the likeliest; 0: all"),
    "typical_p": (1.0, "locally typical sampling; 1: off"),
    "repeat_penalty": (1.0, "divides the logits of tokens seen lately; 1: off"),
    "frequency_penalty": (0.0, "taken from them for each time that they were seen; 0: off"),
    "presence_penalty": (0.0, "taken from them once; 0: off"),
    "seed": (None, "the same seed gives the same answers"),
    "max_tokens": (512, "tokens of an answer at most"),
}
WHOLE = ("top_k", "seed", "max_tokens")
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
    rows: dict[str, tuple[Any, str]] = {
        key: (talk.settings.get(key, default), meaning)
        for key, (default, meaning) in SAMPLING.items()
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
        talk.set(name, SAMPLING["max_tokens"][0] if name == "max_tokens" else None)
    elif name == "stop":
        talk.set(name, _stop(text))
    elif name in FORMS:
        talk.set(name, _text(text))
    else:
        kind: Callable[[str], float] = int if name in WHOLE else float
        try:
            value = kind(text)
        except ValueError:
            raise ChatError(f"{name} is a number: {SAMPLING[name][1]}") from None
        if name == "max_tokens" and value < 1:
            raise ChatError("max_tokens is 1 at least")
        talk.set(name, value)


def completions(talk: Talk) -> Iterable[str]:
    """Names that may stand behind /set."""
    return [*SAMPLING, *TEXTS, *(f"thinking {word}" for word in THINKING)]


def _known(name: str) -> str:
    name = name.lower().replace("-", "_")
    name = SHORT.get(name, name)
    if name not in (*SAMPLING, *TEXTS, "thinking"):
        raise ChatError(f"there is no setting {name[:40]}; /set lists them")
    return name


def _stop(text: str) -> Any:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    return value if isinstance(value, (str, list)) else text.replace("\\n", "\n")


def _text(text: str) -> str:
    """The text of a form: that of a file, where there is one of this name."""
    path = os.path.expanduser(text)
    try:
        if os.path.isfile(path):
            with open(path, encoding="utf-8", errors="replace") as file:
                return file.read()
    except (OSError, ValueError) as error:
        raise ChatError(f"{text[:200]} cannot be read: {error}") from None
    return text
