"""A conversation that never outgrows the context: the oldest turns go, the system prompt stays.

An answer that fails, in reading its question or later, leaves the conversation as it was.
"""

from collections.abc import Callable, Generator

from typing_extensions import Unpack

from ..errors import ContextError
from .answers import Stream
from .messages import Message
from .model import MobileLLM
from .sampling_types import Choice

Pieces = Generator[str, None, None]
Watch = Callable[[int], None]  # gets the tokens of the prompt that were read so far


class Conversation:
    """What was said so far with one model.

    system: the instructions at the top, if any.
    max_tokens: the longest answer; room for it, at most a quarter of the context, is kept free.
    sampling: further arguments of MobileLLM.stream.

    Of the last answer it knows its stream (finish_reason and usage), how many tokens of its prompt
    were known from before (reused), and how many turns left the context for it (dropped).
    """

    def __init__(
        self,
        llm: MobileLLM,
        system: str | None = None,
        max_tokens: int = 512,
        **sampling: Unpack[Choice],
    ) -> None:
        self.llm = llm
        self.max_tokens = max_tokens
        self.sampling = sampling
        self.system: list[Message] = [{"role": "system", "content": system}] if system else []
        self.turns: list[Message] = []  # user and assistant in turn
        self.stream: Stream | None = None
        self.reused = self.dropped = 0
        self._sequence = llm._sequences.open([])  # keeps what was computed of them

    def answer(self, text: str, watch: Watch | None = None) -> Pieces:
        """Yields the answer to text in pieces. What was yielded becomes part of the conversation,
        also when the caller stops early. Raises ModelError when text alone overfills the context;
        the conversation is then as before.

        watch is called before each step of computing, with the tokens of the prompt that the model
        has read so far."""
        turns = self._fitting([*self.turns, {"role": "user", "content": text}])
        self.dropped = len(self.turns) + 1 - len(turns)
        yield from self._answer(turns, [*self.system, *turns], watch)

    def _answer(
        self,
        turns: list[Message],
        prompt: str | list[Message],
        watch: Watch | None,
        before: str = "",
    ) -> Pieces:
        settings = {"max_tokens": self.max_tokens, **self.sampling}
        self.stream = self.llm._stream(prompt, settings, self._sequence)
        self.reused = self._sequence.state.done
        self._sequence.state.watch = watch
        said, whole = "", False
        try:
            for piece in self.stream:
                said += piece
                yield piece
            whole = True
        except GeneratorExit:
            whole = bool(said)
            raise
        finally:
            self.stream.close()
            self._sequence.state.watch = None
            if whole:
                self.turns = [*turns, {"role": "assistant", "content": self._kept(before + said)}]

    @staticmethod
    def _kept(said: str) -> str:
        return said.strip()

    def reset(self) -> None:
        """Forgets all turns; the system prompt stays."""
        self.turns = []

    def size(self) -> int:
        """Tokens of all that was said."""
        return self._size(self.turns) if self.turns or self.system else 0

    def _fitting(self, turns: list[Message]) -> list[Message]:
        """turns; when they leave too little room for an answer, the newest that fill at most half
        of the context, so that the next questions find their beginning in the KV cache."""
        n_ctx = self.llm.n_ctx()
        room = min(self.max_tokens, n_ctx // 4)
        n = self._size(turns)
        if n + room <= n_ctx:
            return turns
        too_old, first = 0, len(turns) // 2  # pairs of turns that leave: too few, and enough
        while too_old + 1 < first:
            middle = (too_old + first) // 2
            if self._size(turns[2 * middle :]) <= n_ctx // 2:
                first = middle
            else:
                too_old = middle
        turns = turns[2 * first :]
        n = self._size(turns)
        if n + room > n_ctx:
            raise ContextError(
                f"this message makes a prompt of {n} tokens; with {room} kept for the answer, "
                f"the context holds {n_ctx}"
            )
        return turns

    def _size(self, turns: list[Message]) -> int:
        return len(self.llm.chat_tokens([*self.system, *turns]))


class Completion(Conversation):
    """What a base model makes of texts: each is continued by itself, and an empty one goes on with
    the last, after what was added to it."""

    def answer(self, text: str, watch: Watch | None = None) -> Pieces:
        """Yields the continuation of text in pieces, as Conversation does its answers."""
        turns, before = self.turns, ""
        if turns and not text:
            text, before = turns[-2]["content"], turns[-1]["content"]
            turns = turns[:-2]
        turns = [*turns, {"role": "user", "content": text}]
        yield from self._answer(turns, text + before, watch, before)

    @staticmethod
    def _kept(said: str) -> str:
        return said

    def size(self) -> int:
        """Tokens of the last text with its continuation."""
        text = "".join(turn["content"] for turn in self.turns[-2:])
        return len(self.llm.tokenize(text.encode("utf-8", "surrogatepass"))) if text else 0
