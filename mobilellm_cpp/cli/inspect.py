"""mobilellm inspect: what a model file holds."""

import dataclasses
from typing import Annotated

import typer

from .common import Model, Type, print_json, printable


def inspect(
    model: Model,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    type: Type = None,
) -> None:
    """Show architecture, sizes, block schedule and tensor types of a model."""
    from .common import resolve

    path = resolve(model, type)
    from ..inspection.description import describe

    about = describe(path)
    if as_json:
        print_json(dataclasses.asdict(about))
        return
    types = ", ".join(f"{n} × {name}" for name, n in sorted(about.tensor_types.items()))
    per_token = about.kv_bytes_per_token
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
    rows = {
        "file": f"{about.path}, {about.size / 2**20:.1f} MiB",
        "architecture": f"{about.architecture} ({about.name})"
        if about.name
        else about.architecture,
        "parameters": f"{about.parameters:,}, {about.bits_per_weight:.2f} bits a weight",
        "schedule": f"{about.blocks_stored} blocks stored, {about.layers_executed} executed, "
        + about.sharing,
        "block": f"{about.hidden_size} wide, {about.heads} heads of {about.head_size}, "
        f"{about.kv_heads} KV heads, FFN {about.ffn_size}",
        "attention": ", ".join(attention) or "full",
        "vocabulary": f"{about.vocabulary} tokens, "
        + ("head tied to the embedding" if about.tied_head else "head of its own"),
        "tensor types": types,
        "context": f"{about.context} tokens",
        "KV cache": f"{per_token:,} bytes a token in f16, "
        f"{about.kv_bytes / 2**20:.1f} MiB for the whole context",
        "chat template": "yes" if about.chat_template else "no",
    }
    width = max(map(len, rows))
    for name, text in rows.items():
        print(f"{name:{width}}  {printable(text)}")
