"""llama_cpp.Llama as the base class of MobileLLM, with the types that it lacks.

At run time LlamaBase is llama_cpp.Llama itself. Type checkers see a subclass of it that says what
its own annotations leave open: which keyword arguments there are, and what comes back with and
without `stream=True`. tests/types hold the names, defaults and types here to the real ones.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, overload

from typing_extensions import TypedDict, Unpack

if TYPE_CHECKING:
    from llama_cpp import (
        CreateChatCompletionResponse,
        CreateCompletionResponse,
        Llama,
        LogitsProcessorList,
        StoppingCriteriaList,
    )
    from llama_cpp.llama_chat_format import LlamaChatCompletionHandler
    from llama_cpp.llama_grammar import LlamaGrammar
    from llama_cpp.llama_speculative import LlamaDraftModel
    from llama_cpp.llama_tokenizer import BaseLlamaTokenizer

Json = Mapping[str, object]  # an object of JSON; wider than llama_cpp's, which refuse variables


class LlamaArguments(TypedDict, total=False):
    """Arguments of llama_cpp.Llama that MobileLLM passes on as they are."""

    n_gpu_layers: int
    split_mode: int
    main_gpu: int
    tensor_split: list[float] | None
    vocab_only: bool
    use_mmap: bool
    use_mlock: bool
    kv_overrides: dict[str, bool | int | float | str] | None
    seed: int
    n_batch: int
    n_ubatch: int
    n_threads_batch: int | None
    rope_scaling_type: int | None
    pooling_type: int
    attention_type: int
    rope_freq_base: float
    rope_freq_scale: float
    yarn_ext_factor: float
    yarn_attn_factor: float
    yarn_beta_fast: float
    yarn_beta_slow: float
    yarn_orig_ctx: int
    logits_all: bool
    embedding: bool
    offload_kqv: bool
    op_offload: bool | None
    swa_full: bool | None
    no_perf: bool
    last_n_tokens_size: int
    lora_base: str | None
    lora_scale: float
    lora_path: str | None
    numa: bool | int
    chat_format: str | None
    chat_handler: "LlamaChatCompletionHandler | None"
    draft_model: "LlamaDraftModel | None"
    tokenizer: "BaseLlamaTokenizer | None"
    type_k: int | None
    type_v: int | None
    spm_infill: bool


class ModelArguments(LlamaArguments, total=False):
    """Keyword arguments of MobileLLM, for functions that pass them on."""

    n_ctx: int
    n_threads: int
    flash_attn: bool | None
    verbose: bool


class _Completion(TypedDict, total=False):
    """What text and chat completions share."""

    max_tokens: int | None
    temperature: float
    top_p: float
    min_p: float
    typical_p: float
    stop: str | list[str] | None
    frequency_penalty: float
    presence_penalty: float
    repeat_penalty: float
    top_k: int
    seed: int | None
    tfs_z: float
    mirostat_mode: int
    mirostat_tau: float
    mirostat_eta: float
    model: str | None
    logits_processor: "LogitsProcessorList | None"
    grammar: "LlamaGrammar | None"
    logit_bias: dict[int, float] | None


class TextCompletion(_Completion, total=False):
    """Keyword arguments of create_completion, without `stream`."""

    suffix: str | None
    logprobs: int | None
    echo: bool
    stopping_criteria: "StoppingCriteriaList | None"


class ChatCompletion(_Completion, total=False):
    """Keyword arguments of create_chat_completion, without `stream`."""

    functions: Sequence[Json] | None
    function_call: str | Json | None
    tools: Sequence[Json] | None
    tool_choice: str | Json | None
    response_format: Json | None
    logprobs: bool | None
    top_logprobs: int | None


if TYPE_CHECKING:

    class LlamaBase(Llama):
        # What follows the first argument is given by name: there are 25 of them, in an order that
        # changes between versions of llama_cpp.
        @overload  # type: ignore[override]
        def create_completion(
            self,
            prompt: str | list[int],
            *,
            stream: Literal[False] = False,
            **arguments: Unpack[TextCompletion],
        ) -> CreateCompletionResponse: ...
        @overload
        def create_completion(
            self,
            prompt: str | list[int],
            *,
            stream: Literal[True],
            **arguments: Unpack[TextCompletion],
        ) -> Iterator[CreateCompletionResponse]: ...
        @overload
        def create_completion(
            self, prompt: str | list[int], *, stream: bool, **arguments: Unpack[TextCompletion]
        ) -> CreateCompletionResponse | Iterator[CreateCompletionResponse]: ...
        def create_completion(self, *_: Any, **__: Any) -> Any:
            """The continuation of a text in OpenAI's form; with stream=True, in pieces."""

        @overload  # type: ignore[override]
        def __call__(
            self,
            prompt: str | list[int],
            *,
            stream: Literal[False] = False,
            **arguments: Unpack[TextCompletion],
        ) -> CreateCompletionResponse: ...
        @overload
        def __call__(
            self,
            prompt: str | list[int],
            *,
            stream: Literal[True],
            **arguments: Unpack[TextCompletion],
        ) -> Iterator[CreateCompletionResponse]: ...
        @overload
        def __call__(
            self, prompt: str | list[int], *, stream: bool, **arguments: Unpack[TextCompletion]
        ) -> CreateCompletionResponse | Iterator[CreateCompletionResponse]: ...
        def __call__(self, *_: Any, **__: Any) -> Any:
            """The continuation of a text in OpenAI's form; with stream=True, in pieces."""

        @overload  # type: ignore[override]
        def create_chat_completion(
            self,
            messages: Sequence[Json],
            *,
            stream: Literal[False] = False,
            **arguments: Unpack[ChatCompletion],
        ) -> CreateChatCompletionResponse: ...
        @overload
        def create_chat_completion(
            self,
            messages: Sequence[Json],
            *,
            stream: Literal[True],
            **arguments: Unpack[ChatCompletion],
        ) -> Iterator[Any]: ...
        @overload
        def create_chat_completion(
            self, messages: Sequence[Json], *, stream: bool, **arguments: Unpack[ChatCompletion]
        ) -> CreateChatCompletionResponse | Iterator[Any]: ...
        def create_chat_completion(self, *_: Any, **__: Any) -> Any:
            """The answer to messages in OpenAI's form; with stream=True, in pieces, whose type is
            left open: of llama_cpp's type for them no key may be asked."""

        def create_chat_completion_openai_v1(self, *args: Any, **kwargs: Any) -> Any:
            """The answer to messages as the openai package's own classes."""

        def embed(
            self,
            input: str | list[str],
            normalize: bool = False,
            truncate: bool = True,
            return_count: bool = False,
        ) -> Any:
            """Embeddings of a text or texts as lists of floats, for a model loaded with
            embedding=True."""

        def eval(self, tokens: Sequence[int]) -> None:
            """Evaluates tokens after those that were evaluated before."""

        def reset(self) -> None:
            """Forgets the tokens that were evaluated."""

        def set_cache(self, cache: Any) -> None:
            """Sets the cache of prompts."""

        def set_seed(self, seed: int) -> None:
            """Sets the seed of the next answer."""

else:
    from .library import llama_cpp

    LlamaBase = llama_cpp.Llama
