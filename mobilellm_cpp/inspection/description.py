"""What a GGUF file holds, in numbers and in words."""

import dataclasses
import os
from collections import Counter

from ..convert import keys
from ..engine.gguf_file import (
    GGUFFile,
    block_schedule,
    default_cache,
    is_count,
    kv_bytes,
    open_gguf,
    sliding_layers,
)
from ..errors import ModelError
from .compatibility import compatibility


@dataclasses.dataclass(frozen=True)
class Description:
    """One model file. Sizes are bytes; kv_bytes counts K and V of all executed layers, in the
    type kv_type, for the whole context, kv_bytes_per_token what each further token takes.
    layer_has_rope and layer_slides say for each executed layer whether it has RoPE and a window of
    sliding_window tokens; rope_layers and sliding_layers count those. llama_cpp says which
    llama.cpp runs it."""

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
    sliding_window: int
    sliding_layers: int
    rope_layers: int
    qk_norm: bool
    vocabulary: int
    tied_head: bool
    tensor_types: dict[str, int]
    kv_type: str
    kv_bytes_per_token: int
    kv_bytes: int
    chat_template: bool
    layer_has_rope: list[bool]
    layer_slides: list[bool]
    llama_cpp: str


@dataclasses.dataclass(frozen=True)
class AdapterDescription:
    """One LoRA adapter file: `modules` are the names of the matrices it adapts, with the rank of
    each; `architecture` is that of the models it is for."""

    path: str
    architecture: str
    name: str
    size: int
    parameters: int
    alpha: float
    modules: dict[str, int]
    tensor_types: dict[str, int]
    llama_cpp: str


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


def describe(path: str | os.PathLike[str]) -> Description | AdapterDescription:
    """Reads metadata and tensor list of a model or adapter file, not its weights. Raises
    ModelError."""
    with open_gguf(path) as file:
        try:
            if file.get("general.type") == "adapter":
                return _describe_adapter(os.fspath(path), file)
            return _describe(os.fspath(path), file)
        except (ModelError, ValueError) as error:
            raise ModelError(
                f"{os.fspath(path)}: not a language model that we know: {error}"
            ) from error


def _describe_adapter(path: str, file: GGUFFile) -> AdapterDescription:
    arch = str(file.get("general.architecture"))
    tensors = file.tensors()
    types = Counter(tensor.type for tensor in tensors)
    alpha = file.get("adapter.lora.alpha")
    if file.get("adapter.type") != "lora" or not isinstance(alpha, float):
        raise ValueError("it is an adapter, but not one of type lora with an alpha")
    ends = ".lora_a"
    return AdapterDescription(
        path=path,
        architecture=arch,
        name=str(file.get("general.name", "")),
        size=os.path.getsize(path),
        parameters=sum(tensor.n_elements for tensor in tensors),
        alpha=alpha,
        modules={t.name.removesuffix(ends): t.shape[0] for t in tensors if t.name.endswith(ends)},
        tensor_types=dict(types),
        llama_cpp=compatibility(arch, types),
    )


def _describe(path: str, file: GGUFFile) -> Description:
    arch = file.get("general.architecture")

    def number(name: str, default: int | None = None) -> int:
        key = keys.key(name, arch)
        value = file.get(key, default)
        if not is_count(value):
            raise ValueError(f"{key} is {'missing' if value is None else value}")
        return int(value)

    schedule = block_schedule(file)
    stored = number(keys.BLOCK_COUNT)
    heads = number(keys.HEAD_COUNT)
    kv_heads = number(keys.HEAD_COUNT_KV, heads)
    hidden = number(keys.EMBEDDING_LENGTH)
    head_size = number(keys.KEY_LENGTH, hidden // heads)
    context = number(keys.CONTEXT_LENGTH)
    slides = sliding_layers(file)
    pattern = keys.key(keys.ROPE_PATTERN, arch)
    rope = file.get(pattern) if arch in ("mobilellm", "granite_swa") else None
    if rope is not None and not (isinstance(rope, list) and len(rope) == stored):
        raise ValueError(f"{pattern} is {rope}")
    tensors = file.tensors()
    parameters = sum(tensor.n_elements for tensor in tensors)
    if not parameters:
        raise ValueError("it holds no weights")
    has_rope = [bool(rope[block]) if rope else True for block in schedule]
    types = Counter(tensor.type for tensor in tensors)
    return Description(
        path=path,
        architecture=arch,
        name=file.get("general.name", ""),
        size=os.path.getsize(path),
        parameters=parameters,
        bits_per_weight=8 * sum(tensor.n_bytes for tensor in tensors) / parameters,
        blocks_stored=stored,
        layers_executed=len(schedule),
        schedule=schedule,
        sharing=sharing_words(schedule, stored),
        hidden_size=hidden,
        ffn_size=number(keys.FEED_FORWARD_LENGTH),
        heads=heads,
        kv_heads=kv_heads,
        head_size=head_size,
        context=context,
        sliding_window=number(keys.SLIDING_WINDOW) if any(slides) else 0,
        sliding_layers=sum(slides),
        rope_layers=sum(has_rope),
        qk_norm=arch == "qwen3" or bool(file.get(keys.key(keys.QK_NORM, "mobilellm"), False)),
        vocabulary=file.get("tokenizer.ggml.tokens", 0),
        tied_head=all(tensor.name != "output.weight" for tensor in tensors),
        tensor_types=dict(types),
        kv_type=default_cache(file),
        kv_bytes_per_token=kv_bytes(file, context + 1) - kv_bytes(file, context),
        kv_bytes=kv_bytes(file, context),
        chat_template=file.get("tokenizer.chat_template") is not None,
        layer_has_rope=has_rope,
        layer_slides=slides,
        llama_cpp=compatibility(arch, types),
    )
