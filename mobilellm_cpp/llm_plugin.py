"""A plug-in for Simon Willison's `llm` (0.36 or later), found by it where both are installed.

    llm -m mobilellm-demo "Who are you?"
    llm mobilellm register facebook/MobileLLM-125M --alias small
    llm -m small --schema 'name, age int' "A person:"

Models: the demo, those that were registered (files, folders, hub ids), and hub ids that were
converted before. Each loads when it is first asked and stays for the process."""

import functools
import json
from collections.abc import AsyncGenerator, Iterable, Iterator
from pathlib import Path
from typing import Any

import click
import llm
import pydantic

from .cache import resolve
from .engine.sampling_types import SETTINGS, Setting
from .errors import MobileLLMError
from .kept import kept


def _option(setting: Setting) -> Any:
    least, most, meaning = setting.least, setting.most, setting.meaning
    return setting.kind | None, pydantic.Field(default=None, ge=least, le=most, description=meaning)


_FIELDS: dict[str, Any] = {name: _option(setting) for name, setting in SETTINGS.items()}
OPTIONS = pydantic.create_model("Options", __base__=llm.Options, **_FIELDS)


@functools.cache
def _load(model: str | None) -> Any:
    from .engine.model import MobileLLM

    try:
        return MobileLLM(resolve(model))
    except MobileLLMError as error:
        raise llm.ModelError(str(error)) from None


class _Shared:
    """What the models for threads and for asyncio share."""

    can_stream = True
    supports_schema = True
    Options = OPTIONS

    def __init__(self, name: str, model: str | None) -> None:
        self.model_id = name
        self._model = model


def _asked(prompt: Any) -> tuple[list[dict[str, str]], dict[str, Any]]:
    """The messages of a conversation, and the other arguments of stream."""
    messages = [
        {
            "role": message.role,
            "content": "".join(getattr(part, "text", "") for part in message.parts),
        }
        for message in prompt.messages
    ]
    given = prompt.options.model_dump(exclude_none=True)
    if prompt.schema:
        given["json_schema"] = prompt.schema
    return messages, given


def _done(response: Any, stream: Any) -> None:
    usage = stream.usage
    response.set_usage(input=usage["prompt_tokens"], output=usage["completion_tokens"])


class Model(_Shared, llm.Model):  # type: ignore[misc]
    """One model for `llm`."""

    def execute(
        self, prompt: Any, stream: bool, response: Any, conversation: Any = None
    ) -> Iterator[str]:
        messages, given = _asked(prompt)
        try:
            pieces = _load(self._model).stream(messages, **given)
            yield from pieces
        except MobileLLMError as error:
            raise llm.ModelError(str(error)) from None
        _done(response, pieces)


class AsyncModel(_Shared, llm.AsyncModel):  # type: ignore[misc]
    """The same for asyncio."""

    async def execute(
        self, prompt: Any, stream: bool, response: Any, conversation: Any = None
    ) -> AsyncGenerator[str, None]:
        from .engine.aio import in_thread

        messages, given = _asked(prompt)
        model = await in_thread(lambda: _load(self._model))
        try:
            async with model.astream(messages, **given) as pieces:
                async for piece in pieces:
                    yield piece
        except MobileLLMError as error:
            raise llm.ModelError(str(error)) from None
        _done(response, pieces)


class Embeddings(llm.EmbeddingModel):  # type: ignore[misc]
    """A model's vectors for `llm embed`."""

    batch_size = 64

    def __init__(self, name: str, model: str | None) -> None:
        self.model_id = name
        self._model = model

    def embed_batch(self, items: Iterable[str | bytes]) -> Iterator[list[float]]:
        try:
            vectors = _load(self._model).embeddings([str(item) for item in items], truncate=True)
        except MobileLLMError as error:
            raise llm.ModelError(str(error)) from None
        return iter(vectors.tolist())


def _registry() -> Path:
    folder: Path = llm.user_dir()
    return folder / "mobilellm.json"


def _registered() -> dict[str, str]:
    """Names and what they stand for."""
    try:
        found = json.loads(_registry().read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _models() -> dict[str, str | None]:
    """The ids of all models and their MODEL arguments."""
    ids = {each.source for each in kept() if each.source and not Path(each.source).is_absolute()}
    return {"mobilellm-demo": None, **{name: name for name in sorted(ids)}, **_registered()}


@llm.hookimpl
def register_models(register: Any) -> None:
    for name, model in _models().items():
        register(Model(name, model), AsyncModel(name, model))


@llm.hookimpl
def register_embedding_models(register: Any) -> None:
    for name, model in _models().items():
        register(Embeddings(name, model))


@llm.hookimpl
def register_commands(cli: Any) -> None:
    @cli.group()
    def mobilellm() -> None:
        """Models that run through mobilellm-cpp."""

    @mobilellm.command()
    @click.argument("model")
    @click.option("--alias", help="The name for llm -m; by default the model's own.")
    def register(model: str, alias: str | None) -> None:
        """Register a GGUF file, a checkpoint folder or a hub id."""
        path = Path(model).expanduser()
        if path.exists():
            model = str(path.resolve())
        try:
            resolve(model)
        except MobileLLMError as error:
            raise click.ClickException(str(error)) from None
        name = alias or (path.stem if path.exists() else model)
        _registry().parent.mkdir(parents=True, exist_ok=True)
        _registry().write_text(json.dumps({**_registered(), name: model}, indent=1))
        click.echo(f"{name}: {model}")

    @mobilellm.command()
    @click.argument("name")
    def remove(name: str) -> None:
        """Forget a registered model; its file stays."""
        known = _registered()
        if known.pop(name, None) is None:
            raise click.ClickException(f"{name} is not registered")
        _registry().write_text(json.dumps(known, indent=1))

    @mobilellm.command(name="list")
    def list_models() -> None:
        """List the models and what they stand for."""
        for name, model in _models().items():
            click.echo(f"{name}: {model or 'the demo model'}")
