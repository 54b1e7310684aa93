"""The loop of a chat: what is typed or piped in becomes commands and questions."""

import signal
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from ..engine.cancelling import Cancelled
from ..errors import MobileLLMError
from ..saying import can_draw, complain, note
from .commands import Ask, Edit, Leave, Next, carry_out, unquoted
from .storage import kept, recorded
from .talk import Talk
from .thinking import Thinking
from .view import PlainView, TerminalView, unseen_typing

if TYPE_CHECKING:
    from .terminal import Prompt


class Session:
    """Carries a talk on."""

    def __init__(self, talk: Talk, markdown: bool = True) -> None:
        self.talk = talk
        self._in_command = False
        self._typed = False  # whether a person types
        terminal = sys.stdout.isatty() and can_draw()
        self._view = TerminalView(sys.stdout, markdown) if terminal else PlainView(sys.stdout)

    def question(self, text: str, again: bool = False) -> bool:
        """Asks and shows the answer. False where there is none, which was said then. Raises
        Cancelled after Ctrl-C."""
        talk = self.talk
        thinking = Thinking(talk.begins_thinking()) if talk.has_template else None
        answering = talk.ask(text, again)
        if talk.store.trouble:
            self._trouble()
        try:
            self._view.show(answering, thinking, not talk.show_thinking)
        except BaseException as error:
            talk.failed()
            if isinstance(error, MobileLLMError):
                complain(error)
                return False
            raise
        thought, said = (thinking.thought, thinking.said) if thinking else ("", "")
        talk.finished(answering, thought, said)
        if dropped := talk.conversation.dropped:
            n = dropped // 2
            note(f"(the context was full: {n} question{'s' * (n > 1)} and answers have left it)")
        if answering.finish_reason == "length":
            limit = talk.settings["max_tokens"]
            full = talk.stats.made < limit
            why = "the context is full" if full else f"the limit of {limit} tokens is reached"
            option = "--ctx" if full else "/set max_tokens" if self._typed else "-n"
            note(f"(cut off: {why}; {option} changes it)")
        return True

    def _trouble(self) -> None:
        note(f"(this conversation cannot be kept: {self.talk.store.trouble})")
        self.talk.store.path = None

    def lines(self, lines: Iterable[str]) -> bool:
        """Takes each line for a question or a command. Whether all went well."""
        well = True
        for line in lines:
            text = line.rstrip("\n")
            try:
                following = self._understood(text)
                if isinstance(following, Edit):
                    following = None
                if isinstance(following, Leave):
                    return well
                if isinstance(following, Ask) and following.text:
                    well = self.question(following.text, following.again) and well
            except MobileLLMError as error:
                complain(error)
                well = False
        return well

    def _understood(self, text: str) -> Next:
        if text.startswith("/"):
            return carry_out(self.talk, text, note)
        return Ask(unquoted(text))

    def terminal(self, keep: bool) -> None:
        """Asks a person until that leaves. Ctrl-C ends a command or an answer, at a prompt it says
        how to leave, and in between it does nothing."""
        from .terminal import Prompt

        self._typed = True
        before = signal.signal(signal.SIGINT, self._interrupt)
        try:
            with unseen_typing():
                self._terminal(Prompt(self.talk, keep))
        finally:
            signal.signal(signal.SIGINT, before)

    def _interrupt(self, *_: object) -> None:
        if self._in_command:
            raise KeyboardInterrupt

    def _terminal(self, prompt: "Prompt") -> None:
        default, edits = "", False
        while True:
            try:
                self._wait_for_reader()
                text = prompt.ask(default)
            except KeyboardInterrupt:
                default, edits = "", False
                note("(Ctrl-D or /exit leaves)")
                continue
            except EOFError:
                return
            again, default, edits = edits, "", False
            try:
                following = self._broken_off(text)
                if isinstance(following, Leave):
                    return
                if isinstance(following, Edit):
                    default, edits = following.text, not self.talk.unanswered
                elif isinstance(following, Ask) and self._says_something(following):
                    self.question(following.text, following.again or again)
            except Cancelled:
                note("(stopped; the conversation is as it was, /regen asks again)")
            except MobileLLMError as error:
                complain(error)

    def _broken_off(self, text: str) -> Next:
        """What a text asks for; nothing after Ctrl-C."""
        try:
            self._in_command = True
            following = self._understood(text)
            self._in_command = False
            return following
        except KeyboardInterrupt:
            note("(stopped)")
            return None
        finally:
            self._in_command = False

    def _says_something(self, ask: Ask) -> bool:
        more = not self.talk.has_template and self.talk.turns  # a base model goes on
        return bool(ask.text or self.talk.attached or more)

    def _wait_for_reader(self) -> None:
        """Where answers go through a pipe to the same terminal (| tee), lets them arrive."""
        if isinstance(self._view, PlainView) and not sys.stdout.isatty():
            sys.stdout.flush()
            time.sleep(0.05)


def latest(model: str | None) -> Path | None:
    """The newest conversation, with that model where one is named."""
    for saved in kept():
        if model is None or saved.model == recorded(model):
            return saved.path
    return None
