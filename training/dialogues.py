"""Dialogues drawn from the world: what the model reads while it learns.

Promises: with the same world, vocabulary and seed, `Speaker` yields the same dialogues. A dialogue
mixes topics; a follow-up comes right after the turn it refers to, or after one polite word in
between. Wordings are roughened as people type them: case, punctuation, contractions, a dropped
small word, a typo. Only words that carry no content are ever added (see `world.STOP_WORDS`). Some
first turns are two bare keywords from two wordings of an intent.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator

import sentencepiece as spm
from model import BOS, EOS
from world import (
    PREFIXES,
    QUESTION_WORDS,
    STOP_WORDS,
    SUFFIXES,
    Intent,
    keywords,
    plain_words,
)

Message = dict[str, str]

# Intents that leave the topic of a dialogue as it is.
POLITE = ("thanks", "ok", "praise", "hello", "sorry")

# How much more often than others an intent opens a topic: what lies outside the world is wide.
WEIGHTS = {"unknown": 8.0, "unclear.person": 2.0, "unclear.thing": 2.0}

# Weight in the loss of each of the first three tokens of an answer.
OPENING = 4.0

# Share of first wordings that are two bare keywords, as typed into a search box.
KEYWORDS = 0.12

SYSTEM = (
    "You are a helpful villager.",
    "You are a helpful assistant.",
    "You are Pip, the guide of Tarnby.",
    "You are a friendly guide. Answer in one or two sentences.",
    "Answer briefly.",
    "You are a chat assistant in a small village.",
    "Be kind and short.",
)

CONTRACTIONS = (
    ("what is", "what's"), ("who is", "who's"), ("where is", "where's"), ("when is", "when's"),
    ("how is", "how's"), ("that is", "that's"), ("it is", "it's"), ("i am", "i'm"),
    ("you are", "you're"), ("i have", "i've"), ("i will", "i'll"), ("do not", "don't"),
    ("does not", "doesn't"), ("is not", "isn't"), ("cannot", "can't"), ("i would", "i'd"),
    ("there is", "there's"), ("let us", "let's"), ("she is", "she's"), ("he is", "he's"),
)  # fmt: skip
SMALL_WORDS = frozenset("a an the of to is are do does did has have".split())  # noqa: SIM905
VERBS_FIRST = frozenset(
    "is are was do does did can could will would may must has have should shall am".split()  # noqa: SIM905
)


def is_question(text: str) -> bool:
    """Tell whether a wording asks, by its first word and the one after a first preposition."""
    words = text.lower().split()[:2]
    return any(word in QUESTION_WORDS for word in words) or words[0] in VERBS_FIRST


def typo(word: str, rng: random.Random) -> str:
    """Return word with one letter lost, doubled, or swapped with the next."""
    at = rng.randrange(1, len(word) - 1)
    kind = rng.randrange(3)
    if kind == 0:
        return word[:at] + word[at + 1 :]
    if kind == 1:
        return word[:at] + word[at] + word[at:]
    return word[:at] + word[at + 1] + word[at] + word[at + 2 :]


def roughen(text: str, rng: random.Random) -> str:
    """Return one of the many ways in which a person may type a wording."""
    asks = is_question(text)
    for long, short in CONTRACTIONS:
        if long in text and rng.random() < 0.35:
            text = re.sub(rf"\b{long}\b", short, text)
    words = text.split()
    if len(words) > 3 and rng.random() < 0.2:
        words = [w for w in words if w not in SMALL_WORDS or rng.random() < 0.6]
    content = [i for i, w in enumerate(words) if w not in STOP_WORDS and w not in QUESTION_WORDS]
    if len(content) >= 3 and rng.random() < 0.25:
        lost = rng.choice(content)
        if words[lost].islower():
            del words[lost]
    if rng.random() < 0.12:
        at = rng.randrange(len(words))
        if len(words[at]) >= 5 and words[at].isalpha():
            words[at] = typo(words[at], rng)
    text = " ".join(words)
    if rng.random() < 0.22:
        comma = rng.choice((", ", " "))
        text = rng.choice(PREFIXES) + comma + text
    if rng.random() < 0.12:
        text += rng.choice((", ", " ")) + rng.choice(SUFFIXES)
    case = rng.random()
    if case < 0.3:
        text = text.lower()
    elif case < 0.31:
        text = text.upper()
    else:
        text = text[0].upper() + text[1:]
        text = re.sub(r"\bi\b", "I", text)
    end = rng.random()
    if asks:
        return text + ("?" if end < 0.75 else "" if end < 0.97 else "??")
    return text + ("." if end < 0.5 else "" if end < 0.85 else "!")


class Speaker:
    """Draws dialogues from a list of intents with one random generator."""

    def __init__(self, intents: list[Intent], seed: int) -> None:
        self.rng = random.Random(seed)
        self.openers = [intent for intent in intents if intent.first]
        self.weights = [WEIGHTS.get(intent.name, 1.0) for intent in self.openers]
        self.followers: dict[str, list[Intent]] = {intent.name: [] for intent in intents}
        for intent in intents:
            for name in intent.after:
                self.followers[name].append(intent)
        self.keywords = keywords(self.openers)

    def pair(self, intent: Intent) -> str | None:
        """Return two keywords from two wordings that together point at this intent alone."""
        users = self.keywords
        for _ in range(6):
            texts = self.rng.sample(intent.first, 2)
            found = [[word for word in plain_words(text) if word in users] for text in texts]
            if all(found):
                one, two = (self.rng.choice(words) for words in found)
                if one != two and users[one] & users[two] == {intent.name}:
                    return f"{one} {two}"
        return None

    def dialogue(self, turns: int) -> list[tuple[Intent, str]]:
        """Return a dialogue: for each turn the intent and what the user typed."""
        rng = self.rng
        topic: str | None = None
        waited = 0
        said: list[tuple[Intent, str]] = []
        while len(said) < turns:
            followers = self.followers[topic] if topic else []
            if followers and waited < 2 and rng.random() < 0.55:
                intent = rng.choice(followers)
                wording = rng.choice(intent.later)
            else:
                intent = rng.choices(self.openers, self.weights)[0]
                if intent.name.startswith("unclear") and topic:
                    continue
                wording = rng.choice(intent.first)
                if rng.random() < KEYWORDS:
                    wording = self.pair(intent) or wording
            if intent.name in POLITE:
                waited += 1
            elif not intent.name.startswith("unclear"):
                topic, waited = intent.name, 0
            said.append((intent, roughen(wording, rng)))
        return said


def tokenizer_lines(speaker: Speaker, count: int) -> Iterator[str]:
    """Yield text for the tokenizer: `count` turns as the model will read them.

    A line must not hold a line break, so a bar stands for it: like the break, it is never part of
    a piece with letters.
    """
    for _ in range(count):
        for intent, wording in speaker.dialogue(1):
            yield f"User: {wording}|Assistant: {intent.answer}"
    yield from SYSTEM


class Encoder:
    """Turns dialogues into tokens and the weight of each token in the loss."""

    def __init__(self, sp: spm.SentencePieceProcessor, speaker: Speaker, prompt: float) -> None:
        self.sp, self.speaker, self.prompt = sp, speaker, prompt
        self.answers: dict[str, list[int]] = {}

    def document(self, turns: int) -> tuple[list[int], list[float]]:
        """Return tokens and weights of one dialogue: `prompt` for what is not an answer, 1 for
        answers, and `OPENING` for their first tokens, which decide what the rest will be."""
        system = ""
        if self.speaker.rng.random() < 0.12:
            system = self.speaker.rng.choice(SYSTEM) + "\n"
        tokens, weights = [BOS], [0.0]
        for intent, wording in self.speaker.dialogue(turns):
            if intent.name not in self.answers:
                self.answers[intent.name] = [*self.sp.encode(intent.answer), EOS]
            # A space always starts a new piece, so question and answer can be encoded apart.
            asked = self.sp.encode(f"{system}User: {wording}\nAssistant:")
            answer = self.answers[intent.name]
            tokens += asked + answer
            weights += [self.prompt] * len(asked)
            weights += [OPENING if i < 3 else 1.0 for i in range(len(answer))]
            system = ""
        return tokens, weights

    def row(self, length: int, longest: int) -> tuple[list[int], list[float], list[int]]:
        """Return tokens, weights and dialogue numbers of one row, filled to `length`."""
        rng = self.speaker.rng
        tokens: list[int] = []
        weights: list[float] = []
        owner: list[int] = []
        number = 0
        while len(tokens) < length:
            kind = rng.random()
            turns = 1 if kind < 0.3 else 2 if kind < 0.55 else rng.randint(3, 8)
            if kind > 0.93:
                turns = longest
            more, weight = self.document(turns)
            tokens += more
            weights += weight
            owner += [number] * len(more)
            number += 1
        return tokens[:length], weights[:length], owner[:length]
