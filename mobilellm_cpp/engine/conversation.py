"""A conversation that never outgrows the context: the oldest turns go, the system prompt stays."""

from collections.abc import Iterator

from typing_extensions import Unpack

from ..errors import ModelError
from .model import Message, MobileLLM
from .sampling_types import Choice


class Conversation:
    """What was said so far with one model.

    system: the instructions at the top, if any.
    max_tokens: the longest answer; room for it, at most a quarter of the context, is kept free.
    sampling: further arguments of MobileLLM.stream.
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
        self._sequence = llm._sequences.open([])  # keeps what was computed of them

    def answer(self, text: str) -> Iterator[str]:
        """Yields the answer to text in pieces. What was yielded becomes part of the conversation,
        also when the caller stops early. Raises ModelError when text alone overfills the context;
        the conversation is then as before."""
        turns = self._fitting([*self.turns, {"role": "user", "content": text}])
        pieces = self.llm._stream(
            [*self.system, *turns],
            {"max_tokens": self.max_tokens, **self.sampling},
            self._sequence,
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
        """turns; when they leave too little room for an answer, the newest that fill at most half
        of the context, so that the next questions find their beginning in the KV cache."""
        n_ctx = self.llm.n_ctx()
        room = min(self.max_tokens, n_ctx // 4)
        n = len(self.llm.chat_tokens([*self.system, *turns]))
        if n + room <= n_ctx:
            return turns
        while n > n_ctx // 2 and len(turns) > 1:
            turns = turns[2:]
            n = len(self.llm.chat_tokens([*self.system, *turns]))
        if n + room > n_ctx:
            raise ModelError(
                f"this message makes a prompt of {n} tokens; with {room} kept for the answer, "
                f"the context holds {n_ctx}"
            )
        return turns
