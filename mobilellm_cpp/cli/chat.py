"""mobilellm chat: talk to a model in the terminal, or ask it once."""

import sys
import threading
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import ModelError
from ..saying import note
from .common import (
    Adapters,
    Cache,
    Context,
    Mlock,
    OptionalModel,
    Threads,
    Type,
    parse_adapters,
)
from .sampling import takes_sampling


@takes_sampling
def chat(
    context: typer.Context,
    *,
    model: OptionalModel = None,
    question: Annotated[
        str | None,
        typer.Argument(help="Answer this question and exit; a text on stdin is put before it."),
    ] = None,
    system: Annotated[
        str | None,
        typer.Option(
            "--system", "-s", help="Instructions that stay at the top of the conversation."
        ),
    ] = None,
    n: Annotated[
        int, typer.Option("-n", "--tokens", min=1, help="The longest answer in tokens.")
    ] = 512,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the last conversation.")
    ] = False,
    lines: Annotated[
        bool, typer.Option("--lines", help="Take each line of stdin as a question or a command.")
    ] = False,
    keep: Annotated[
        bool,
        typer.Option(
            "--keep/--no-keep", help="Keep the conversation and its history on this machine."
        ),
    ] = True,
    markdown: Annotated[
        bool, typer.Option("--markdown/--plain", help="Format Markdown if stdout is a terminal.")
    ] = True,
    thinking: Annotated[
        bool,
        typer.Option(
            "--thinking/--hide-thinking", help="Show what a model thinks before it answers."
        ),
    ] = True,
    sampling: dict[str, Any],
    lora: Adapters = None,
    type: Type = None,
    ctx: Context = 0,
    cache_type: Cache = None,
    threads: Threads = 0,
    mlock: Mlock = False,
) -> None:
    """Chat with a model in the terminal, or ask it one question.

    A text on stdin is one question. In the terminal /help shows the commands. The demo model
    has a temperature of 0 unless another is given.
    """
    from .common import load, load_ahead, resolve, without_demo

    model = without_demo(model)
    if not (resume or mlock) and (model is None or Path(model).is_file()):
        load_ahead(resolve(model, type))
    from ..chat.commands import go_on
    from ..chat.session import Session, latest
    from ..chat.talk import Talk
    from ..engine.cancelling import Cancelled

    if model and not question and " " in model.strip() and not Path(model).exists():
        raise ModelError(f"{model} is not a model: name one before the question, such as demo")
    typing = question is None and sys.stdin.isatty()
    path = None
    if resume:
        path = latest(model)
        if path is None:
            raise ModelError("there is no conversation yet to go on with")
        if model is None:
            from ..chat.storage import read

            model = without_demo(read(path).model)
    settings: dict[str, Any] = {"max_tokens": n, **sampling}
    source = context.get_parameter_source("temperature")
    if source is not None and source.name == "DEFAULT":
        del settings["temperature"]  # the demo model has its own
    if "json_schema" in settings:
        settings["schema"] = settings.pop("json_schema")
    options: dict[str, Any] = {"n_ctx": ctx, "n_threads": threads, "cache_type": cache_type}
    options["use_mlock"] = mlock
    if typing:  # which needs it, and the model's loading leaves a core to this
        threading.Thread(target=import_module, args=("prompt_toolkit.shortcuts",)).start()
    talk = Talk(
        lambda name: load(name, type if name == model else None, **options),
        model,
        system=system or "",
        settings=settings,
        keep=keep and (typing or resume),
    )
    talk.show_thinking = thinking
    if lora:
        talk.adapt(parse_adapters(lora))
    if system and not talk.has_template:
        note(f"{talk.name} is a base model: it knows no instructions, --system has no effect")
    session = Session(talk, markdown)
    if path is not None:
        go_on(talk, path, note if typing else lambda text: None)
    if typing:
        _greet(talk)
        session.terminal(keep)
        return
    try:
        if question is None and lines:
            well = session.lines(sys.stdin)
        else:
            text = "" if sys.stdin.isatty() else sys.stdin.read()
            both = [part for part in (text.strip(), question or "") if part.strip()]
            if not both:
                raise typer.BadParameter("give a question, as an argument or on stdin")
            well = session.question("\n\n".join(both))
    except Cancelled:
        raise KeyboardInterrupt from None
    if not well:
        raise typer.Exit(1)


def _greet(talk: Any) -> None:
    note(f"{talk.name}, {talk.llm.n_ctx():,} tokens of context. /help shows the commands.")
    if not talk.has_template:
        note(
            "This is a base model without a chat template: it does not answer, it continues what "
            "you type. An empty line goes on."
        )
