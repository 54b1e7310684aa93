"""Many prompts in one call: their answers are decoded together, by the thread that calls.

As many as have a place in the KV cache go on at a time: a token of each in turn, which one step
computes for all, and a piece of one prompt in between. Each answer is what the prompt gets alone,
to the last bit."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol, overload

from typing_extensions import Unpack

from ..errors import ContextError, ModelError
from .sampling_types import Sampling

if TYPE_CHECKING:
    from .answers import Answer, Stream
    from .messages import Message

    Prompt = str | Sequence[Message] | Sequence[int]


class _Model(Protocol):
    @property
    def n_slots(self) -> int: ...
    @property
    def computes_together(self) -> bool: ...
    def n_ctx(self) -> int: ...
    @property
    def stream(self) -> "Callable[..., Stream]": ...
    def batch_as_completed(
        self,
        prompts: "Iterable[Prompt]",
        *,
        seeds: Iterable[int] | None = None,
        return_exceptions: bool = False,
        **sampling: Unpack[Sampling],
    ) -> "Iterator[tuple[int, Answer | ModelError]]": ...


class BatchCalls:
    """The calls of MobileLLM for many prompts."""

    @overload
    def batch(
        self: _Model,
        prompts: "Iterable[Prompt]",
        *,
        seeds: Iterable[int] | None = None,
        return_exceptions: Literal[False] = False,
        **sampling: Unpack[Sampling],
    ) -> "list[Answer]": ...
    @overload
    def batch(
        self: _Model,
        prompts: "Iterable[Prompt]",
        *,
        seeds: Iterable[int] | None = None,
        return_exceptions: bool,
        **sampling: Unpack[Sampling],
    ) -> "list[Answer | ModelError]": ...
    def batch(
        self: _Model,
        prompts: "Iterable[Prompt]",
        *,
        seeds: Iterable[int] | None = None,
        return_exceptions: bool = False,
        **sampling: Unpack[Sampling],
    ) -> Any:
        """The continuations of texts (or of token ids) and the answers to messages, in the order of
        prompts.

        seeds: one for each prompt, in the place of the one in sampling, whose arguments are those
        of stream. Raises ModelError where a prompt is not sound; with return_exceptions the error
        stands in the place of that answer.
        """
        found = self.batch_as_completed(
            prompts, seeds=seeds, return_exceptions=return_exceptions, **sampling
        )
        return [answer for _, answer in sorted(found, key=lambda pair: pair[0])]

    def batch_as_completed(
        self: _Model,
        prompts: "Iterable[Prompt]",
        *,
        seeds: Iterable[int] | None = None,
        return_exceptions: bool = False,
        **sampling: Unpack[Sampling],
    ) -> "Iterator[tuple[int, Answer | ModelError]]":
        """batch, as an iterator of pairs: the number of a prompt and its answer, once it is there.
        Prompts are taken when there is a place for them, so there may be any number of them."""
        if isinstance(prompts, str):
            raise ModelError("batch takes prompts, not one text")
        given = iter(seeds) if seeds is not None else None
        waiting = iter(enumerate(prompts))
        going: dict[int, _Going] = {}
        more = True
        try:
            while more or going:
                while more and len(going) < self.n_slots:
                    number, prompt = next(waiting, (-1, None))
                    more = number >= 0
                    if not more:
                        break
                    try:
                        if given is not None:
                            sampling["seed"] = _seed(given, number)
                        going[number] = _Going(self.stream(prompt, **sampling))
                    except ModelError as error:
                        if not return_exceptions:
                            raise _of_prompt(number, error) from None
                        yield number, error
                for number, answer in _round(self, going, return_exceptions):
                    yield number, answer
        finally:
            for one in going.values():
                one.stream.close()


class _Going:
    def __init__(self, stream: "Stream") -> None:
        self.stream = stream
        self.text: list[str] = []

    def answer(self) -> "Answer":
        from .answers import Answer

        return Answer.of("".join(self.text), self.stream)


def _round(
    llm: _Model, going: dict[int, _Going], return_exceptions: bool
) -> "Iterator[tuple[int, Answer | ModelError]]":
    """A token of each answer that the cache has room for, and a step of one prompt; those that
    ended."""
    room, reading = llm.n_ctx(), None
    active: list[int] = []
    for number, one in going.items():
        room -= one.stream.n_tokens
        if active and (room < 0 or not llm.computes_together):
            break
        active.append(number)
        if one.stream.reads:
            reading = number if reading is None else reading
    active = [n for n in active if not going[n].stream.reads]
    for number in [*active, *([] if reading is None else [reading])]:
        one = going[number]
        try:
            one.text.append(one.stream.advance())
        except StopIteration:
            del going[number]
            yield number, one.answer()
        except ModelError as error:
            del going[number]
            if not return_exceptions:
                raise _of_prompt(number, error) from None
            yield number, error


def _of_prompt(number: int, error: ModelError) -> ModelError:
    if isinstance(error, ContextError):
        return ContextError(f"prompt {number}: {error.said}")
    return ModelError(f"prompt {number}: {error}")


def _seed(seeds: Iterator[int], number: int) -> int:
    for seed in seeds:
        return seed
    raise ModelError(f"there is no seed for prompt {number}")
