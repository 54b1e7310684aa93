"""mobilellm inspect: what a model or adapter file contains, and how two files differ."""

import dataclasses
import shutil
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated

import typer

from .common import Model, Type, print_json, printable

if TYPE_CHECKING:
    from ..inspection.description import AdapterDescription, Description
    from ..inspection.difference import Difference


def inspect(
    model: Model,
    other: Annotated[
        str | None,
        typer.Argument(
            help="A second file or checkpoint: show how the two differ.", show_default=False
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    type: Type = None,
) -> None:
    """Show what a model file contains, or how two files differ.

    For one file: architecture, sizes, block schedule and tensor types. For two: the differences in
    metadata, types and weights.
    """
    from .common import resolve

    path = resolve(model, type)
    if other is not None:
        from ..inspection.difference import compare

        difference = compare(path, resolve(other, type))
        if as_json:
            print_json(dataclasses.asdict(difference))
        else:
            _print_difference(difference)
        return
    from ..inspection.description import describe

    about = describe(path)
    if as_json:
        print_json(dataclasses.asdict(about))
    else:
        print_description(about)


def print_description(
    about: "Description | AdapterDescription", more: Mapping[str, str] | None = None
) -> None:
    """Prints a row for each thing to say, after those in more."""
    from ..inspection.description import AdapterDescription

    rows = _adapter(about) if isinstance(about, AdapterDescription) else _model(about)
    rows = {**(more or {}), **rows}
    width = max(map(len, rows))
    for name, text in rows.items():
        for i, line in enumerate(text.splitlines()):
            print(f"{'' if i else name:{width}}  {printable(line)}")


def _common(about: "Description | AdapterDescription") -> dict[str, str]:
    """The rows that every file has."""
    name = f" ({about.name})" if about.name else ""
    return {
        "file": f"{about.path}, {about.size / 2**20:.1f} MiB",
        "architecture": f"{about.architecture}{name}",
        "llama.cpp": about.llama_cpp,
    }


def _model(about: "Description") -> dict[str, str]:
    """The rows of a model, by their names."""
    from ..inspection.picture import MARKS, draw

    attention = []
    if about.qk_norm:
        attention.append("q and k normed")
    if about.rope_layers < about.layers_executed:
        attention.append(f"RoPE in {about.rope_layers} of {about.layers_executed} layers")
    if about.sliding_layers:
        attention.append(
            f"a window of {about.sliding_window} tokens in {about.sliding_layers} of "
            f"{about.layers_executed} layers"
        )
    kinds = zip(about.layer_slides, about.layer_has_rope, strict=True)
    width = min(100, shutil.get_terminal_size((100, 24)).columns) - 16
    return {
        **_common(about),
        "parameters": f"{about.parameters:,}, {about.bits_per_weight:.2f} bits a weight",
        "schedule": f"{about.blocks_stored} blocks stored, {about.layers_executed} executed, "
        + about.sharing,
        "": "\n".join(draw(about.schedule, [MARKS[kind] for kind in kinds], width)),
        "block": f"{about.hidden_size} wide, {about.heads} heads of {about.head_size}, "
        f"{about.kv_heads} KV heads, FFN {about.ffn_size}",
        "attention": ", ".join(attention) or "full",
        "vocabulary": f"{about.vocabulary} tokens, "
        + ("head tied to the embedding" if about.tied_head else "untied head"),
        "tensor types": _types(about.tensor_types),
        "context": f"{about.context} tokens",
        "KV cache": f"{about.kv_bytes_per_token:,} bytes a token in {about.kv_type}, "
        f"{about.kv_bytes / 2**20:.1f} MiB for the whole context",
        "chat template": "yes" if about.chat_template else "no",
    }


def _adapter(about: "AdapterDescription") -> dict[str, str]:
    """The rows of an adapter, by their names."""
    ranks = sorted(set(about.modules.values()))
    parts = sorted({name.removesuffix(".weight").split(".")[-1] for name in about.modules})
    blocks = {name.split(".")[1] for name in about.modules if name.startswith("blk.")}
    return {
        **_common(about),
        "adapter": f"LoRA, alpha {about.alpha:g}, rank {', '.join(map(str, ranks))}",
        "parameters": f"{about.parameters:,}",
        "adapts": f"{len(about.modules)} matrices: {', '.join(parts)} in {len(blocks)} blocks",
        "tensor types": _types(about.tensor_types),
    }


def _types(types: dict[str, int]) -> str:
    return ", ".join(f"{n} × {name}" for name, n in sorted(types.items()))


def _print_difference(difference: "Difference") -> None:
    """A line for each key and each tensor that is not the same in both."""
    print(f"A  {printable(difference.a)}\nB  {printable(difference.b)}")
    width = max((len(key.key) for key in difference.metadata), default=0)
    for key in difference.metadata:
        print(f"{printable(key.key):{width}}  {printable(key.a)} | {printable(key.b)}")
    width = max((len(tensor.name) for tensor in difference.tensors), default=0)
    for tensor in difference.tensors:
        sides = [tensor.type_a or "absent", tensor.type_b or "absent"]
        if tensor.shape_a != tensor.shape_b and all((tensor.type_a, tensor.type_b)):
            shapes = (tensor.shape_a, tensor.shape_b)
            sides = [f"{side} {shape}" for side, shape in zip(sides, shapes, strict=True)]
        types = sides[0] if sides[0] == sides[1] else " | ".join(sides)
        error = ""
        if tensor.largest is not None and tensor.mean is not None:
            error = f"  |Δ| at most {tensor.largest:.2e}, {tensor.mean:.2e} on average"
        print(f"{printable(tensor.name):{width}}  {types}{error}")
    if not difference.metadata and not difference.tensors:
        print("the files have the same contents")
    else:
        n = len(difference.tensors) + difference.alike
        print(f"{difference.alike} of {n} tensors are the same in both")
