"""Chat templates of strangers: they see what transformers shows them, and end within bounds.

A template is a program in a file that was downloaded. Jinja's sandbox keeps it from the machine,
not from the clock and the memory: `range` in `range`, a text that is joined to itself, 'a' * 10**9.
So every operation whose work can grow is counted before it is carried out, and the few that cannot
be bounded beforehand (padding, formatting with widths) are not there. What is counted is characters
that are read or written, and STEP for a call, a turn of a loop or an item of a list.
"""

import json
import re
import threading
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer
from markupsafe import Markup

from ..errors import ModelError

MAX_SOURCE = 1 << 17  # characters of a template; the longest published ones have some 20,000
MAX_NODES = 10_000  # of its syntax tree; the largest published one has 1,300
MAX_WORK = 200_000_000  # of one rendering: some seconds, and 500 MB at the worst
MAX_TEXT = 1 << 22  # characters of any text
MAX_BITS = 1 << 10  # of any number
STEP, ITEM = 200, 100

# Filters that do not go through their value, go through it, and look into its parts.
_FREE = "abs attr count d default first length round".split()  # noqa: SIM905
_SHALLOW = """float int items last list map reject rejectattr select selectattr
""".split()  # noqa: SIM905
_DEEP = """capitalize dictsort format groupby indent join lower max min replace reverse safe sort
string sum title tojson trim unique upper wordcount""".split()  # noqa: SIM905
_METHODS = """bit_length capitalize copy count endswith find format get index is_integer isalnum
isalpha isdecimal isdigit islower isnumeric isspace istitle isupper items join keys lower lstrip
partition removeprefix removesuffix replace rfind rindex rpartition rsplit rstrip split splitlines
startswith strip swapcase title upper values""".split()  # noqa: SIM905

# What pads in '...' % values and '...'.format(values), or looks into them.
_WIDTHS = {"%": re.compile(r"%[^%a-zA-Z]*(\d{3}|\*)"), "format": re.compile(r"\{[^{}]*[:.\[!]")}


class _Limit(Exception):
    """A template went beyond a bound."""


def _reason(error: Exception) -> str:
    """One line that says what happened, whatever it was."""
    return " ".join(str(error).split()) or type(error).__name__


def _reading(value: Any, per_text: int = 16) -> int:
    """What it costs to read a value: ITEM for each part, each as often as it would be written out
    (a list of twice the same list counts twice), and one for so many characters of a text. Stops
    at what no rendering may spend."""
    total, todo = 0, [value]
    while todo and total <= MAX_WORK:
        item = todo.pop()
        if isinstance(item, (str, bytes)):
            total += len(item) // per_text
        elif isinstance(item, Mapping):
            todo.extend(item.keys())
            todo.extend(item.values())
        elif isinstance(item, (list, tuple, set, frozenset)):
            todo.extend(item)
        total += ITEM
    return total


def _writing(value: Any) -> int:
    """What it costs to write a value out."""
    return _reading(value, 1)


def _size(value: Any) -> int:
    """What it costs to go through a value without looking into its parts."""
    if isinstance(value, (str, bytes)):
        return len(value) // 16
    return ITEM * len(value) if hasattr(value, "__len__") else ITEM


class _Counted(NodeTransformer):
    """Rewrites a template so that what Jinja compiles to bare Python is counted, too."""

    def _filter(self, node: Any, name: str, *arguments: Any) -> nodes.Filter:
        constants: list[nodes.Expr] = [nodes.Const(argument) for argument in arguments]
        return nodes.Filter(node, name, constants, [], None, None, lineno=node.lineno)

    def visit_Concat(self, node: nodes.Concat) -> nodes.Filter:
        self.generic_visit(node)
        return self._filter(nodes.List(node.nodes, lineno=node.lineno), "_concat")

    def _built(self, node: Any) -> Any:
        self.generic_visit(node)
        stored = isinstance(node, nodes.Tuple) and node.ctx != "load"
        return node if stored else self._filter(node, "_seen")

    visit_List = visit_Tuple = visit_Dict = _built

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        if isinstance(node.arg, nodes.Slice):
            node.node = self._filter(node.node, "_cut")
        return node

    def visit_Compare(self, node: nodes.Compare) -> nodes.Compare:
        self.generic_visit(node)
        node.expr = self._filter(node.expr, "_seen")
        for operand in node.ops:
            operand.expr = self._filter(operand.expr, "_seen")
        return node

    def visit_For(self, node: nodes.For) -> Any:
        node.iter = self._filter(node.iter, "_each")
        return self._body(node)

    def _body(self, node: Any) -> Any:
        self.generic_visit(node)
        characters = sum(len(data.data) for data in node.find_all(nodes.TemplateData))
        spent = self._filter(nodes.Const(STEP + characters, lineno=node.lineno), "_spend")
        node.body.insert(0, nodes.ExprStmt(spent, lineno=node.lineno))
        return node

    visit_Macro = visit_CallBlock = visit_Block = _body


class _Generation(Extension):
    """{% generation %} of transformers, which marks the model's own words: passed over."""

    tags = {"generation"}

    def parse(self, parser: Any) -> Any:
        parser.stream.skip(1)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Environment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox with a budget for the thread's rendering."""

    intercepted_binops = frozenset(ImmutableSandboxedEnvironment.default_binop_table)

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, jinja2.ext.loopcontrols],
            optimized=False,  # nothing is computed while compiling
            finalize=jinja2.pass_context(lambda context, value: self._shown(value)),
        )
        self._thread = threading.local()
        del self.globals["lipsum"]
        self._plain = {**self.filters, "tojson": self._json}
        self.filters.clear()
        for name in _FREE:
            self.filters[name] = self._wrapped(name, lambda value: 0)
        for name in _SHALLOW:
            self.filters[name] = self._wrapped(name, _size)
        for name in _DEEP:
            self.filters[name] = self._wrapped(name, _reading)
        own: dict[str, Callable[..., Any]] = {
            "_concat": self._concat,
            "_seen": self._seen,
            "_cut": self._cut,
            "_each": self._each,
            "_spend": self.spend,
        }
        for name, function in own.items():
            self.filters[name] = self._with_context(function)
        for name, test in list(self.tests.items()):
            self.tests[name] = self._counted_test(test)

    def begin(self) -> None:
        self._thread.left = MAX_WORK

    def spend(self, n: int) -> None:
        self._thread.left -= n
        if self._thread.left < 0:
            raise _Limit("it does too much")

    def write(self, n: int) -> None:
        """Spends what a text of n characters costs, or a list of as many characters' memory."""
        if n > MAX_TEXT:
            raise _Limit(f"it makes {n} characters at once")
        self.spend(n // 2)

    @staticmethod
    def _with_context(function: Callable[..., Any]) -> Callable[..., Any]:
        # which Jinja does not call while compiling
        return jinja2.pass_context(lambda context, *arguments: function(*arguments))

    def _wrapped(self, name: str, weight: Callable[[Any], int]) -> Callable[..., Any]:
        function = self._plain[name]
        passes = getattr(function, "jinja_pass_arg", None)

        @jinja2.pass_context
        def counted(context: Any, value: Any, *arguments: Any, **keywords: Any) -> Any:
            if weight is _reading and isinstance(value, (types.GeneratorType, map, filter)):
                value = list(value)
            self.spend(STEP + weight(value) + _reading(arguments) + _reading(keywords))
            self._beforehand("%" if name == "format" else name, value, arguments, keywords)
            first = {"context": context, "eval_context": context.eval_ctx, "environment": self}
            lead = [] if passes is None else [first[passes.name]]
            return function(*lead, value, *arguments, **keywords)

        return counted

    def _counted_test(self, test: Any) -> Callable[..., Any]:
        passes = getattr(test, "jinja_pass_arg", None)

        @jinja2.pass_context
        def counted(context: Any, value: Any, *arguments: Any) -> Any:
            self.spend(_reading(value) + _reading(arguments))
            return test(*([] if passes is None else [self]), value, *arguments)

        return counted

    def _beforehand(self, name: str, value: Any, arguments: Any, keywords: Any) -> None:
        """Counts what filters and methods write that multiply texts."""
        given = list(arguments) + list(keywords.values())
        if name == "replace" and len(given) >= 2:
            old, new = str(given[0]), str(given[1])
            text = str(value)
            self.write(len(text) + text.count(old) * len(new))
        elif name == "join":
            separators = sum(len(item) for item in given if isinstance(item, str))
            items = [value] if isinstance(value, str) else [value, *arguments]
            count = max(len(item) for item in items if hasattr(item, "__len__"))
            self.write(separators * count + (len(value) * count if isinstance(value, str) else 0))
        elif name == "indent":
            width = max(
                [4, *(n for n in given if isinstance(n, int))]
                + [len(text) for text in given if isinstance(text, str)]
            )
            self.write(len(value) + width * (str(value).count("\n") + 1))
        elif name in ("format", "%"):
            if _WIDTHS[name].search(str(value)):
                raise _Limit("it formats with widths or parts of values")
            places = str(value).count("{" if name == "format" else "%")
            self.write(len(value) + places * _writing(given))
        elif name == "round" and any(isinstance(n, int) and abs(n) > 100 for n in given):
            raise _Limit("it rounds to more than 100 digits")

    def _json(
        self,
        value: Any,
        ensure_ascii: bool = False,
        indent: int | str | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        """JSON as transformers writes it in chat templates."""
        width = len(indent) if isinstance(indent, str) else indent
        if width is not None and width > 16:
            raise _Limit("it indents JSON by more than 16")
        encoder = json.JSONEncoder(
            ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )
        pieces = []
        for piece in encoder.iterencode(value):
            self.spend(len(piece))
            pieces.append(piece)
        return "".join(pieces)

    def _seen(self, value: Any) -> Any:
        containers = (str, bytes, list, tuple, dict)
        self.spend(_reading(value) if isinstance(value, containers) else ITEM)
        return value

    def _shown(self, value: Any) -> Any:
        self.spend(STEP)
        self.write(_writing(value))
        return value

    def _cut(self, value: Any) -> Any:
        self.spend(ITEM + (len(value) if hasattr(value, "__len__") else 0) // 16)
        return value

    def _concat(self, values: Sequence[Any]) -> str:
        self.write(_writing(values))
        return "".join(map(str, values))

    def _each(self, values: Iterable[Any]) -> Iterable[Any]:
        if hasattr(values, "__len__"):
            self.spend(_size(values))
            return values
        return self._counted_items(values)

    def _counted_items(self, values: Iterable[Any]) -> Iterator[Any]:
        for value in values:
            self.spend(ITEM)
            yield value

    @staticmethod
    def _bulk(value: Any) -> int:
        return len(value) * (1 if isinstance(value, (str, bytes)) else 16)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        self.spend(ITEM)
        sized = [value for value in (left, right) if hasattr(value, "__len__")]
        if operator == "%" and isinstance(left, (str, bytes)):
            self._beforehand("%", left, [right], {})
        elif operator == "*" and sized:
            times = right if sized[0] is left else left
            self.write(
                self._bulk(sized[0]) * (times if isinstance(times, int) and times > 0 else 1)
            )
        elif sized:
            escaped = 6 if any(isinstance(value, Markup) for value in sized) else 1  # &#34;
            self.write(escaped * sum(map(self._bulk, sized)))
        elif operator in ("*", "**") and isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length()
            bits = bits + right.bit_length() if operator == "*" else bits * abs(right)
            if bits > MAX_BITS:
                raise _Limit(f"it computes a number of {bits} bits")
        return super().call_binop(context, operator, left, right)

    def call(self, context: Any, function: Any, *arguments: Any, **keywords: Any) -> Any:
        self.spend(STEP + _reading(arguments) + _reading(keywords))
        name = getattr(function, "__name__", "")
        owner: Any = getattr(function, "__self__", None)
        if name == "format" and hasattr(function, "__wrapped__"):  # the sandbox's own
            owner = function.__wrapped__.__self__
        plain = isinstance(owner, (str, bytes, list, tuple, dict, int, float))
        if plain and name not in _METHODS:
            raise _Limit(f"it calls {name}, which templates may not")
        if plain and hasattr(owner, "__len__"):
            self.spend(len(owner) if "split" in name else _size(owner))
            self._beforehand(name, owner, arguments, keywords)
        return super().call(context, function, *arguments, **keywords)

    def compiled(self, source: str) -> jinja2.Template:
        tree = self.parse(source)
        n_nodes = sum(1 for _ in tree.find_all(nodes.Node))
        if n_nodes > MAX_NODES:
            raise _Limit(f"it has {n_nodes} parts, more than {MAX_NODES}")
        tree = _Counted().visit(tree)
        tree.set_environment(self)
        return jinja2.Template.from_code(self, self.compile(tree), self.make_globals(None))


_environment = _Environment()


def _raise_exception(message: Any) -> None:
    raise ValueError(message)


def _strftime_now(pattern: str) -> str:
    if len(pattern) > 200 or re.search(r"\d", pattern):
        raise _Limit("it writes the date with widths")
    return datetime.now().strftime(pattern)


class ChatTemplate:
    """A chat template, compiled when it is first used."""

    def __init__(self, source: str, bos_token: str = "", eos_token: str = "") -> None:
        self.source = source
        self._tokens = {"bos_token": bos_token, "eos_token": eos_token}
        self._template: jinja2.Template | None = None

    def render(self, messages: Sequence[Mapping[str, Any]], **variables: Any) -> str:
        """The prompt for an answer to messages. variables: what else the template may see, such as
        tools, beside what transformers gives it. Raises ModelError, with the reason, where the
        template fails, does not compile, or does more than MAX_WORK."""
        known: dict[str, Any] = {
            "add_generation_prompt": True,
            "functions": None,
            "function_call": None,
            "tools": None,
            "tool_choice": None,
            **self._tokens,
            **variables,
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
        }
        try:
            if len(self.source) > MAX_SOURCE:
                raise _Limit(f"it has {len(self.source)} characters, more than {MAX_SOURCE}")
            if self._template is None:
                self._template = _environment.compiled(self.source)
            _environment.begin()
            return self._template.render(messages=list(messages), **known)
        except Exception as error:  # templates are programs of strangers
            raise ModelError(f"the chat template of this file fails: {_reason(error)}") from error
