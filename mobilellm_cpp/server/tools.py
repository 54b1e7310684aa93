"""Tools in answers that are streamed: texts as they come, calls whole (see engine/tools.py)."""

from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from ..engine import tools as engine
from ..engine.tools import plain, start
from ..errors import ModelError
from .errors import ApiError

__all__ = ["News", "Offer", "decided", "plain", "start"]

# the number of a choice and a piece of its text, or a tool call; None: it has ended
News = AsyncIterator[tuple[int, Any]]


class Offer(engine.Offer):
    """engine.tools.Offer, for requests."""

    def __init__(self, tools: Sequence[Mapping[str, Any]], choice: str, template: str) -> None:
        try:
            super().__init__(tools, choice, template)
        except ModelError as error:
            raise ApiError(400, str(error), param="tool_choice") from None


async def decided(offer: Offer, news: News) -> News:
    """Texts as they come once they are known to be none of a call; calls whole."""
    held: dict[int, str] = {}
    texts: set[int] = set()
    async for number, piece in news:
        if number in texts:
            yield number, piece
        elif piece is not None:
            held[number] = held.get(number, "") + piece
            if offer.is_call(held[number]) is False:
                texts.add(number)
                yield number, held[number].lstrip(" ")
        else:
            if text := held.get(number):
                yield number, offer.called(text) or text.lstrip(" ")
            yield number, None
