"""Draws edits of a saved state: numbers in its head and between its parts, and where it ends."""

from __future__ import annotations

import random
import struct
from typing import Any

from fuzz import strange

Edit = list[Any]


def draw(rng: random.Random, seed: bytes) -> list[Edit]:
    """["put", place, hex], ["cut", length] and ["grow", bytes]; a number is more often one that
    stands there as it is, a count or a position."""
    edits: list[Edit] = []
    small = [
        i for i in range(0, len(seed) - 8, 4) if 0 < struct.unpack_from("<q", seed, i)[0] < 512
    ]
    for _ in range(rng.choice([1, 1, 2, 3])):
        way = rng.random()
        if way < 0.6 and small:
            new = strange.integer(rng, 2) % 2**64
            edits.append(
                ["put", rng.choice(small), struct.pack("<Q", new).hex()[: rng.choice([8, 16])]]
            )
        elif way < 0.85:
            raw = strange.raw_bytes(rng, rng.choice([1, 4, 8, 64]))
            edits.append(["put", rng.randrange(len(seed)), raw.hex()])
        elif way < 0.95:
            edits.append(["cut", rng.randrange(len(seed))])
        else:
            edits.append(["grow", rng.choice([1, 4, 4096])])
    return edits


def apply(seed: bytes, edits: list[Edit]) -> bytes:
    data = bytearray(seed)
    for way, number, *raw in edits:
        if way == "put":
            new = bytes.fromhex(raw[0])[: max(0, len(data) - number)]
            data[number : number + len(new)] = new
        elif way == "cut":
            del data[number:]
        else:
            data += bytes(number)
    return bytes(data)
