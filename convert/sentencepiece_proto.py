"""What a tokenizer.model says and the sentencepiece library does not tell: the kinds of its pieces
and how texts are prepared for it.

    ModelProto { repeated SentencePiece pieces = 1; TrainerSpec trainer_spec = 2;
                 NormalizerSpec normalizer_spec = 3; NormalizerSpec denormalizer_spec = 5; }

(sentencepiece_model.proto). A message that stands twice is one message, whose later fields count.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

BPE = 2  # TrainerSpec.ModelType
USER_DEFINED = 4  # SentencePiece.Type
TYPE_FIELD = bytes([3 << 3, USER_DEFINED])  # as it stands in a piece

Message = dict[int, int | bytes]  # fields by number, the last of each


@dataclass(frozen=True)
class ModelProto:
    """`user_defined` are the ids of pieces that are cut out of a text before others are joined.
    Defaults are those of the .proto file."""

    user_defined: frozenset[int]
    model_type: int
    space_behind: bool
    rule: str  # the normalizer's name where it changes characters, else ""
    removes_spaces: bool
    escapes_spaces: bool
    denormalizes: bool


def read_proto(data: bytes) -> ModelProto:
    """Raises ValueError for what is no protobuf message."""
    trainer: Message = {}
    normalizer: Message = {}
    denormalizer: Message = {}
    parts = {2: trainer, 3: normalizer, 5: denormalizer}
    user_defined = []
    count = 0
    for number, value in _fields(data):
        if not isinstance(value, bytes):
            continue
        if number == 1:
            if TYPE_FIELD in value and _is_cut_out(dict(_fields(value))):  # few are looked into
                user_defined.append(count)
            count += 1
        elif number in parts:
            parts[number].update(_fields(value))
    name = normalizer.get(1)
    rule = name.decode(errors="replace") if isinstance(name, bytes) else ""
    return ModelProto(
        user_defined=frozenset(user_defined),
        model_type=int(trainer.get(3, 1)),
        space_behind=bool(trainer.get(24, 0)),
        rule=(rule or "of no name") if normalizer.get(2) else "",
        removes_spaces=bool(normalizer.get(4, 1)),
        escapes_spaces=bool(normalizer.get(5, 1)),
        denormalizes=bool(denormalizer.get(2)),
    )


def _is_cut_out(piece: Message) -> bool:
    """Spaces of a text are U+2581 by then, so a piece with a plain one is in none."""
    text = piece.get(1)
    return piece.get(3) == USER_DEFINED and isinstance(text, bytes) and b" " not in text


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """The number and value of each field of a message."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        kind, size = tag & 7, 0
        if kind == 0:
            value, at = _varint(data, at)
            yield tag >> 3, value
            continue
        if kind == 2:
            size, at = _varint(data, at)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
        else:
            raise ValueError(f"wire type {kind}")
        if at + size > len(data):
            raise ValueError("a field goes beyond its message")
        yield tag >> 3, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """A number, seven bits a byte, and where the next field begins."""
    if at < len(data) and data[at] < 128:
        return data[at], at + 1
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            raise ValueError("a number goes beyond its message")
        value |= (data[at] & 127) << shift
        at += 1
        if data[at - 1] < 128:
            return value, at
    raise ValueError("a number is too long")
