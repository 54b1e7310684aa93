"""Log probabilities, told with the text that they belong to."""

from collections.abc import Sequence

from ..engine.answers import LogProb, Stream


class Records:
    """Those of several streams. without_space: the text lacks the spaces at its beginning."""

    def __init__(self, streams: Sequence[Stream], without_space: bool) -> None:
        self._streams = streams
        self._without_space = without_space
        self._told = [0] * len(streams)
        self._text = [0] * len(streams)  # bytes that were told
        self._covered = [0] * len(streams)  # bytes of the records that were told

    def new(self, number: int, piece: str | None) -> list[LogProb] | None:
        """Those that go with the next piece of a text; with None, those that are left. None, where
        none were asked for."""
        records = self._streams[number].logprobs
        if records is None:
            return None
        if self._text[number] == 0 and self._without_space:
            raw = b"".join(record.text for record in records)
            self._text[number] = len(raw) - len(raw.lstrip(b" "))
        self._text[number] += len((piece or "").encode("utf-8", "replace"))
        found = []
        while self._told[number] < len(records) and (
            piece is None or self._covered[number] < self._text[number]
        ):
            found.append(records[self._told[number]])
            self._told[number] += 1
            self._covered[number] += len(found[-1].text)
        return found
