"""A conversation that never outgrows the context: the oldest turns go, the system prompt stays."""

from collections.abc import Iterator
from typing import Any

from .errors import ModelError
from .model import Message, MobileLLM


class Conversation:
    """What was said so far with one model.

    system: the instructions at the top, if any.
    max_tokens: the longest answer; a quarter of the context at least is kept free for it.
    sampling: further arguments of MobileLLM.stream.
    """

    def __init__(
        self, llm: MobileLLM, system: str | None = None, max_tokens: int = 512, **sampling: Any
    ) -> None:
        self.llm = llm
        self.max_tokens = max_tokens
        self.sampling = sampling
        self.system: list[Message] = [{"role": "system", "content": system}] if system else []
        self.turns: list[Message] = []  # user and assistant in turn

    def answer(self, text: str) -> Iterator[str]:
        """Yields the answer to text in pieces. What was yielded becomes part of the conversation,
        also when the caller stops early. Raises ModelError when text alone overfills the context;
        the conversation is then as before."""
        turns = self._fitting([*self.turns, {"role": "user", "content": text}])
        pieces = self.llm.stream(
            [*self.system, *turns], max_tokens=self.max_tokens, **self.sampling
        )
        said = ""
        try:
            for piece in pieces:
                said += piece
                yield piece
        finally:
            self.turns = [*turns, {"role": "assistant", "content": said.strip()}]

    def reset(self) -> None:
        """Forgets all turns; the system prompt stays."""
        self.turns = []

    def _fitting(self, turns: list[Message]) -> list[Message]:
        """turns without the oldest ones, so that the prompt leaves room for an answer."""
        n_ctx = self.llm.n_ctx()
        room = min(self.max_tokens, n_ctx // 4)
        while True:
            n = len(self.llm.chat_tokens([*self.system, *turns]))
            if n + room <= n_ctx:
                return turns
            if len(turns) == 1:
                raise ModelError(
                    f"this message makes a prompt of {n} tokens; with {room} kept for the answer, "
                    f"the context holds {n_ctx}"
                )
            turns = turns[2:]
