"""What a model thinks before it answers, between <think> and </think>, told from the answer."""

from collections.abc import Iterator

from ..engine.answers import _overlap

BEGIN, END = "<think>", "</think>"


class Thinking:
    """Takes an answer apart as it comes. `thought` and `said` are what came so far."""

    def __init__(self, thinks: bool = False) -> None:
        self.thought = self.said = ""
        self.thinks = thinks  # at the moment
        self._began = thinks  # whether thoughts can begin no more
        self._held = ""
        self._fresh = False  # nothing but line ends came since the last mark

    def feed(self, piece: str) -> Iterator[tuple[bool, str]]:
        """Yields parts: whether one is thought, and its text."""
        self._held += piece
        while self._held:
            if self._fresh:
                self._held = self._held.lstrip("\n")
                self._fresh = not self._held
                continue
            if self._began and not self.thinks:
                yield self._out(len(self._held))
                return
            mark = END if self.thinks else BEGIN
            if not self.thinks:
                self._held = self._held.lstrip("\n ")  # thoughts stand at the beginning
            at = self._held.find(mark)
            if at == 0 or (at > 0 and self.thinks):
                if at:
                    yield self._out(at)
                self._held = self._held[len(mark) :]
                self._fresh = True
                self.thinks, self._began = not self.thinks, True
            elif self.thinks:
                safe = len(self._held) - _overlap(self._held, mark)
                if safe:
                    yield self._out(safe)
                return
            elif mark.startswith(self._held):
                return  # it may still become one
            else:
                self._began = True

    def finish(self) -> Iterator[tuple[bool, str]]:
        """Yields what was held back."""
        if self._held:
            yield self._out(len(self._held))

    def _out(self, n: int) -> tuple[bool, str]:
        text, self._held = self._held[:n], self._held[n:]
        if self.thinks:
            self.thought += text
        else:
            self.said += text
        return self.thinks, text
