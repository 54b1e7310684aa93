"""One session of the chat: the model, the conversation, its settings, and where it is kept.

What fails or is stopped leaves all of it as it was.
"""

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..engine.arguments import check_sampling, check_stop
from ..engine.conversation import Completion, Conversation
from ..engine.model import MobileLLM
from ..engine.structured import pop_form
from .answering import Answering, Stats
from .storage import ChatError, Saved, Store, read, recorded, write
from .thinking import BEGIN

FORMS = ("schema", "grammar", "regex", "lark")  # of an answer, at most one of them
DEMO_TEMPERATURE = 0.0  # what the demo model was made for
Load = Callable[[str | None], MobileLLM]


class Talk:
    """What a session knows. load gives the model of a name; settings are arguments of
    MobileLLM.stream, and keep tells whether conversations are written to disk."""

    def __init__(
        self,
        load: Load,
        model: str | None,
        *,
        system: str = "",
        settings: dict[str, Any],
        keep: bool = False,
    ) -> None:
        self.load = load
        self.model = model
        self.settings = settings
        self.keep = keep
        self.show_thinking = True
        self.stats = Stats()
        self.lora: list[tuple[str, float]] = []
        self.attached: list[tuple[str, str]] = []  # names and texts of files for the next question
        self.unanswered = ""  # a question that was stopped, or that a crash left without an answer
        self.system = system
        self.llm = load(model)
        self._begin([])
        self.store = self._new_store()

    # The conversation

    def _begin(self, turns: list[Any]) -> None:
        """A conversation with the model as it is now."""
        # a file without a template is a base model: it continues texts
        kind = Conversation if self.has_template else Completion
        self.conversation = kind(self.llm, self.system if self.has_template else None)
        self.conversation.turns = turns
        self._apply()

    def _apply(self) -> None:
        talk, settings = self.conversation, dict(self.settings)
        talk.max_tokens = settings.pop("max_tokens")
        if self.model is None:
            settings.setdefault("temperature", DEMO_TEMPERATURE)
        if "schema" in settings:
            settings["json_schema"] = settings.pop("schema")
        talk.sampling = settings  # type: ignore[assignment]  # by the names of the table

    @property
    def has_template(self) -> bool:
        return bool(self.llm.metadata.get("tokenizer.chat_template"))

    def begins_thinking(self) -> bool:
        """Whether the template has the model begin with its thoughts."""
        prompt: str = self.llm._template(messages=[{"role": "user", "content": "?"}]).prompt
        return prompt.rstrip().endswith(BEGIN)

    @property
    def name(self) -> str:
        """The model's, short."""
        return "demo" if self.model is None else os.path.basename(self.model.rstrip("/"))

    @property
    def turns(self) -> list[Any]:
        return self.conversation.turns

    def _new_store(self) -> Store:
        store = Store.new() if self.keep else Store(None)
        store.add({"model": recorded(self.model)}, later=True)
        if self.system:
            store.add({"role": "system", "content": self.system}, later=True)
        return store

    def ask(self, text: str, again: bool = False) -> Answering:
        """Asks, again in the place of the last question; iterate the answer, then say finished()
        or failed(). A base model goes on with its last text where the new one is empty."""
        self._before = self.turns
        self._replaces = again or not text
        files = [content for _, content in self.attached]
        text = "\n\n".join([*files, *([text] if text else [])])
        if self._replaces:
            self.store.take_back(later=True)
        if again:
            self.conversation.turns = self.turns[:-2]
        self._question = text or self._before[-2]["content"]
        self.store.add({"role": "user", "content": self._question})
        return Answering(self.conversation, text)

    def finished(self, answering: Answering, thinking: str, said: str) -> None:
        """Keeps an answer. What was thought is no part of the conversation."""
        self.stats = answering.stats
        self.attached, self.unanswered = [], ""
        entry = {"role": "assistant", "content": self.turns[-1]["content"]}
        if thinking:
            self.turns[-1] = {"role": "assistant", "content": said.strip()}
            entry = {"role": "assistant", "thinking": thinking, "content": said.strip()}
        self.store.add(entry)

    def failed(self) -> None:
        """Everything is as it was before the question."""
        self.conversation.turns = self._before
        self.attached = []
        self.store.take_back()
        if not self._replaces:
            self.unanswered = self._question
        else:
            self.store.add(*self._before[-2:])

    def undo(self) -> str:
        """Takes the last question and its answer back. Gives the question."""
        if not self.turns:
            raise ChatError("there is no question to take back")
        self.unanswered = ""
        question: str = self.turns[-2]["content"]
        self.conversation.turns = self.turns[:-2]
        self.store.take_back()
        return question

    def clear(self) -> None:
        """A new conversation; the one so far stays where it is kept."""
        self.conversation.reset()
        self.attached, self.unanswered = [], ""
        self.stats = Stats()
        self.store.release()
        self.store = self._new_store()

    def set_system(self, text: str) -> None:
        """Instructions from now on; none where text is empty."""
        if not self.has_template:
            raise ChatError(f"{self.name} is a base model: it knows no instructions")
        self.system = text
        message = [{"role": "system", "content": text}]
        self.conversation.system = message if text else []  # type: ignore[assignment]
        self.store.add({"role": "system", "content": text}, later=not self.turns)

    # Settings

    def set(self, name: str, value: Any) -> None:
        """Changes a setting; None is what the model does without it. Raises ModelError."""
        settings = {key: kept for key, kept in self.settings.items() if key != name}
        if name in FORMS:
            settings = {key: kept for key, kept in settings.items() if key not in FORMS}
        if value is not None:
            if name in FORMS:
                form = {"json_schema" if name == "schema" else name: value}
                self.llm._constraint(pop_form(form))
            elif name == "stop":
                check_stop(value)
            else:
                check_sampling(**{name: value})
            settings[name] = value
        self.settings = settings
        self._apply()

    # Files and models

    def attach(self, path: Path) -> str:
        """A file for the next question. Gives its text."""
        try:
            text = path.read_bytes().decode("utf-8", "replace")
        except OSError as error:
            raise ChatError(f"{path}: {error.strerror}") from None
        if "\0" in text:
            raise ChatError(f"{path} is not a text file")
        self.attached.append((path.name, text))
        return text

    def switch(self, model: str | None) -> None:
        """Goes on with another model."""
        llm = self.load(model)
        self.llm.close()
        self.llm, self.model, self.lora = llm, model, []
        self.stats = Stats()
        self._begin(self.turns)
        self.store.add({"model": recorded(model)}, later=True)

    def adapt(self, lora: list[tuple[str, float]]) -> None:
        """Takes these adapters and no others."""
        self.llm.set_lora(lora)
        self.lora = lora

    def _copy(self, saved: Saved) -> Store:
        """A conversation in a file of its own, which is written with the next question."""
        store = Store.new()
        store.copied = True
        entries: list[Any] = [{"model": saved.model or recorded(self.model)}]
        if saved.system:
            entries.append({"role": "system", "content": saved.system})
        entries += saved.turns
        if saved.unanswered:
            entries.append({"role": "user", "content": saved.unanswered})
        store.add(*entries, later=True)
        return store

    def save(self, path: Path) -> None:
        """Writes the conversation to a file, in the place of an earlier one. Raises ChatError where
        something else is there."""
        if path.exists():
            read(path)
        entries: list[Any] = [{"model": recorded(self.model)}]
        if self.system:
            entries.append({"role": "system", "content": self.system})
        part = path.with_name(f".{path.name}.{os.getpid()}")  # a full disk leaves the earlier one
        try:
            write(part, [*entries, *self.turns])
            part.replace(path)
        except OSError as error:
            with contextlib.suppress(OSError):
                part.unlink()
            raise ChatError(f"{path}: {error.strerror}") from None

    def resume(self, path: Path) -> Saved:
        """Goes on with a conversation; what comes is added to its file, or to a copy where another
        chat goes on with it."""
        read(path)
        self.store.release()
        store = Store(path if self.keep else None)
        alone = store.hold()
        saved = read(path)  # as it is from now on
        self.conversation.turns = list(saved.turns)
        self.stats = Stats()
        self.attached, self.unanswered = [], saved.unanswered
        if self.has_template:
            self.system = saved.system
            message = [{"role": "system", "content": saved.system}]
            self.conversation.system = message if saved.system else []  # type: ignore[assignment]
        store.n_turns = len(saved.turns) + bool(saved.unanswered)
        self.store = store if alone else self._copy(saved)
        if saved.unanswered:
            self.store.take_back(later=True)
        return saved
