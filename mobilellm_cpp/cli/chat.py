"""mobilellm chat: talk to a model in the terminal, or ask it once."""

import sys
from typing import Annotated, Any

import typer

from ..errors import ModelError
from .common import Context, OptionalModel, Seed, Threads, Type, complain


def chat(
    model: OptionalModel = None,
    question: Annotated[
        str | None,
        typer.Argument(help="Answer this and leave; a text on stdin goes before it."),
    ] = None,
    system: Annotated[
        str | None, typer.Option("--system", "-s", help="Instructions that stay at the top.")
    ] = None,
    n: Annotated[
        int, typer.Option("-n", "--tokens", min=1, help="Tokens an answer at most.")
    ] = 512,
    temperature: Annotated[
        float | None,
        typer.Option(min=0.0, help="By default 0.8; 0, the likeliest token, for the demo model."),
    ] = None,
    seed: Seed = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the last conversation.")
    ] = False,
    lines: Annotated[
        bool, typer.Option("--lines", help="Each line on stdin is a question or a command.")
    ] = False,
    keep: Annotated[
        bool,
        typer.Option("--keep/--no-keep", help="Keep conversation and history on this machine."),
    ] = True,
    markdown: Annotated[
        bool, typer.Option("--markdown/--plain", help="Draw Markdown, where stdout is a terminal.")
    ] = True,
    thinking: Annotated[
        bool, typer.Option("--thinking/--hide-thinking", help="Show what a model thinks first.")
    ] = True,
    type: Type = None,
    ctx: Context = 0,
    threads: Threads = 0,
) -> None:
    """Chat with a model in the terminal, or ask it one question.

    A text on stdin is one question. In the terminal /help shows what can be done.
    """
    from ..chat.session import Session, latest, note
    from ..chat.talk import Talk
    from ..engine.cancelling import Cancelled
    from .common import load

    typing = question is None and sys.stdin.isatty()
    path = None
    if resume:
        path = latest(model)
        if path is None:
            raise ModelError("there is no conversation yet to go on with")
        if model is None:
            from ..chat.storage import read

            model = read(path).model
            model = None if model == "demo" else model
    if temperature is None:
        temperature = 0.0 if model is None else 0.8
    settings: dict[str, Any] = {"max_tokens": n, "temperature": temperature}
    if seed is not None:
        settings["seed"] = seed
    talk = Talk(
        lambda name: load(name, type if name == model else None, n_ctx=ctx, n_threads=threads),
        model,
        system=system or "",
        settings=settings,
        keep=keep and (typing or resume),
    )
    talk.show_thinking = thinking
    session = Session(talk, complain, markdown)
    if path is not None:
        saved = talk.resume(path)
        note(f"going on with: {saved.title}")
        if saved.unanswered and typing:
            note("the last question was not answered; /regen asks it again")
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
    from ..chat.session import note

    note(f"{talk.name}, {talk.llm.n_ctx():,} tokens of context. /help shows what can be done.")
    if not talk.has_template:
        note(
            "This is a base model without a chat template: it does not answer, it continues what "
            "you type. An empty line goes on."
        )
