"""What a GGUF file holds, in numbers and in words."""

import dataclasses
import os
from collections import Counter
from typing import Any

import gguf

from .errors import ModelError
from .library import context_length


@dataclasses.dataclass(frozen=True)
class Description:
    """One model file. Sizes are bytes; kv_bytes_per_token counts K and V of all executed layers
    in f16."""

    path: str
    architecture: str
    name: str
    size: int
    parameters: int
    bits_per_weight: float
    blocks_stored: int
    layers_executed: int
    schedule: list[int]
    sharing: str
    hidden_size: int
    ffn_size: int
    heads: int
    kv_heads: int
    head_size: int
    context: int
    vocabulary: int
    tied_head: bool
    tensor_types: dict[str, int]
    kv_bytes_per_token: int
    chat_template: bool


def sharing_words(schedule: list[int], stored: int) -> str:
    """The schedule as people say it: `immediate sharing ×2`, `each block once`, ..."""
    once = list(range(stored))
    times, rest = divmod(len(schedule), stored)
    if schedule == once:
        return "each block once"
    if not rest and schedule == [block for block in once for _ in range(times)]:
        return f"immediate sharing ×{times}"
    if not rest and schedule == once * times:
        return f"repeat-all-over sharing ×{times}"
    if schedule == once + once[::-1]:
        return "reverse sharing"
    return "order " + ",".join(map(str, schedule))


def describe(path: str | os.PathLike[str]) -> Description:
    """Reads metadata and tensor list of a GGUF file, not its weights. Raises ModelError."""
    file = os.fspath(path)
    if not os.path.isfile(file):
        raise ModelError(f"{file}: no such file")
    context = context_length(file)  # the strict parser first: gguf-py trusts counts
    try:
        return _describe(file, context)
    except (KeyError, IndexError, ValueError, TypeError, ZeroDivisionError) as error:
        raise ModelError(f"{file}: its metadata cannot be understood ({error})") from error


def _describe(path: str, context: int) -> Description:
    reader = gguf.GGUFReader(path)

    def value(key: str, default: Any = None) -> Any:
        field = reader.get_field(key)
        if field is None:
            if default is None:
                raise KeyError(f"{key} is missing")
            return default
        return field.contents()

    arch = value("general.architecture")
    stored = value(f"{arch}.block_count")
    schedule = value(f"{arch}.block_schedule", list(range(stored)))
    heads = value(f"{arch}.attention.head_count")
    kv_heads = value(f"{arch}.attention.head_count_kv", heads)
    hidden = value(f"{arch}.embedding_length")
    head_size = value(f"{arch}.attention.key_length", hidden // heads)
    tokens = reader.get_field("tokenizer.ggml.tokens")

    types: Counter[str] = Counter()
    for tensor in reader.tensors:
        types[tensor.tensor_type.name] += 1
    parameters = sum(int(tensor.n_elements) for tensor in reader.tensors)
    return Description(
        path=path,
        architecture=arch,
        name=value("general.name", ""),
        size=os.path.getsize(path),
        parameters=parameters,
        bits_per_weight=8 * sum(int(t.n_bytes) for t in reader.tensors) / parameters,
        blocks_stored=stored,
        layers_executed=len(schedule),
        schedule=schedule,
        sharing=sharing_words(schedule, stored),
        hidden_size=hidden,
        ffn_size=value(f"{arch}.feed_forward_length"),
        heads=heads,
        kv_heads=kv_heads,
        head_size=head_size,
        context=context,
        vocabulary=len(tokens.data) if tokens else 0,
        tied_head=all(tensor.name != "output.weight" for tensor in reader.tensors),
        tensor_types=dict(types),
        kv_bytes_per_token=len(schedule) * kv_heads * head_size * 2 * 2,
        chat_template=reader.get_field("tokenizer.chat_template") is not None,
    )
