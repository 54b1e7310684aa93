"""The Lark grammar of llguidance that accepts the same texts as a grammar over characters.

llguidance reads lexemes, each as long as it can be, and never goes back: of `"a" "b" | "ab" "c"` it
takes abc alone, since after ab the lexeme "ab" has begun. So a rule without recursion becomes one
lexeme, which is exact, and around recursion every run of such rules. Then lexemes that could go on
where another one ends are cut into their parts, at last into characters, until none is left.
"""

from dataclasses import dataclass

from ..errors import ModelError
from .gbnf import Alt, Chars, Node, Ref, Repeat, Rules, Seq, parse_gbnf, references
from .lark import Shapes, bits, first_bytes, union

MAX_PLACES = 600  # of characters in a lexeme that is looked at; longer ones are cut
MAX_STEPS = 150_000  # of comparing lexemes
COPIES = 8  # how often a repeated item is written out; more count as any number


def gbnf_to_lark(text: str) -> str:
    """Raises ModelError for a mistake in the grammar, or one too large."""
    try:
        rules = {name: _without_tail(name, rule) for name, rule in parse_gbnf(text).items()}
        return _Grammar(rules).lark()
    except RecursionError:
        raise ModelError("the rules of the gbnf are nested too deeply") from None


def _without_tail(name: str, rule: Node) -> Node:
    """`a ::= x a | y` as x* y; other rules as they are."""
    if name not in references(rule) or (split := _tail(name, rule)) is None:
        return rule
    again, done = split
    return Seq((Repeat(Alt(tuple(again)), 0, None), Alt(tuple(done)))) if done else rule


def _tail(name: str, node: Node) -> tuple[list[Node], list[Node]] | None:
    """What precedes `name` at the end of node, and what node may be instead; None where the name
    stands elsewhere, too."""
    if name not in references(node):
        return [], [node]
    if node == Ref(name):
        return [Seq(())], []
    if isinstance(node, Alt):
        splits = [_tail(name, item) for item in node.items]
        if None in splits:
            return None
        return [n for s in splits if s for n in s[0]], [n for s in splits if s for n in s[1]]
    if isinstance(node, Repeat) and (node.least, node.most) == (0, 1):
        split = _tail(name, node.item)
        return split and (split[0], [*split[1], Seq(())])
    if isinstance(node, Seq) and not any(name in references(item) for item in node.items[:-1]):
        split = _tail(name, node.items[-1])
        front = node.items[:-1]
        return split and tuple([Seq((*front, node)) for node in part] for part in split)  # type: ignore[return-value]
    return None


@dataclass
class _Places:
    """A lexeme as an automaton whose states are the places of its characters (Glushkov): bit sets
    of the places where it may begin and end, and of those that follow each; the first bytes of
    the characters at each."""

    nullable: bool
    first: int
    last: int
    follow: list[int]
    bytes: list[int]


class _Grammar:
    def __init__(self, rules: Rules) -> None:
        self._rules = rules
        self._cut: set[Node] = set()
        self._recursive = _recursive(rules)
        self._places: dict[Node, _Places | None] = {}
        self._steps = 0

    def lark(self) -> str:
        while True:
            shapes = Shapes(self._rules, self._recursive, self._cut)
            overlong = self._overlong(shapes)
            if not overlong:
                return shapes.lark()
            self._cut |= overlong

    def _overlong(self, shapes: Shapes) -> set[Node]:
        """The lexemes that may go on where another one, or a shorter one of their own, ends and
        the next one begins."""
        found: set[Node] = set()
        seen: set[tuple[int, int]] = set()
        places = [(shapes.start, shapes.start)]  # sets of lexemes that may begin at the same place
        met = set(places)
        while places:
            shorts, longs = places.pop()
            for pair in ((short, long) for short in bits(shorts) for long in bits(longs)):
                self._step()
                if pair in seen:
                    continue
                seen.add(pair)
                same, overlong = self._compare(shapes, *pair)
                if overlong:
                    found.add(shapes.lexemes[pair[1]])
                after = shapes.follow[pair[0]], shapes.follow[pair[1]]
                if same and after not in met:
                    met.add(after)
                    places.append(after)
        return found

    def _compare(self, shapes: Shapes, short: int, long: int) -> tuple[bool, bool]:
        """Whether two lexemes have a text in common, and whether the second may go on after a text
        of the first with what may follow the first."""
        same, overlong, next_bytes = short == long, False, shapes.next_bytes[short]
        if (same and not next_bytes) or not shapes.may_share(short, long):
            return same, False
        a, b = (self._automaton(shapes.lexemes[number]) for number in (short, long))
        if a is None or b is None:
            return True, b is None
        seen: set[tuple[int, int]] = set()
        waiting = [(a.first, b.first)]
        while waiting:
            ps, qs = waiting.pop()
            for p in bits(ps):
                for q in bits(qs):
                    if (p, q) in seen or not a.bytes[p] & b.bytes[q]:
                        continue
                    seen.add((p, q))
                    self._step()
                    if a.last >> p & 1:
                        same = same or bool(b.last >> q & 1)
                        after = union(b.bytes, b.follow[q])
                        overlong = overlong or bool(after & next_bytes)
                    if not (same and overlong):
                        waiting.append((a.follow[p], b.follow[q]))
        return same, overlong

    def _step(self) -> None:
        self._steps += 1
        if self._steps > MAX_STEPS:
            raise ModelError("the gbnf is too large around what recurs in it")

    def _automaton(self, lexeme: Node) -> _Places | None:
        """None for a lexeme with too many places."""
        if lexeme not in self._places:
            places = _Places(False, 0, 0, [], [])
            try:
                places.nullable, places.first, places.last = self._add(places, lexeme)
                self._places[lexeme] = places
            except _TooLongError:
                self._places[lexeme] = None
        return self._places[lexeme]

    def _add(self, places: _Places, node: Node) -> tuple[bool, int, int]:
        """Adds the places of a node; returns whether it may be empty, its first and last ones."""
        self._step()
        if isinstance(node, Chars):
            if len(places.bytes) >= MAX_PLACES:
                raise _TooLongError
            places.bytes.append(first_bytes(node))
            places.follow.append(0)
            here = 1 << len(places.bytes) - 1
            return False, here, here
        if isinstance(node, Ref):
            return self._add(places, self._rules[node.name])
        if isinstance(node, Alt):
            parts = [self._add(places, item) for item in node.items]
            return (
                any(nullable for nullable, _, _ in parts),
                union([first for _, first, _ in parts]),
                union([last for _, _, last in parts]),
            )
        if isinstance(node, Seq):
            return self._add_seq(places, node.items, [False] * len(node.items))
        loops = node.most is None or node.most > COPIES
        n = min(node.least, COPIES) or 1 if loops else node.most or 0
        optional = [i >= node.least for i in range(n)]
        before = len(places.follow)
        nullable, first, last = self._add_seq(places, (node.item,) * n, optional)
        if loops:  # back to the beginning: more texts than there are, which cuts too much at worst
            for place in bits(last):
                if place >= before:
                    places.follow[place] |= first
        return nullable or node.least == 0, first, last

    def _add_seq(
        self, places: _Places, items: tuple[Node, ...], optional: list[bool]
    ) -> tuple[bool, int, int]:
        nullable, first, last = True, 0, 0
        for item, may_lack in zip(items, optional, strict=True):
            empty, begin, end = self._add(places, item)
            empty = empty or may_lack
            for place in bits(last):
                places.follow[place] |= begin
            first |= begin if nullable else 0
            last = end | (last if empty else 0)
            nullable = nullable and empty
        return nullable, first, last


class _TooLongError(Exception):
    pass


def _recursive(rules: Rules) -> set[str]:
    """The rules that lead to one which uses itself."""
    uses = {name: set(references(rule)) for name, rule in rules.items()}
    users: dict[str, list[str]] = {name: [] for name in rules}
    for name, used in uses.items():
        for other in used:
            users[other].append(name)
    # what is left when rules that use none, or only such ones, are taken away
    plain = [name for name in rules if not uses[name]]
    for name in plain:
        for user in users[name]:
            uses[user].discard(name)
            if not uses[user]:
                plain.append(user)
    return set(rules) - set(plain)
