"""mobilellm serve: a model for programs that speak OpenAI's API."""

from pathlib import Path
from typing import Annotated

import typer

from ..errors import ModelError
from .common import Adapters, Cache, Context, Mlock, OptionalModel, Threads, Type, parse_adapters


def serve(
    model: OptionalModel = None,
    host: Annotated[
        str,
        typer.Option(
            help="The address to listen on; one that other machines can reach needs a key."
        ),
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", "-p", min=0, max=65535)] = 8080,
    key: Annotated[
        str | None,
        typer.Option(
            "--api-key",
            envvar="MOBILELLM_API_KEY",
            show_envvar=True,
            help="The API key that clients must send.",
        ),
    ] = None,
    name: Annotated[
        str | None,
        typer.Option(help="The name of the model for clients; by default that of its file."),
    ] = None,
    cors: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ORIGIN", help="Also allow web pages from this origin; may be repeated."
        ),
    ] = None,
    queue: Annotated[int, typer.Option(min=1, help="How many requests may wait for a place.")] = 64,
    seconds: Annotated[
        float, typer.Option("--timeout", min=1, help="How many seconds an answer may take.")
    ] = 600,
    lora: Adapters = None,
    type: Type = None,
    ctx: Context = 0,
    cache_type: Cache = None,
    threads: Threads = 0,
    mlock: Mlock = False,
) -> None:
    """Serve a model over HTTP, with a page to chat on.

    The APIs are those of OpenAI and of Ollama.
    """
    try:
        from ..server.app import create_app
        from ..server.listening import bind, is_public, listen
        from ..server.service import Limits
    except ImportError as error:
        raise ModelError(
            f"serve needs more packages ({error.name}): pip install 'mobilellm-cpp[server]'"
        ) from None
    public = is_public(host)
    if public and not key:
        raise typer.BadParameter(
            f"{host} can be reached from other machines: set a key with --api-key or "
            f"MOBILELLM_API_KEY",
            param_hint="--host",
        )
    from ..server.gate import LOOPBACK
    from .common import load, without_demo

    model = without_demo(model)

    bound = bind(host, port)
    options = {"n_ctx": ctx, "n_threads": threads, "cache_type": cache_type, "use_mlock": mlock}
    llm = load(model, type, lora=parse_adapters(lora), **options)
    name = name or (Path(model).name.removesuffix(".gguf") if model else "mobilellm-demo")
    app = create_app(
        llm,
        name,
        key=key or None,
        hosts=None if key else (*LOOPBACK, host),  # with a key no page elsewhere gets anywhere
        origins=cors or (),
        limits=Limits(max_waiting=queue, seconds=seconds),
    )
    listen(app, bound, name, seconds)
    llm.close()
