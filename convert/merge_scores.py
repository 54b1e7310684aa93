"""Merges of the tokenizers library as the scores of llama.cpp's SentencePiece tokenizer.

Both replace two neighbouring symbols by one, the best pair first and of equal ones the leftmost,
until there is none. The library knows pairs and ranks them; llama.cpp takes any two symbols whose
joined text is a token and ranks that token. Which symbols stand next to each other while a token's
text is put together does not depend on what stands around it: nothing has been merged across its
ends. So each token has at most one pair that ever becomes it, the last two symbols that are left
when its own text is merged; the library must know that pair, and its rank is the token's score.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping

Ranks = Mapping[tuple[str, str], int]


def merged(text: str, ranks: Ranks) -> tuple[list[str], int]:
    """The symbols that merging leaves of a text, and the rank of the last merge, -1 without one."""
    symbols: list[str] = list(text)
    count = len(symbols)
    after = list(range(1, count + 1))
    before = list(range(-1, count - 1))
    queue = []
    for i in range(count - 1):
        rank = ranks.get((symbols[i], symbols[i + 1]))
        if rank is not None:
            queue.append((rank, i))
    heapq.heapify(queue)
    last = -1
    while queue:
        rank, i = heapq.heappop(queue)
        j = after[i]
        if not symbols[i] or j >= count or ranks.get((symbols[i], symbols[j])) != rank:
            continue  # merged otherwise since
        symbols[i] += symbols[j]
        symbols[j] = ""
        after[i] = after[j]
        if after[i] < count:
            before[after[i]] = i
        last = rank
        for left, right in ((before[i], i), (i, after[i])):
            if left >= 0 and right < count:
                new = ranks.get((symbols[left], symbols[right]))
                if new is not None:
                    heapq.heappush(queue, (new, left))
    return [symbol for symbol in symbols if symbol], last


def final_ranks(tokens: Iterable[str], ranks: Ranks) -> tuple[dict[str, int], list[str], list[str]]:
    """The rank of each token of several characters that merging makes; those that it leaves in two
    symbols, which llama.cpp would join; and those that it leaves in more, which neither makes."""
    found, joined, apart = {}, [], []
    for token in tokens:
        if len(token) < 2:
            continue
        symbols, last = merged(token, ranks)
        if len(symbols) == 1:
            found[token] = last
        elif len(symbols) == 2:
            joined.append(token)
        else:
            apart.append(token)
    return found, joined, apart
