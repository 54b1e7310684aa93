"""Markdown in a terminal while it is being written.

What is finished is printed once and never touched again; of what may still change only lines that
the window surely shows are drawn anew, and only from the first that differs. So nothing flickers,
and nothing is lost or printed twice. A block that outgrows the window shows its end until it is
whole.
"""

from typing import Any, ClassVar, TextIO

from markdown_it import MarkdownIt
from markdown_it.rules_inline import StateInline, newline
from markdown_it.token import Token
from rich.console import Console, ConsoleOptions, RenderResult
from rich.markdown import CodeBlock, Heading, Markdown
from rich.syntax import Syntax
from rich.text import Text

# Rich does not show raw HTML and references, so these stay the text that they are.
_PARSER = MarkdownIt(options_update={"html": False}).enable("strikethrough").enable("table")
_PARSER.disable(["reference", "html_block", "html_inline", "entity", "image"])


def _line_end(state: StateInline, silent: bool) -> bool:
    """A line end without what Markdown does to the next line's indentation: models write code
    without a fence."""
    after = state.pos + 1
    found = newline(state, silent)
    state.pos = after if found else state.pos
    return found


_PARSER.inline.ruler.at("newline", _line_end)


class _Code(CodeBlock):
    """Code without a margin, so that its lines can be printed one after another."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        code = str(self.text).removesuffix("\n")
        yield Syntax(code, self.lexer_name, theme="ansi_dark", word_wrap=True, padding=(0, 2))


class _Heading(Heading):
    """A heading at the left."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        text = self.text.copy()
        text.stylize("bold underline" if self.tag == "h1" else "bold")
        yield text


class _Markdown(Markdown):
    elements: ClassVar[Any] = {
        **Markdown.elements,
        "fence": _Code,
        "code_block": _Code,
        "heading_open": _Heading,
    }

    def __init__(self, tokens: list[Token]) -> None:
        super().__init__("", hyperlinks=False)
        self.parsed = tokens
        for token in self.parsed:
            for child in token.children or ():
                if child.type == "softbreak":  # a line that ends is meant to, in what models write
                    child.type = "hardbreak"


def _blocks(source: str) -> list[list[Token]]:
    """The tokens of each block."""
    blocks: list[list[Token]] = []
    for token in _PARSER.parse(source):
        if token.level == 0 and token.nesting >= 0:
            blocks.append([])
        blocks[-1].append(token)
    return blocks


def _split(source: str) -> tuple[str, str, str]:
    """What of a text is finished, what may still change, and what the latter begins with that
    stands in the former already (the head of a code block)."""
    blocks = _blocks(source)
    if not blocks:
        return "", source, ""
    last = blocks[-1][0]
    lines = source.splitlines(keepends=True)
    first = _start(last)
    if last.type in ("bullet_list_open", "ordered_list_open"):
        items = [t for t in blocks[-1] if t.type == "list_item_open" and t.level == 1 and t.map]
        first = max(first, _start(items[-1]))
    elif last.type == "fence" and last.map and len(lines) - last.map[0] > 2:
        closed = _PARSER.parse("".join(lines) + "x\n")[-1].type != "fence"
        end = len(lines) - 1
        while end > first + 1 and not lines[end - 1].strip():
            end -= 1  # blank lines at an end are not printed: they stay with what follows
        if not closed and end > first + 1:
            return "".join(lines[:end]), "".join(lines[end:]), lines[first]
    return "".join(lines[:first]), "".join(lines[first:]), ""


def _start(token: Token) -> int:
    return token.map[0] if token.map else 0


class MarkdownStream:
    """One answer on a terminal. `style` is that of all its text (thoughts are dim); with a style it
    is no Markdown."""

    def __init__(self, console: Console, file: TextIO, style: str = "") -> None:
        self._console = console
        self._file = file
        self._style = style
        self._source = ""  # of what is not printed for good
        self._drawn: list[str] = []  # lines at the end of the screen; the cursor is in the last
        self._gap = False  # a blank line comes before the next block
        self._head = ""  # of the code block that goes on
        self._ended = False  # the cursor is in a line that is printed for good

    def feed(self, piece: str) -> None:
        """Adds to the text; draw() shows it."""
        self._source += piece

    def draw(self, status: str = "") -> None:
        """Shows the text so far, and a line below it."""
        finished, rest, head = ("", self._source, "") if self._style else _split(self._source)
        if self._style and "\n" in self._source:
            finished, _, rest = self._source.rpartition("\n")
        lines = self._lines(finished) if finished.strip() else []
        if finished.strip():
            self._source = head + rest
            self._gap = not head and not self._continues(finished, rest)
            self._head = head
        live = self._lines(self._source) if rest.strip() else []
        height = max(1, self._console.height - 3)
        live = live[-height:]
        if status:
            live = [*live, *self._rendered(Text(status, style="dim"))[:1]]
        self._show(lines + live)
        self._drawn = self._drawn[len(lines) :]
        self._ended = (self._ended or bool(lines)) and not self._drawn

    def finish(self) -> None:
        """Shows all of the text, for good, and leaves the cursor on a new line."""
        lines = self._lines(self._source) if self._source.strip() else []
        self._source, self._head = "", ""
        self._show(lines)
        if lines or self._ended:
            self._file.write("\r\n")
            self._file.flush()
        self._drawn, self._ended = [], False

    def _continues(self, finished: str, rest: str) -> bool:
        """Whether the rest is an item of the list that was begun."""
        return _start(_blocks(finished + rest)[-1][0]) < finished.count("\n")

    def _lines(self, source: str) -> list[str]:
        if self._style:
            return self._rendered(Text(source.strip("\n"), style=self._style))
        lines: list[str] = []
        for tokens in _blocks(source):
            block = self._rendered(_Markdown(tokens))
            while block and not block[0].strip() and not self._head:
                del block[0]
            if block and (lines or (self._gap and not self._head)):
                lines.append("")
            lines += block
        return lines

    def _rendered(self, what: Any) -> list[str]:
        """Lines of text with colours, each narrower than the window."""
        width = max(2, self._console.width - 1)
        with self._console.capture() as capture:
            self._console.print(what, width=width, end="")
        lines = capture.get().split("\n")
        while lines and not lines[-1].strip():
            del lines[-1]
        return [line.rstrip(" ") for line in lines]

    def _show(self, lines: list[str]) -> None:
        """Makes the end of the screen these lines, by one write."""
        old = self._drawn
        same = 0
        while same < min(len(old), len(lines)) and old[same] == lines[same]:
            same += 1
        if same == len(old) == len(lines) or (self._ended and not lines):
            return
        same = min(same, max(0, len(lines) - 1))
        out = []
        if same < len(old):
            up = min(len(old) - 1 - same, self._console.height - 1)
            out.append("\r" + (f"\x1b[{up}A" if up else ""))
        elif old or self._ended:
            out.append("\r\n")
            self._ended = False
        out.append("\r\n".join(f"{line}\x1b[K" for line in lines[same:]))
        out.append("\x1b[J")
        self._file.write("".join(out))
        self._file.flush()
        self._drawn = lines
