"""The command line: one module for each subcommand; what they do lives in the package.

Results go to stdout, progress and logs to stderr. Exit codes: 0 done, 1 the work failed (one
sentence), 2 wrong usage. Heavy imports happen inside the commands, so that --help is quick.
"""

import logging
import os
import sys
import traceback
from collections.abc import Iterable
from importlib import import_module
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from ..configuration import configuration_file, defaults
from ..errors import MobileLLMError
from ..saying import complain

INTERRUPTED = 130  # as shells have it for Ctrl-C


class _Commands(TyperGroup):
    """Ctrl-C and a reader of stdout that goes away end a command without a word."""

    def invoke(self, ctx: Any) -> Any:
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
            return result
        except BrokenPipeError:  # what is left in the buffer goes nowhere
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(0) from None
        except KeyboardInterrupt:
            if "--debug" in sys.argv:
                traceback.print_exc()
            raise typer.Exit(INTERRUPTED) from None


# The names of the commands, and the module of each. A command line imports its own alone.
COMMANDS = {
    "convert": "convert",
    "quantize": "quantize",
    "chat": "chat",
    "generate": "generate",
    "embed": "embed",
    "models": "models",
    "pull": "models",
    "inspect": "inspect",
    "bench": "bench",
    "perplexity": "perplexity",
    "compare": "compare",
    "serve": "serve",
    "verify": "verify",
    "doctor": "doctor",
}


def make_app(names: Iterable[str] = COMMANDS) -> typer.Typer:
    """The program with these commands."""
    app = typer.Typer(
        name="mobilellm",
        cls=_Commands,
        rich_markup_mode=None,  # what stands in brackets is no markup
        help="Convert MobileLLM checkpoints to GGUF and run them on this machine.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_options)
    for name in names:
        command = getattr(import_module(f".{COMMANDS[name]}", __name__), name)
        if isinstance(command, typer.Typer):
            app.add_typer(command, name=name)
        else:
            app.command()(command)
    return app


if TYPE_CHECKING:
    app: typer.Typer
else:

    def __getattr__(name: str) -> Any:
        if name != "app":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return make_app()


def _version(wanted: bool) -> None:
    if wanted:
        from .. import __version__

        print(f"mobilellm-cpp {__version__}")
        raise typer.Exit


def _options(
    debug: Annotated[
        bool, typer.Option("--debug", help="Show tracebacks of failures, and the log.")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """The `mobilellm` command."""
    for name in ("stdin", "stdout", "stderr"):  # one that the caller has closed
        if getattr(sys, name) is None:
            mode = "r" if name == "stdin" else "w"
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
    # undecodable bytes of the shell and characters that a terminal lacks are no reason to fail
    sys.stdin.reconfigure(errors="surrogateescape")  # type: ignore[union-attr]
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
    arguments = [text for text in sys.argv[1:] if text != "--debug"]  # allowed anywhere
    debug = len(arguments) < len(sys.argv) - 1
    warnings = logging.StreamHandler()
    warnings.setFormatter(logging.Formatter("mobilellm: %(message)s"))
    logging.getLogger("mobilellm_cpp").addHandler(warnings)
    if debug:
        logging.getLogger("mobilellm_cpp").setLevel(logging.DEBUG)
    names = [text for text in arguments if not text.startswith("-")][:1]
    alone = names and names[0] in COMMANDS and not configuration_file().exists()
    command = typer.main.get_command(make_app(names if alone else COMMANDS))
    configured: dict[str, Any] = {}
    try:
        configured = defaults(command)
        command(arguments, default_map=configured)
    except SystemExit as end:
        if end.code == 2 and configured:
            print(f"(defaults come from {configuration_file()})", file=sys.stderr)
        raise
    except (MobileLLMError, OSError, MemoryError) as error:
        if debug:
            raise
        complain(error)
        sys.exit(1)
