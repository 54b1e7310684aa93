"""llama.cpp's GBNF, read into rules over characters. `lexemes.py` makes a Lark grammar of them."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from ..errors import ModelError

MAX_NESTED = 100  # parentheses in one another
MAX_REPEAT = 100_000


@dataclass(frozen=True)
class Chars:
    """One of the characters in ranges [(first, last), ...], in order and apart."""

    ranges: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Seq:
    """One item after the other."""

    items: tuple["Node", ...]


@dataclass(frozen=True)
class Alt:
    """One of the items."""

    items: tuple["Node", ...]


@dataclass(frozen=True)
class Repeat:
    """An item, least to most times; most is None without a limit."""

    item: "Node"
    least: int
    most: int | None


@dataclass(frozen=True)
class Ref:
    """What the rule of this name says."""

    name: str


Node = Chars | Seq | Alt | Repeat | Ref
Rules = dict[str, Node]

_SPACE = re.compile(r"(?:[ \t]|#[^\r\n]*)*")
_SPACE_LINES = re.compile(r"(?:[ \t\r\n]|#[^\r\n]*)*")
_NAME = re.compile(r"[A-Za-z0-9_-]+")
_ESCAPE = re.compile(r'\\(?:x([0-9A-Fa-f]{2})|u([0-9A-Fa-f]{4})|U([0-9A-Fa-f]{8})|([]trn\\"[-]))')
_CONTROL = {"t": "\t", "r": "\r", "n": "\n"}
_REPEAT = re.compile(r"[*+?]|\{\s*(\d{1,9})\s*(?:(,)\s*(\d{1,9})?\s*)?\}")


def parse_gbnf(text: str) -> Rules:
    """The rules of a grammar by name, `root` among them. Raises ModelError for a mistake in it."""
    rules = _Parser(text).rules()
    if "root" not in rules:
        raise ModelError('gbnf has no rule "root"')
    for name, rule in rules.items():
        for used in references(rule):
            if used not in rules:
                raise ModelError(f'gbnf uses the rule "{used}" in "{name}" and does not define it')
    return rules


def references(node: Node) -> Iterator[str]:
    """The names of the rules in a node."""
    if isinstance(node, Ref):
        yield node.name
    elif isinstance(node, Repeat):
        yield from references(node.item)
    elif isinstance(node, (Seq, Alt)):
        for item in node.items:
            yield from references(item)


class _Parser:
    def __init__(self, text: str) -> None:
        self._text, self._at, self._nested = text, 0, 0

    def rules(self) -> Rules:
        rules: Rules = {}
        self._skip(_SPACE_LINES)
        while self._at < len(self._text):
            name = self._name()
            self._skip(_SPACE)
            if not self._take("::="):
                raise self._error(f'"::=" expected after "{name}"')
            self._skip(_SPACE_LINES)
            rules[name] = self._alternatives()
            if self._at < len(self._text) and self._text[self._at] not in "\r\n":
                raise self._error("a rule ends with its line")
            self._skip(_SPACE_LINES)
        return rules

    def _alternatives(self) -> Node:
        space = _SPACE_LINES if self._nested else _SPACE
        items = [self._sequence(space)]
        while self._take("|"):
            self._skip(_SPACE_LINES)
            items.append(self._sequence(space))
        return items[0] if len(items) == 1 else Alt(tuple(items))

    def _sequence(self, space: re.Pattern[str]) -> Node:
        items: list[Node] = []
        start = len(items)  # of what a repetition is about: all of a literal, as in llama.cpp
        while self._at < len(self._text):
            here = self._text[self._at]
            if here == '"':
                start = len(items)
                items.extend(self._literal())
            elif here == "[":
                start = len(items)
                items.append(self._class())
            elif here == ".":
                start = len(items)
                self._at += 1
                items.append(_chars([], negated=True))
            elif here == "(":
                start = len(items)
                items.append(self._group())
            elif here in "<!":
                raise self._error("tokens are not supported in gbnf, only characters")
            elif _NAME.match(here):
                start = len(items)
                items.append(Ref(self._name()))
            elif found := _REPEAT.match(self._text, self._at):
                items[start:] = [self._repeat(items[start:], found)]
            else:
                break
            self._skip(space)
        return items[0] if len(items) == 1 else Seq(tuple(items))

    def _group(self) -> Node:
        self._nested += 1
        if self._nested > MAX_NESTED:
            raise self._error(f"more than {MAX_NESTED} parentheses in one another")
        self._at += 1
        self._skip(_SPACE_LINES)
        node = self._alternatives()
        if not self._take(")"):
            raise self._error('")" expected')
        self._nested -= 1
        return node

    def _repeat(self, items: list[Node], found: re.Match[str]) -> Node:
        if not items:
            raise self._error(f'nothing stands before "{found[0]}"')
        self._at = found.end()
        least, most = {"*": (0, None), "+": (1, None), "?": (0, 1)}.get(found[0], (0, 0))
        if found[1] is not None:
            least = int(found[1])
            most = (int(found[3]) if found[3] else None) if found[2] else least
            if max(least, most or 0) > MAX_REPEAT or (most is not None and most < least):
                raise self._error(f'"{found[0]}" repeats too often, or from more to less')
        return Repeat(items[0] if len(items) == 1 else Seq(tuple(items)), least, most)

    def _literal(self) -> list[Node]:
        self._at += 1
        items: list[Node] = []
        while not self._take('"'):
            char = self._char("a text")
            items.append(Chars(((char, char),)))
        return items

    def _class(self) -> Node:
        self._at += 1
        negated = self._take("^")
        ranges = []
        while not self._take("]"):
            low = high = self._char("a class of characters")
            if self._text.startswith("-", self._at) and not self._text.startswith("-]", self._at):
                self._at += 1
                high = self._char("a class of characters")
            if high < low:
                raise self._error("a range of characters runs from more to less")
            ranges.append((low, high))
        return _chars(ranges, negated)

    def _char(self, what: str) -> int:
        if self._at >= len(self._text):
            raise self._error(f"{what} has no end")
        if self._text[self._at] != "\\":
            self._at += 1
            return ord(self._text[self._at - 1])
        found = _ESCAPE.match(self._text, self._at)
        code = found and next((code for code in found.group(1, 2, 3) if code), None)
        if not found or (code and (int(code, 16) > 0x10FFFF or 0xD800 <= int(code, 16) < 0xE000)):
            raise self._error("an escape that means no character")
        self._at = found.end()
        return int(code, 16) if code else ord(_CONTROL.get(found[4], found[4]))

    def _name(self) -> str:
        found = _NAME.match(self._text, self._at)
        if not found:
            raise self._error("the name of a rule expected")
        self._at = found.end()
        return found[0]

    def _take(self, text: str) -> bool:
        found = self._text.startswith(text, self._at)
        self._at += len(text) if found else 0
        return found

    def _skip(self, space: re.Pattern[str]) -> None:
        found = space.match(self._text, self._at)
        assert found
        self._at = found.end()

    def _error(self, what: str) -> ModelError:
        line = self._text.count("\n", 0, self._at) + 1
        return ModelError(f"gbnf, line {line}: {what}")


def _chars(ranges: list[tuple[int, int]], negated: bool) -> Chars:
    """The characters in ranges, or all others, in order and apart, without surrogates."""
    kept = [(0xD800, 0xDFFF)] if negated else []
    merged: list[tuple[int, int]] = []
    for low, high in sorted(ranges + kept):
        if merged and low <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(high, merged[-1][1]))
        else:
            merged.append((low, high))
    if negated:
        edges = [-1, *(edge for pair in merged for edge in pair), 0x110000]
        gaps = zip(edges[::2], edges[1::2], strict=True)
        merged = [(after + 1, before - 1) for after, before in gaps if after + 1 < before]
    return Chars(tuple(merged))
