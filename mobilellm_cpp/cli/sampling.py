"""The options of sampling: made from the engine's table, handed to a command as arguments of
stream."""

import inspect
from collections.abc import Callable
from typing import Annotated, Any

import typer

from ..engine.sampling_types import SETTINGS
from ..texts import written_or_read

NAMES = {"temperature": ("--temperature", "--temp")}  # the second one is llama.cpp's
FORMS = {
    "json_schema": "A JSON schema for the answer: a file, or the schema itself.",
    "regex": "A regular expression for the whole answer, in the syntax of Rust's regex crate.",
    "grammar": "A GBNF grammar for the answer: a file, or the grammar itself.",
    "lark": "A Lark grammar for the answer: a file, or the grammar itself.",
}


def takes_sampling(command: Callable[..., None]) -> Callable[..., None]:
    """The command with the options of sampling in the place of its argument `sampling`, which gets
    those that were given."""
    options = _options()

    def run(**given: Any) -> None:
        sampling = {name: given.pop(name) for name in options}
        command(sampling=_arguments(sampling), **given)

    parameters: dict[str, inspect.Parameter] = {}
    for name, parameter in inspect.signature(command, eval_str=True).parameters.items():
        parameters.update(options if name == "sampling" else {name: parameter})
    run.__name__, run.__doc__ = command.__name__, command.__doc__
    run.__annotations__ = {name: each.annotation for name, each in parameters.items()}
    run.__signature__ = inspect.Signature(list(parameters.values()))  # type: ignore[attr-defined]
    return run


def _options() -> dict[str, inspect.Parameter]:
    options: dict[str, tuple[Any, Any, Any]] = {}  # name to type, default, option
    for name, setting in SETTINGS.items():
        if name != "max_tokens":
            default, kind = setting.default, setting.kind
            options[name] = (
                kind if default is not None else kind | None,
                default,
                typer.Option(
                    *NAMES.get(name, ()),
                    min=kind(setting.least),
                    max=kind(setting.most),
                    metavar="NUMBER",
                    help=setting.meaning[0].upper() + setting.meaning[1:] + ".",
                ),
            )
    options["stop"] = (
        list[str] | None,
        None,
        typer.Option(metavar="TEXT", help="End the answer before this text; may be repeated."),
    )
    options["logit_bias"] = (
        list[str] | None,
        None,
        typer.Option(
            metavar="TOKEN=NUMBER",
            help="Add a number to the logit of the token with this id; may be repeated.",
        ),
    )
    for name, meaning in FORMS.items():
        metavar = "REGEX" if name == "regex" else "FILE|TEXT"
        options[name] = (str | None, None, typer.Option(metavar=metavar, help=meaning))
    keyword = inspect.Parameter.KEYWORD_ONLY
    return {
        name: inspect.Parameter(name, keyword, default=default, annotation=Annotated[kind, option])
        for name, (kind, default, option) in options.items()
    }


def _arguments(given: dict[str, Any]) -> dict[str, Any]:
    """Arguments of stream. Raises BadParameter, or ModelError for a file that cannot be read."""
    sampling = {name: value for name, value in given.items() if value not in (None, [])}
    if len(forms := [name for name in FORMS if name in sampling]) > 1:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in forms)
        raise typer.BadParameter(f"an answer can have only one form: give one of {names}")
    for name in ("json_schema", "grammar", "lark"):
        if name in sampling:
            sampling[name] = written_or_read(sampling[name])
    if "logit_bias" in sampling:
        sampling["logit_bias"] = dict(map(_bias, sampling["logit_bias"]))
    return sampling


def _bias(text: str) -> tuple[int, float]:
    token, _, number = text.partition("=")
    try:
        return int(token), float(number)
    except ValueError:
        raise typer.BadParameter(
            f"{text!r} is not of the form TOKEN=NUMBER", param_hint="--logit-bias"
        ) from None
