"""mobilellm verify: whether a model file matches its checkpoint."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import CheckpointError, ModelError
from ..saying import complain
from .common import (
    Base,
    ChatTemplate,
    Model,
    Revision,
    Schedule,
    Settings,
    Threads,
    Type,
    checkpoint_name,
    parse_settings,
    print_json,
    printable,
)

if TYPE_CHECKING:
    from ..inspection.adapter_check import AdapterVerification
    from ..inspection.verification import Verification


def verify(
    model: Model,
    checkpoint: Annotated[
        str,
        typer.Argument(
            help="The folder or hub id that the model or adapter was converted from; for a merged "
            "model, the adapter's."
        ),
    ],
    text: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="Compare logits on the beginning of this file instead of a built-in text.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    type: Type = None,
    schedule: Schedule = None,
    settings: Settings = None,
    chat_template: ChatTemplate = None,
    revision: Revision = None,
    threads: Threads = 0,
    base: Base = None,
) -> None:
    """Check whether a model file matches its checkpoint.

    Compares weights, metadata, tokens and logits. The checkpoint may be a base with an adapter that
    was merged into it. An adapter file is compared with its folder. Needs torch.
    """
    from ..convert import Adapter, open_source
    from ..convert.adapter_conversion import open_base
    from ..inspection.adapter_check import is_adapter_file, verify_adapter
    from ..inspection.verification import verify as compare
    from .common import resolve

    if Path(model).is_file() and is_adapter_file(model):
        from ..convert.adapter_conversion import open_adapter

        finish(
            verify_adapter(
                model,
                open_adapter(checkpoint, revision),
                base=base,
                schedule=schedule,
                settings=parse_settings(settings),
            ),
            as_json,
        )
        return
    if not Path(model).is_file() and (schedule or settings or chat_template or revision):
        raise ModelError(
            f"{model} is not a file, and a checkpoint is converted as its config.json says: "
            "leave out --schedule, --set, --chat-template and --revision"
        )
    sample = None
    if text is not None:
        with open(text, encoding="utf-8", errors="replace") as file:
            sample = file.read(1 << 16)  # more than is used
    path, fields = resolve(model, type), parse_settings(settings)
    opened, adapter = open_source(checkpoint_name(checkpoint), revision, fields), None
    if isinstance(opened, Adapter):
        adapter, opened = opened, open_base(opened, base, fields)
    elif base:
        raise CheckpointError(f"{checkpoint} is not an adapter, but --base needs one")
    found = compare(
        path,
        opened,
        text=sample,
        schedule=schedule,
        chat_template=chat_template,
        adapter=adapter,
        n_threads=threads,
    )
    finish(found, as_json)


def finish(
    found: "Verification | AdapterVerification", as_json: bool = False, more: str = ""
) -> None:
    """Prints the answers; exit code 1 where one is no, `more` being said then."""
    from ..inspection.adapter_check import AdapterVerification

    if as_json:
        print_json({"ok": found.ok, **dataclasses.asdict(found)})
    elif isinstance(found, AdapterVerification):
        _print_adapter(found)
    else:
        _print_model(found)
    if not found.ok:
        complain(ModelError(f"{_failure(found)}{more}"))
        raise typer.Exit(1)


def _print_adapter(found: "AdapterVerification") -> None:
    width = max((len(module.name) for module in found.modules), default=0)
    for module in found.modules:
        error = f"max |Δ| {module.max_error:.2e}, {module.share:.2f} of the bound"
        print(f"{printable(module.name):{width}}  {module.type:4}  rank {module.rank}  {error}")
    for sentence in found.failures:
        print(f"wrong      {printable(sentence)}")
    print("verdict    " + ("the file matches the adapter" if found.ok else "FAILED"))


def _failure(found: "Verification | AdapterVerification") -> str:
    """The verdict on a file that is not right, in a sentence."""
    more = f" (and {len(found.failures) - 1} more)" if len(found.failures) > 1 else ""
    adapter = getattr(found, "adapter", None)
    source = f"{found.checkpoint} with {adapter}" if adapter else found.checkpoint
    return printable(f"{found.model} does not match {source}: {found.failures[0]}{more}")


def _print_model(found: "Verification") -> None:
    """A line for each tensor, then one for each question, then the verdict."""
    width = max((len(tensor.name) for tensor in found.tensors), default=0)
    for tensor in found.tensors:
        share = "none is allowed" if tensor.share is None else f"{tensor.share:.2f} of the bound"
        wrong = f", {tensor.outside} weights beyond it" if tensor.outside else ""
        error = f"max |Δ| {tensor.max_error:.2e}"
        print(f"{tensor.name:{width}}  {tensor.type:4}  {error}, {share}{wrong}")
    rows = {"metadata": f"{len(found.metadata)} values compared with config.json"}
    names = [tensor for tensor in found.tensors if tensor.outside]
    rows["tensors"] = f"{len(found.tensors) - len(names)} of {len(found.tensors)} within rounding"
    if found.tokenizer.library:
        rows["tokenizer"] = (
            f"{found.tokenizer.alike} of {found.tokenizer.texts} texts tokenized as by "
            f"{found.tokenizer.library}"
        )
    else:
        rows["tokenizer"] = "not compared: pip install tokenizers"
    if logits := found.logits:
        rows["logits"] = (
            f"at {logits.positions} of {logits.tokens} tokens: |Δ| max "
            f"{logits.max_difference:.3g}, mean {logits.mean_difference:.3g} where logits spread "
            f"by {logits.spread:.3g}; "
            f"KL {logits.kl_divergence:.2e}; top-1 {logits.top1_agreement:.1%}"
        )
    if graph := found.graph:
        rows["graph"] = (
            f"{graph.difference:.1e} of the spread from PyTorch with the same weights; "
            f"rounded activations make {graph.noise:.1e}"
        )
    for name, row in rows.items():
        print(f"{name:9}  {row}")
    for sentence in found.failures:
        print(f"wrong      {printable(sentence)}")
    print("verdict    " + ("the file matches the checkpoint" if found.ok else "FAILED"))
