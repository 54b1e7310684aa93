"""Drafts of what follows in a sequence, looked up in its own tokens.

A text that repeats a part of itself (a quotation, an edit, a form) goes on as it did there. Such a
draft is computed in the same step as the token before it, which reads the weights once for all of
them (sequences.py). A wrong draft changes no text; it costs time. So a draft is made only where it
is expected to gain: each step shows, without cost, whether the looked-up token would have been
right, and how often it was, by the length of what was the same before. What a drafted token costs
is measured."""

MOST = 11  # drafted tokens: with the token before them as many as are computed one by one
LONGEST = 12  # lengths of what was the same before that are told apart
MEMORY = 32  # outcomes of a length that count
GAIN = 0.1  # least gain of a draft, in steps of one token: less is lost in chance


class Costs:
    """What a step costs by the number of its tokens, on this machine at the moment."""

    def __init__(self) -> None:
        self.one = 0.0  # seconds of a step of one token
        self.more = 0.2  # of it for each further token

    def learn(self, n: int, seconds: float) -> None:
        """A step of n tokens took that long."""
        if n == 1:
            self.one += (seconds - self.one) * (0.1 if self.one else 1.0)
        elif self.one:
            share = (seconds / self.one - 1) / (n - 1)
            self.more += (min(max(share, 0.02), 1.0) - self.more) * 0.1


class PromptLookup:
    """Drafts for one sequence: at most `most` tokens each, none that makes it longer than end."""

    def __init__(self, most: int, end: int) -> None:
        self._most = most
        self._end = end
        self._read = 0  # tokens that were looked at
        self._after: dict[tuple[int, int], int] = {}  # two tokens: where they were followed
        self._at = 0  # the token there is expected next; 0: none
        self._same = 0  # so many before it are the last ones of the sequence
        # how often the expected token was right: at first as with texts that seldom repeat
        self._right = [min(0.9, 0.1 * length) for length in range(LONGEST + 1)]
        self._seen = [4] * (LONGEST + 1)

    def draft(self, tokens: list[int], room: int, gain: float, cost: float) -> list[int]:
        """What is expected to follow tokens, which are those of the last call and others behind
        them. gain: what a right token saves, cost: what any costs, both in steps of one token."""
        self._follow(tokens)
        room = min(room, self._most, self._end - len(tokens))
        best, length = GAIN, 0
        expected, right = 0.0, 1.0
        for n in range(1, room + 1 if self._at else 1):
            right *= self._right[min(self._same + n - 1, LONGEST)]
            expected += right * gain - cost
            if expected > best:
                best, length = expected, n
        made: list[int] = []
        for at in range(self._at, self._at + length):  # may go on in what it drafts
            made.append(tokens[at] if at < len(tokens) else made[at - len(tokens)])
        return made

    def _follow(self, tokens: list[int]) -> None:
        """Takes in the new tokens."""
        for i in range(self._read, len(tokens)):
            token = tokens[i]
            if self._at and self._read:  # nothing was expected within the prompt
                self._learn(tokens[self._at] == token)
            if self._at and tokens[self._at] == token:
                self._at += 1
                self._same += 1
            else:
                self._at = self._same = 0
            if i > 0:
                pair = (tokens[i - 1], token)
                if not self._at and pair in self._after:
                    self._at = self._after[pair]
                    self._same = _same_before(tokens, self._at, i + 1)
                self._after[pair] = i + 1
        self._read = len(tokens)

    def _learn(self, right: bool) -> None:
        length = min(self._same, LONGEST)
        self._seen[length] = min(self._seen[length] + 1, MEMORY)
        self._right[length] += (right - self._right[length]) / self._seen[length]


def _same_before(tokens: list[int], a: int, b: int) -> int:
    """How many tokens before a are those before b, up to LONGEST."""
    n = 0
    while n < min(a, LONGEST) and tokens[a - 1 - n] == tokens[b - 1 - n]:
        n += 1
    return n
