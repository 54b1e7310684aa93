"""The commands of the chat: a table with the help and the completion of each.

A text that begins with a slash is a command or a mistake, and never goes to the model.
"""

import difflib
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from ..errors import ContextError
from ..saying import note
from . import settings
from .storage import ChatError, kept
from .talk import Talk
from .view import visible


@dataclass(frozen=True)
class Ask:
    """What a command wants next: a question to the model, `again` in the place of the last one."""

    text: str
    again: bool = False


@dataclass(frozen=True)
class Edit:
    """What a command wants next: a text for the person to change, which is then asked again."""

    text: str


@dataclass(frozen=True)
class Leave:
    """What a command wants next: the end."""


Next = Ask | Edit | Leave | None
Say = Callable[[str], None]


@dataclass(frozen=True)
class Command:
    """run gets what stands behind the name. completions are words that may stand there; with files
    names of files."""

    arguments: str
    help: str
    run: Callable[[Talk, str, Say], Next]
    completions: Callable[[Talk], Iterable[str]] | None = None
    files: bool = False


def _system(talk: Talk, text: str, say: Say) -> None:
    if text:
        talk.set_system("" if text == "none" else text)
    say(f"instructions: {talk.system}" if talk.system else "no instructions are set")


def _set(talk: Talk, text: str, say: Say) -> None:
    words = text.split(None, 1)
    if words[:1] == ["parameter"]:  # as people know it from Ollama
        words = words[1].split(None, 1) if len(words) > 1 else []
    if words[:1] == ["system"]:  # likewise
        _system(talk, unquoted(words[1]).strip("\"'") if len(words) > 1 else "", say)
        return
    if len(words) > 1:
        settings.change(talk, words[0], words[1])
    for line in settings.shown(talk, words[0] if words else None):
        say(line)


def _regen(talk: Talk, text: str, say: Say) -> Next:
    if talk.unanswered:
        return Ask(talk.unanswered)
    if talk.turns:
        return Ask(talk.turns[-2]["content"], again=True)
    raise ChatError("there is no answer yet to make again")


def _undo(talk: Talk, text: str, say: Say) -> None:
    question = " ".join(talk.undo().split())
    say(f"taken back: {question if len(question) <= 60 else f'{question[:59]}…'}")


def _edit(talk: Talk, text: str, say: Say) -> Next:
    if not talk.turns and not talk.unanswered:
        raise ChatError("there is no question yet to edit")
    if text:
        return Ask(text, again=not talk.unanswered)
    return Edit(talk.unanswered or talk.turns[-2]["content"])


def _clear(talk: Talk, text: str, say: Say) -> None:
    talk.clear()
    say("a new conversation")


def _save(talk: Talk, text: str, say: Say) -> None:
    if not talk.turns:
        raise ChatError("nothing was said yet that could be saved")
    if text:
        path = _path(text)
        talk.save(path)
        say(f"saved to {path}")
    elif talk.store.path is not None and not talk.store.trouble:
        say(f"kept in {talk.store.path}; /save FILE writes a copy")
    else:
        raise ChatError("this conversation is not kept: name a file to save it to")


def _load(talk: Talk, text: str, say: Say) -> None:
    if not text:
        for number, saved in enumerate(islice(kept(), 20), 1):
            say(f"{number:2}  {saved.path.stem[:15]}  {saved.title}")
        say("/load NUMBER or FILE goes on with a conversation")
        return
    path = _path(text)
    if text.isdecimal() and not path.exists():
        chosen = next(islice(kept(), int(text) - 1, None), None) if int(text) else None
        if chosen is None:
            raise ChatError(f"there is no conversation {text}; /load lists them")
        path = chosen.path
    go_on(talk, path, say)


def go_on(talk: Talk, path: Path, say: Say) -> None:
    """Goes on with a conversation that is kept, and says where it stands."""
    saved = talk.resume(path)
    say(f"continuing: {saved.title}")
    if talk.store.copied:
        note("another chat goes on with this conversation too, so this one goes on in a copy")
    if saved.turns:
        question, answer = (turn["content"] for turn in saved.turns[-2:])
        say(f"> {visible(question)}\n{visible(answer)}")
    if saved.unanswered:
        say("the last question was not answered; /regen asks it again")


def _read(talk: Talk, text: str, say: Say) -> Next:
    if not text:
        raise ChatError("name a file: /read FILE [QUESTION]")
    name, question = _file_and_rest(text)
    content = talk.attach(_path(name))
    tokens = len(talk.llm.tokenize(content.encode("utf-8", "surrogatepass"), add_bos=False))
    if tokens >= talk.llm.n_ctx():
        talk.attached.pop()
        raise ContextError(f"{name} has {tokens} tokens, but the context holds {talk.llm.n_ctx()}")
    if question.strip():
        return Ask(question.strip())
    say(f"{_path(name)} ({tokens} token{'s' * (tokens != 1)}) goes along with the next question")
    return None


def _stats(talk: Talk, text: str, say: Say) -> None:
    stats = talk.stats
    say(f"context   {talk.conversation.size()} of {talk.llm.n_ctx()} tokens")
    say(f"threads   {talk.llm.n_threads}")
    if not stats.prompt:
        return
    new = stats.prompt - stats.reused
    rate = f" at {new / stats.reading:.0f} tokens/s" if stats.reading > 0 else ""
    say(f"question  {stats.prompt} tokens with all before it")
    say(f"          {stats.reused} of them were known, {new} read{rate}")
    say(f"answer    {stats.made} tokens in {stats.making:.2f} s, {stats.speed:.0f} tokens/s")


def _model(talk: Talk, text: str, say: Say) -> None:
    if text:
        path = _path(text)
        talk.switch(None if text == "demo" and not path.exists() else str(path))
    about = talk.llm.metadata
    say(f"{talk.name}: {about.get('general.architecture')}, {talk.llm.n_ctx()} tokens of context")
    if not talk.has_template:
        say("a base model without a chat template: it continues what is typed")


def _lora(talk: Talk, text: str, say: Say) -> None:
    if text == "off":
        talk.adapt([])
    elif text:
        name, _, scale = text.rpartition(" ")
        try:
            number = float(scale)
        except ValueError:
            name, number = text, 1.0
        name = str(_path(name or text))
        talk.adapt([*(item for item in talk.lora if item[0] != name), (name, number)])
    for file, factor in talk.lora:
        say(f"{file} × {factor:g}")
    if not talk.lora:
        say("no adapter is in use; /lora FILE [SCALE] takes one")


def _help(talk: Talk, text: str, say: Say) -> None:
    name = _name(text if text.startswith("/") else f"/{text}") if text else ""
    chosen: dict[str, Command] = {name: COMMANDS[name]} if name else COMMANDS
    heads = {name: f"/{name} {command.arguments}".rstrip() for name, command in chosen.items()}
    width = max(map(len, heads.values()))
    for name, command in chosen.items():
        say(f"{heads[name]:{width}}  {command.help}")
    if len(chosen) > 1:
        for line in KEYS:
            say(line)


def _leave(talk: Talk, text: str, say: Say) -> Next:
    return Leave()


def _file_and_rest(text: str) -> tuple[str, str]:
    """The name of a file, which may have spaces, and what stands behind it."""
    if _path(text).exists():
        return text, ""
    if (quote := text[0]) in "\"'" and quote in text[1:]:
        name, _, rest = text[1:].partition(quote)
    else:
        name, _, rest = text.partition(" ")
    return name, rest


def _path(text: str) -> Path:
    return Path(os.path.expanduser(text.strip().strip("\"'")))


KEYS = (
    '"""  begins and ends a text of several lines; so does Alt-Enter, or \\ at the end of a line',
    "Ctrl-C stops an answer, Ctrl-R searches what was typed, Ctrl-X Ctrl-E opens your editor,",
    "Ctrl-D leaves; a text that begins with a space is not a command",
)
COMMANDS: dict[str, Command] = {
    "help": Command("[COMMAND]", "this list", _help, lambda talk: COMMANDS),
    "system": Command("[TEXT|none]", "show or set the instructions at the top", _system),
    "set": Command("[NAME [VALUE]]", "show or change settings", _set, settings.completions),
    "regen": Command("", "make the last answer again", _regen),
    "undo": Command("", "take the last question and its answer back", _undo),
    "edit": Command("[TEXT]", "change the last question and ask it again", _edit),
    "clear": Command("", "begin a new conversation", _clear),
    "save": Command("[FILE]", "save the conversation, or say where it is kept", _save, files=True),
    "load": Command("[NUMBER|FILE]", "list conversations, or go on with one", _load, files=True),
    "read": Command("FILE [QUESTION]", "add a file to the next question", _read, files=True),
    "stats": Command("", "tokens, speed and context of the last answer", _stats),
    "model": Command("[MODEL]", "show the model, or go on with another", _model, files=True),
    "lora": Command("[FILE [SCALE]|off]", "use an adapter, or none", _lora, files=True),
    "exit": Command("", "leave, as Ctrl-D does", _leave),
}
ALIASES = {"?": "help", "bye": "exit", "quit": "exit", "reset": "clear", "regenerate": "regen"}


def _name(word: str) -> str:
    """The command that a word with a slash names. Raises ChatError, with the nearest ones."""
    name = word[1:].lower()
    name = ALIASES.get(name, name)
    if name in COMMANDS:
        return name
    near = difflib.get_close_matches(name, [*COMMANDS, *ALIASES], 1)
    hint = f"did you mean /{near[0]}?" if near else "/help lists them"
    word = word if len(word) <= 40 else f"{word[:39]}…"
    raise ChatError(f"{word} is not a command; {hint} (a space before it makes it a question)")


def carry_out(talk: Talk, line: str, say: Say) -> Next:
    """Does what a text that begins with a slash says. Raises MobileLLMError where it cannot."""
    word, *rest = line.split(None, 1)
    return COMMANDS[_name(word)].run(talk, unquoted(rest[0]) if rest else "", say)


def unquoted(text: str) -> str:
    """A text without the three quotes that hold its lines together."""
    text = text.strip()
    if text.startswith('"""'):
        text = text[3:].removesuffix('"""').strip("\n")
    return text
