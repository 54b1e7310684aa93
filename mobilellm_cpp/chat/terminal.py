"""Where a person types: editing, history, completion and the line below the prompt."""

import os
import sys
from collections.abc import Iterable

from prompt_toolkit import PromptSession
from prompt_toolkit.application import get_app
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.filters import Condition, has_focus
from prompt_toolkit.formatted_text import FormattedText
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.output import create_output
from prompt_toolkit.styles import Style

from .commands import COMMANDS
from .storage import folder
from .talk import Talk

STYLE = Style.from_dict({"bottom-toolbar": "noreverse fg:ansibrightblack"})


class _History(FileHistory):
    """What was typed, in a file that only its owner reads; where it cannot be kept, of this session
    alone."""

    def store_string(self, string: str) -> None:
        try:
            folder().mkdir(parents=True, exist_ok=True)
            os.close(os.open(self.filename, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o600))
            super().store_string(string)
        except OSError:
            pass

    def load_history_strings(self) -> Iterable[str]:
        try:
            return super().load_history_strings()
        except OSError:
            return []


class _Completer(Completer):
    """Commands, and what may stand behind them."""

    def __init__(self, talk: Talk) -> None:
        self._talk = talk
        self._files = PathCompleter(expanduser=True)

    def get_completions(self, document: Document, event: CompleteEvent) -> Iterable[Completion]:
        text = document.text_before_cursor
        if not text.startswith("/") or "\n" in text:
            return
        name, space, rest = text[1:].partition(" ")
        if not space:
            for word, command in COMMANDS.items():
                if word.startswith(name):
                    yield Completion(f"/{word}", -len(text), display_meta=command.help)
            return
        if name not in COMMANDS:
            return
        command = COMMANDS[name]
        for word in command.completions(self._talk) if command.completions else ():
            if word.startswith(rest):
                yield Completion(word, -len(rest))
        if command.files:
            yield from self._files.get_completions(Document(rest, len(rest)), event)


def unfinished(text: str) -> bool:
    """Whether a text wants another line: three quotes are open, or a line ends in a backslash."""
    return text.count('"""') % 2 == 1 or text.endswith("\\")


def _keys() -> KeyBindings:
    keys = KeyBindings()
    typing = has_focus("DEFAULT_BUFFER")

    @keys.add("enter", filter=typing)
    def _(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.complete_state and buffer.complete_state.current_completion:
            buffer.complete_state = None  # takes the completion, and no more
        elif unfinished(buffer.text) and buffer.document.is_cursor_at_the_end:
            buffer.newline(copy_margin=False)
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter", filter=typing)
    @keys.add("escape", "c-j", filter=typing)
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.newline(copy_margin=False)

    return keys


class Prompt:
    """Asks a person. Everything but answers is drawn on stderr where stdout is no terminal, so that
    `| tee` gets the answers alone."""

    def __init__(self, talk: Talk, keep: bool) -> None:
        self._talk = talk
        history: History = _History(str(folder() / "history")) if keep else InMemoryHistory()
        self._session: PromptSession[str] = PromptSession(
            history=history,
            completer=_Completer(talk),
            complete_while_typing=Condition(lambda: get_app().current_buffer.text[:1] == "/"),
            key_bindings=_keys(),
            multiline=True,
            prompt_continuation="… ",
            bottom_toolbar=self._toolbar,
            enable_open_in_editor=True,
            enable_suspend=True,
            tempfile_suffix=".md",
            style=STYLE,
            output=create_output(stdout=sys.stdout if sys.stdout.isatty() else sys.stderr),
        )
        self._size = 0

    def ask(self, default: str = "") -> str:
        """What the person types. Raises KeyboardInterrupt and EOFError."""
        talk = self._talk  # of a full context the next question drops the oldest turns
        self._size = min(talk.conversation.size(), talk.llm.n_ctx())
        text = self._session.prompt("> ", default=default)
        return text.replace("\\\n", "\n")

    def _toolbar(self) -> FormattedText:
        talk = self._talk
        parts = [talk.name, f"context {self._size:,} of {talk.llm.n_ctx():,}"]
        if talk.stats.made:
            parts.append(f"{talk.stats.speed:.0f} tokens/s")
        parts += [f"with {name}" for name, _ in talk.attached]
        if not talk.has_template:
            parts.append("completion")
        return FormattedText([("class:bottom-toolbar", " · ".join(parts))])
