"""mobilellm chat: talk to a model in the terminal, or through a pipe."""

import sys
from collections.abc import Iterator
from typing import Annotated, Any

import typer

from ..errors import ModelError
from .common import Context, OptionalModel, Seed, Threads, Type, complain

HELP = "/reset forgets the conversation, /exit or Ctrl-D leaves, Ctrl-C stops an answer."


def chat(
    model: OptionalModel = None,
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
    type: Type = None,
    ctx: Context = 0,
    threads: Threads = 0,
) -> None:
    """Chat with a model. Lines on a pipe are answered one by one."""
    from ..engine.conversation import Conversation
    from .common import load

    if temperature is None:
        temperature = 0.0 if model is None else 0.8
    llm = load(model, type, n_ctx=ctx, n_threads=threads)
    conversation = Conversation(llm, system, n, temperature=temperature, seed=seed)
    failed = False
    for text in _questions(conversation):
        try:
            _say(conversation.answer(text))
        except ModelError as error:
            complain(error)
            failed = True
    if failed and not sys.stdin.isatty():
        raise typer.Exit(1)


def _say(pieces: Iterator[str]) -> None:
    """Prints an answer as it comes; Ctrl-C ends it."""
    try:
        for piece in pieces:
            sys.stdout.write(piece)
            sys.stdout.flush()
    except KeyboardInterrupt:
        pass
    finally:
        pieces.close()  # type: ignore[attr-defined]  # a generator: what was said is kept
        sys.stdout.write("\n")
        sys.stdout.flush()


def _questions(conversation: Any) -> Iterator[str]:
    """What the user says, without commands, until the end."""
    for line in _terminal_lines() if sys.stdin.isatty() else sys.stdin:
        text = line.strip()
        if text == "/exit":
            return
        if text == "/reset":
            conversation.reset()
        elif text == "/help":
            print(HELP, file=sys.stderr)
        elif text.startswith("/") and " " not in text:
            print(f"{text} is no command. {HELP}", file=sys.stderr)
        elif text:
            yield text


def _terminal_lines() -> Iterator[str]:
    from prompt_toolkit import PromptSession

    print(HELP, file=sys.stderr)
    session: PromptSession[str] = PromptSession()
    while True:
        try:
            yield session.prompt("> ")
        except KeyboardInterrupt:
            print("(Ctrl-D or /exit leaves)", file=sys.stderr)
        except EOFError:
            return
