"""How a token is chosen: the keyword arguments that `stream`, `chat` and `Conversation` share."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from typing_extensions import TypedDict

from .prompt_lookup import MOST


class Setting(NamedTuple):
    """A number that sampling takes: what it is when left out (None: nothing), from where to where
    it goes, and what it means."""

    kind: type[int] | type[float]
    default: float | None
    least: float
    most: float
    meaning: str


# Checks of arguments and options of the command line are made from these.
SETTINGS = {
    "max_tokens": Setting(int, None, 0, 2**31 - 1, "the longest answer in tokens"),
    "temperature": Setting(float, 0.8, 0, 1e6, "0 always takes the likeliest token"),
    "top_k": Setting(
        int, 40, 0, 2**31 - 1, "consider only so many of the likeliest tokens; 0: all"
    ),
    "top_p": Setting(
        float,
        0.95,
        0,
        1,
        "consider only the likeliest tokens that together have this probability; 1: all",
    ),
    "min_p": Setting(
        float, 0.05, 0, 1, "ignore tokens less probable than this share of the likeliest; 0: none"
    ),
    "typical_p": Setting(float, 1.0, 0, 1, "locally typical sampling; 1: off"),
    "repeat_penalty": Setting(
        float, 1.0, 1e-3, 1e3, "divide the logits of recent tokens by this; 1: off"
    ),
    "frequency_penalty": Setting(
        float,
        0.0,
        -1e3,
        1e3,
        "subtract this from a token's logit each time it occurred lately; 0: off",
    ),
    "presence_penalty": Setting(
        float, 0.0, -1e3, 1e3, "subtract this once from the logits of recent tokens; 0: off"
    ),
    "mirostat_mode": Setting(int, 0, 0, 2, "1 or 2: Mirostat instead of top_k to min_p; 0: off"),
    "mirostat_tau": Setting(float, 5.0, 0, 1e3, "the surprise that Mirostat aims at, in bits"),
    "mirostat_eta": Setting(float, 0.1, 0, 1e3, "how fast Mirostat learns"),
    "speculative": Setting(
        int,
        MOST,
        0,
        MOST,
        "draft up to so many tokens from the text itself; the answer is the same; 0: none",
    ),
    "seed": Setting(int, None, 0, 2**32 - 1, "the same seed gives the same text"),
}


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
    mirostat_mode: int  # 1, 2: Mirostat in the place of top_k, top_p, min_p, typical_p; 0: off
    mirostat_tau: float  # the surprise that Mirostat aims at, in bits
    mirostat_eta: float  # how fast Mirostat learns
    speculative: int  # up to so many tokens are drafted from the text itself; 0: none
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
