"""How a token is chosen: the keyword arguments that `stream`, `chat` and `Conversation` share."""

from collections.abc import Mapping, Sequence
from typing import Any

from typing_extensions import TypedDict


class Choice(TypedDict, total=False):
    """Keyword arguments of Conversation: those of MobileLLM.stream without max_tokens."""

    temperature: float  # 0 always takes the likeliest token
    top_k: int  # only the k likeliest tokens; 0: all
    top_p: float  # only the likeliest tokens that have this probability together; 1: all
    min_p: float  # only tokens at least this probable, relative to the likeliest; 0: all
    typical_p: float  # locally typical sampling; 1: off
    repeat_penalty: float  # divides the logits of tokens seen lately; 1: off
    frequency_penalty: float  # taken from the logit each time that a token was seen lately; 0: off
    presence_penalty: float  # taken once from the logit of tokens seen lately; 0: off
    seed: int | None  # None: another text each time
    stop: str | Sequence[str]  # the text ends before the first of these
    logit_bias: Mapping[int, float] | None  # added to the logits of tokens, by their ids
    # The form of the answer, at most one of these; see structured.Constraint. A text that ends by
    # itself has it, one that max_tokens or a stop string ends need not.
    json_schema: Mapping[str, Any] | bool | str  # a JSON schema, or its text
    regex: str  # what all of the answer matches, in the syntax of Rust's regex crate
    lark: str  # a Lark grammar
    grammar: Any  # a GBNF grammar: its text, or a llama_cpp.LlamaGrammar
    response_format: Mapping[str, Any] | None  # as in OpenAI's chat completions


class Sampling(Choice, total=False):
    """Keyword arguments of MobileLLM.stream, for functions that pass them on:

    def ask(llm: MobileLLM, question: str, **sampling: Unpack[Sampling]) -> str: ...
    """

    max_tokens: int | None  # None: as many as the context has room for
    logprobs: int | None  # likeliest tokens at each place, kept in Stream.logprobs; None: no record
