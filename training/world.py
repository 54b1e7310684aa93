"""The small world: intents, their answers, and every wording a user may choose.

The text lies in `intents/*.txt`. A file is read line by line:

    # note                    ignored
    let name = (Marta|the baker)      the words that $subj, $poss, $obj stand for in a first turn
    let pronouns = she her her        and in a follow-up: subject, possessive, object
    template home             starts a list of patterns that several intents `use`
    [baker.home]              starts an intent
    = Marta lives ...         its answer
    after baker.*             the intents that a follow-up may follow
    use home                  the patterns of a template, as first turn and as follow-up
    borrow home age           follow-up patterns of templates as a first turn: pointing at nothing
    where is Marta            a pattern for the first turn
    + where is she            a pattern for a follow-up

A pattern may hold choices, `(a|b|)`; `expand` lists every text it stands for. The set is finite,
so a held-out wording can be compared with all of it.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cache
from itertools import product
from pathlib import Path

INTENTS = Path(__file__).parent / "intents"

# What may stand before and after a wording without changing its meaning.
PREFIXES = (
    "please", "hey", "well", "so", "ok", "um", "and", "oh", "say", "pip", "tell me", "hi",
    "do you know", "can you tell me", "could you tell me", "i wonder", "excuse me", "sorry",
    "i would like to know", "i want to know", "just", "now", "actually", "listen", "hey pip",
    "would you tell me", "maybe you know", "let me ask", "by the way", "may i ask",
)  # fmt: skip
SUFFIXES = ("please", "pip", "then", "thanks", "exactly", "do you know", "by the way", "actually")

# Words that carry no content of their own: grammar, and what the prefixes and suffixes are made of.
_GRAMMAR = """
    a an the is are was were be been am do does did has have had of to in on at for from with by
    and or but it its this that these those there here i me my mine you your yours we us our he him
    his she her hers they them their can could will would shall should may might must not no so too
    very just s t d ll re ve m as if then than some any about
"""
STOP_WORDS = frozenset(" ".join((_GRAMMAR, *PREFIXES, *SUFFIXES)).split())

# Grammar as well, yet in a short question half of its meaning: `content_words` counts both ways.
QUESTION_WORDS = frozenset(("who", "whom", "whose", "what", "which", "when", "where", "why", "how"))

# A word that opens more intents than this tells little.
COMMON = 10


@dataclass
class Intent:
    """One thing a user may want: `first` and `later` are all wordings for a first turn and for a
    follow-up to one of the intents `after`."""

    name: str
    answer: str = ""
    first: list[str] = field(default_factory=list)
    later: list[str] = field(default_factory=list)
    after: list[str] = field(default_factory=list)

    @property
    def wordings(self) -> list[str]:
        return self.first + self.later


def expand(pattern: str) -> list[str]:
    """Return every text a pattern stands for, without doubles, in a fixed order."""
    inner = re.search(r"\(([^()]*)\)", pattern)
    if inner is None:
        return [" ".join(pattern.split()).replace(" ,", ",")]
    texts: dict[str, None] = {}
    for choice in inner.group(1).split("|"):
        for text in expand(pattern[: inner.start()] + choice + pattern[inner.end() :]):
            texts[text] = None
    return list(texts)


def fill(pattern: str, subject: str, possessive: str, thing: str) -> str:
    """Return pattern with $subj, $poss and $obj replaced."""
    return pattern.replace("$subj", subject).replace("$poss", possessive).replace("$obj", thing)


class _Reader:
    """Collects templates and intents over all files; `borrow` is resolved last."""

    def __init__(self) -> None:
        self.intents: dict[str, Intent] = {}
        self.templates: dict[str, list[str]] = {}
        self.borrowed: list[tuple[Intent, list[str]]] = []
        self.names: list[str] = []
        self.pronouns = ["it", "its", "it"]

    def read(self, text: str) -> None:
        intent: Intent | None = None
        template: list[str] | None = None
        for line in filter(None, (line.strip() for line in text.splitlines())):
            word, _, rest = line.partition(" ")
            if word == "#":
                continue
            if word == "let":
                key, _, value = rest.partition(" = ")
                if key == "name":
                    self.names = expand(value)
                else:
                    self.pronouns = value.split()
            elif word == "template":
                template = self.templates.setdefault(rest, [])
            elif line.startswith("["):
                template, intent = None, Intent(line.strip("[]"))
                if intent.name in self.intents:
                    raise ValueError(f"intent {intent.name} is there twice")
                self.intents[intent.name] = intent
            elif template is not None:
                template.append(line)
            elif intent is None:
                raise ValueError(f"line outside of an intent: {line}")
            elif word == "=":
                intent.answer = rest
            elif word == "after":
                intent.after += rest.split()
            elif word == "use":
                self.use(intent, self.templates[rest])
            elif word == "borrow":
                self.borrowed.append((intent, rest.split()))
            elif word == "+":
                intent.later += expand(rest)
            else:
                intent.first += expand(line)

    def use(self, intent: Intent, patterns: list[str]) -> None:
        for pattern in patterns:
            if pattern.startswith("+ "):
                intent.later += expand(pattern[2:])
                continue
            for name in self.names:
                intent.first += expand(fill(pattern, name, f"{name}'s", name))
            intent.later += expand(fill(pattern, *self.pronouns))

    def finish(self) -> list[Intent]:
        own = {text for intent in self.intents.values() for text in intent.first}
        for intent, templates in self.borrowed:
            kinds = [["it", "its", "it"], ["that", "its", "that"]]
            if intent.name.endswith("person"):
                kinds = [["she", "her", "her"], ["he", "his", "him"]]
            for name, kind in product(templates, kinds):
                for pattern in self.templates[name]:
                    if not pattern.startswith("+ "):
                        texts = expand(fill(pattern, *kind))
                        intent.first += [text for text in texts if text not in own]
        for intent in self.intents.values():
            intent.first = list(dict.fromkeys(intent.first))
            intent.later = list(dict.fromkeys(intent.later))
            intent.after = [
                name
                for name in self.intents
                if any(fnmatchcase(name, glob) for glob in intent.after)
            ]
        return list(self.intents.values())


def read_world(folder: Path = INTENTS) -> list[Intent]:
    """Return all intents of the files in `folder`; raise ValueError where one has no answer or
    fewer than thirty wordings."""
    reader = _Reader()
    for path in sorted(folder.glob("*.txt")):
        reader.names, reader.pronouns = [], ["it", "its", "it"]
        reader.read(path.read_text())
    intents = reader.finish()
    for intent in intents:
        if not intent.answer:
            raise ValueError(f"{intent.name} has no answer")
        if len(intent.wordings) < 30:
            raise ValueError(f"{intent.name} has only {len(intent.wordings)} wordings")
        if bool(intent.later) != bool(intent.after):
            raise ValueError(f"{intent.name}: follow-ups and `after` go together")
    return intents


# ---------------------------------------------------------------- content words


def stem(word: str) -> str:
    """Return word without the commonest English endings, so that `bakes` and `baking` agree."""
    for ending in ("ings", "ing", "ies", "ied", "es", "ed", "ly", "s", "y", "e"):
        if word.endswith(ending) and len(word) - len(ending) >= 3:
            word = word[: -len(ending)]
            break
    return word[:-1] if len(word) > 3 and word[-1] == word[-2] else word


def plain_words(text: str) -> list[str]:
    """Return the words of text as they are written, without question words and stop words."""
    words = re.findall(r"[A-Za-z0-9]+", text)
    return [w for w in words if w.lower() not in STOP_WORDS and w.lower() not in QUESTION_WORDS]


def keywords(intents: list[Intent]) -> dict[str, set[str]]:
    """Return the telling words of first turns, each with the names of the intents it may open.

    A word that opens more than `COMMON` intents tells little and is left out, and so are the
    intents that point at nothing.
    """
    users: dict[str, set[str]] = {}
    for intent in intents:
        for word in {word for text in intent.first for word in plain_words(text)}:
            users.setdefault(word, set()).add(intent.name)
    pointless = {intent.name for intent in intents if intent.name.startswith("unclear")}
    return {word: names - pointless for word, names in users.items() if len(names) <= COMMON}


@cache
def content_words(text: str, question_words: bool = True) -> frozenset[str]:
    """Return the stems of the words of text that are not stop words."""
    words = re.findall(r"[a-z0-9]+", text.lower().replace("n't", " not"))
    drop = STOP_WORDS if question_words else STOP_WORDS | QUESTION_WORDS
    return frozenset(stem(word) for word in words if word not in drop)


@dataclass(frozen=True)
class Item:
    """One line of a file of questions: a dialogue whose last turn, the user's, is the wording."""

    intent: str
    messages: list[dict[str, str]]

    @property
    def wording(self) -> str:
        return self.messages[-1]["content"]


def read_items(path: Path) -> list[Item]:
    """Return the items of a file such as heldout.jsonl."""
    lines = path.read_text().splitlines()
    return [Item(row["intent"], row["messages"]) for row in map(json.loads, filter(None, lines))]
