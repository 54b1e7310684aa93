"""A grammar over characters as rules over lexemes, and its text in llguidance's Lark."""

from collections.abc import Iterator

from ..errors import ModelError
from .gbnf import Alt, Chars, Node, Ref, Repeat, Rules, Seq, references

NESTED = 8  # parentheses in one another; llguidance allows 28


class Shapes:
    """The rules over lexemes: `lexemes` by number; the set `start` of those that may come first;
    for each lexeme `follow`, those that may come next, and `next_bytes`, what they begin with.

    recursive: the rules that are, or lead there. cut: what is not to be one lexeme, though it could
    be."""

    def __init__(self, rules: Rules, recursive: set[str], cut: set[Node]) -> None:
        self._rules, self._recursive, self._cut = rules, recursive, cut
        self.lexemes: list[Node] = []
        self._numbers: dict[Node, int] = {}
        self._bodies: dict[str, str] = {}  # of rules
        self._parts: list[str] = []  # rules for what is nested too deeply
        self._begins: dict[str, tuple[bool, int]] = {}
        self._names: dict[Node, str] = {}  # terminals inside lexemes
        self._texts: dict[Node, str] = {}
        # rules of a plain grammar, for what may follow what
        self._plain: dict[int, list[list[int]]] = {}
        self._symbols: dict[str, int] = {}
        waiting = ["root"]
        while waiting:
            name = waiting.pop()
            if name in self._bodies:
                continue
            self._bodies[name] = ""
            text, symbol = self._shape(rules[name], waiting, 0)
            self._bodies[name] = text
            self._plain[self._symbol(name)] = [[symbol]]
        self.follow, self.start = self._follow()
        self._first = [self._begin(lexeme)[1] for lexeme in self.lexemes]
        self.next_bytes = [union(self._first, after) for after in self.follow]

    def _symbol(self, name: str) -> int:
        """The number of a rule in the plain grammar: below 0; lexemes are counted from 0."""
        if name not in self._symbols:
            self._symbols[name] = -1 - len(self._plain)
            self._plain[self._symbols[name]] = []
        return self._symbols[name]

    def _new(self, sides: list[list[int]]) -> int:
        symbol = -1 - len(self._plain)
        self._plain[symbol] = sides
        return symbol

    def _regular(self, node: Node) -> bool:
        return not any(name in self._recursive for name in references(node))

    def _shape(self, node: Node, waiting: list[str], depth: int) -> tuple[str, int]:
        """A node in Lark, and its symbol in the plain grammar; new rules go to waiting."""
        if node == Seq(()):
            return '""', self._new([[]])
        if self._regular(node) and node not in self._cut:
            return self._lexeme(node)
        if isinstance(node, Ref):
            waiting.append(node.name)
            return self._rule_name(node.name), self._symbol(node.name)
        if depth == NESTED:
            text, symbol = self._shape(node, waiting, 0)
            self._parts.append(f"g{len(self._parts)}: {text}")
            return f"g{len(self._parts) - 1}", symbol
        if isinstance(node, Alt):
            parts = [self._shape(item, waiting, depth + 1) for item in node.items]
            return (
                "(" + " | ".join(text for text, _ in parts) + ")",
                self._new([[symbol] for _, symbol in parts]),
            )
        if isinstance(node, Seq):
            parts = [self._shape(item, waiting, depth + 1) for item in self._runs(node)]
            return (
                "(" + " ".join(text for text, _ in parts) + ")",
                self._new([[symbol for _, symbol in parts]]),
            )
        assert isinstance(node, Repeat)
        text, symbol = self._shape(node.item, waiting, depth + 1)
        again = self._new([[] if node.least == 0 else [symbol]])
        self._plain[again].append([symbol] if node.most == 1 else [symbol, again])
        return f"({text}){_times(node)}", again

    def _runs(self, node: Seq) -> Iterator[Node]:
        """The items, those without recursion that stand side by side as one, unless cut."""
        if node in self._cut:
            yield from node.items
            return
        run: list[Node] = []
        for item in [*node.items, None]:
            if item is not None and self._regular(item):
                run.append(item)
                continue
            if run:
                whole = run[0] if len(run) == 1 else Seq(tuple(run))
                yield from [whole] if whole not in self._cut else run
                run = []
            if item is not None:
                yield item

    def _lexeme(self, node: Node) -> tuple[str, int]:
        if node not in self._numbers:
            self._numbers[node] = len(self.lexemes)
            self.lexemes.append(node)
        number = self._numbers[node]
        return f"T{number}", number

    def _rule_name(self, name: str) -> str:
        return "start" if name == "root" else f"r{-self._symbol(name)}"

    def _follow(self) -> tuple[list[int], int]:
        """For each lexeme the set of those that may come next, and those that may come first."""
        nullable: dict[int, bool] = {}
        first: dict[int, int] = {}
        for number, lexeme in enumerate(self.lexemes):
            nullable[number], first[number] = self._begin(lexeme)[0], 1 << number
        for symbol in self._plain:
            nullable[symbol], first[symbol] = False, 0
        follow = dict.fromkeys(first, 0)
        changed = True
        while changed:
            changed = False
            for symbol, sides in self._plain.items():
                for side in sides:
                    after, empty = follow[symbol], True
                    starts = 0
                    for item in reversed(side):
                        if follow[item] | after != follow[item]:
                            follow[item] |= after
                            changed = True
                        starts = first[item] | (starts if nullable[item] else 0)
                        after = first[item] | (after if nullable[item] else 0)
                        empty = empty and nullable[item]
                    if first[symbol] | starts != first[symbol] or empty > nullable[symbol]:
                        first[symbol] |= starts
                        nullable[symbol] = nullable[symbol] or empty
                        changed = True
        root = self._symbols["root"]
        return [follow[number] for number in range(len(self.lexemes))], first[root]

    def _begin(self, node: Node) -> tuple[bool, int]:
        """Whether a node may be empty, and the bytes that it may begin with."""
        if isinstance(node, Chars):
            return False, first_bytes(node)
        if isinstance(node, Ref):
            if node.name not in self._begins:
                self._begins[node.name] = self._begin(self._rules[node.name])
            return self._begins[node.name]
        if isinstance(node, Repeat):
            empty, first = self._begin(node.item)
            return empty or node.least == 0, first
        parts = [self._begin(item) for item in node.items]
        if isinstance(node, Alt):
            return any(empty for empty, _ in parts), union([first for _, first in parts])
        found = 0
        for empty, first in parts:
            found |= first
            if not empty:
                return False, found
        return True, found

    def may_share(self, a: int, b: int) -> bool:
        """Whether two lexemes may begin alike."""
        return bool(self._first[a] & self._first[b])

    def lark(self) -> str:
        terminals = [f"T{n}: {self._terminal(node, 0)}" for n, node in enumerate(self.lexemes)]
        rules = [f"{self._rule_name(name)}: {text}" for name, text in self._bodies.items()]
        return "\n".join([*rules, *self._parts, *terminals, *self._texts.values()]) + "\n"

    def _terminal(self, node: Node, depth: int) -> str:
        """A node as a terminal of Lark."""
        if isinstance(node, Chars):
            return f"/{_class(node)}/"
        if isinstance(node, Ref):
            return self._named(node, self._rules[node.name])
        if depth == NESTED:
            return self._named(node, node)
        if isinstance(node, Repeat):
            return f"({self._terminal(node.item, depth + 1)}){_times(node)}"
        if not node.items:
            return '""'
        texts = [self._terminal(item, depth + 1) for item in node.items]
        if isinstance(node, Alt):
            return "(" + " | ".join(texts) + ")"
        parts: list[str] = []
        for item, text in zip(node.items, texts, strict=True):
            if isinstance(item, Chars) and parts and parts[-1].endswith("/"):
                parts[-1] = parts[-1][:-1] + text[1:]
            else:
                parts.append(text)
        return "(" + " ".join(parts) + ")"

    def _named(self, node: Node, body: Node) -> str:
        """The name of a terminal that is defined once."""
        if node not in self._names:
            self._names[node] = f"N{len(self._names)}"
            self._texts[node] = f"{self._names[node]}: {self._terminal(body, 0)}"
        return self._names[node]


def _times(node: Repeat) -> str:
    if node.most is None:
        return "*" if node.least == 0 else "+" if node.least == 1 else f"{{{node.least},}}"
    return "?" if (node.least, node.most) == (0, 1) else f"{{{node.least},{node.most}}}"


def _class(node: Chars) -> str:
    if not node.ranges:
        raise ModelError("gbnf has a class without characters")
    text = "".join(
        _escaped(low) if low == high else f"{_escaped(low)}-{_escaped(high)}"
        for low, high in node.ranges
    )
    return text if len(node.ranges) == 1 and node.ranges[0][0] == node.ranges[0][1] else f"[{text}]"


def _escaped(char: int) -> str:
    return chr(char) if chr(char).isascii() and chr(char).isalnum() else f"\\u{{{char:x}}}"


def first_bytes(node: Chars) -> int:
    """The set of bytes with which the characters begin in UTF-8."""
    found = 0
    for low, high in node.ranges:
        begin, end = (chr(c).encode("utf-8", "surrogatepass")[0] for c in (low, high))
        found |= (1 << end + 1) - (1 << begin)
    return found


def bits(number: int) -> Iterator[int]:
    """The places of the bits that are set."""
    while number:
        low = number & -number
        yield low.bit_length() - 1
        number ^= low


def union(sets: list[int], which: int | None = None) -> int:
    """The union of all sets, or of those that `which` has a bit for."""
    found = 0
    for i in range(len(sets)) if which is None else bits(which):
        found |= sets[i]
    return found
