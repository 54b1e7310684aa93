"""llama_cpp.Llama as the base class of MobileLLM, with the types that it lacks.

Type checkers see what llama_cpp's own annotations leave open: which keyword arguments there are,
and what comes back with and without `stream=True`. tests/types hold names and types here to the
real ones. At run time it is llama_cpp.Llama but for what its constructor does.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, overload

from typing_extensions import TypedDict, Unpack

from ..quant.weight_type import CacheType
from .templates import ChatTemplate

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
    cache_type: CacheType | None
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
    Formatter: Any

    class LlamaBase(Llama):
        _model: Any  # what is beneath has few types
        _ctx: Any
        _batch: Any

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
    # Llama's constructor points stdout and stderr of the process to /dev/null while it loads,
    # without a lock, and refuses a file whose chat template is broken. LlamaBase runs that very
    # constructor, which finds other things under the names it uses; llama_cpp stays as it is.
    import os
    import types
    from contextlib import nullcontext

    from . import ahead
    from .library import llama_cpp
    from .templates import ChatTemplate

    def _with(function, **names):
        """A copy of a function that finds other things under some names of its module."""
        copy = types.FunctionType(
            function.__code__,
            {**function.__globals__, **names},
            function.__name__,
            function.__defaults__,
            function.__closure__,
        )
        copy.__kwdefaults__ = function.__kwdefaults__
        copy.__doc__ = function.__doc__
        return copy

    def _changed(module, **names):
        """What a module holds, with some names changed."""
        return types.SimpleNamespace(**{**vars(module), **names})

    def _leave(disable=True):
        """In the place of suppress_stdout_stderr: what there is to silence goes through the log."""
        return nullcontext()

    def _load(path, params):
        """llama_model_load_from_file; a file that was loaded ahead is there."""
        default = llama_cpp.llama_cpp.llama_model_default_params()
        default.n_gpu_layers, default.load_mode = 0, llama_cpp.LLAMA_LOAD_MODE_MMAP
        model = ahead.take(os.fsdecode(path), params, default)
        return model or llama_cpp.llama_cpp.llama_model_load_from_file(path, params)

    class _Model(llama_cpp._internals.LlamaModel):
        __init__ = _with(
            llama_cpp._internals.LlamaModel.__init__,
            suppress_stdout_stderr=_leave,
            llama_cpp=_changed(llama_cpp.llama_cpp, llama_model_load_from_file=_load),
        )

    class _Batch(llama_cpp._internals.LlamaBatch):
        # Nobody uses it, for sequences.py decodes; with a place for each token of the context and
        # for each of a batch it is 16 MB in 512 pieces.
        def __init__(self, *, n_tokens, n_seq_max, **others):
            super().__init__(n_tokens=1, n_seq_max=1, **others)

    class Formatter:
        """A chat formatter that compiles its template when it is used, and bounds what that does.
        An end-of-text token ends an answer without a stopping criterion of its own."""

        def __init__(self, template, eos_token, bos_token, **_):
            self._template = ChatTemplate(template, bos_token=bos_token, eos_token=eos_token)
            self._stop = [eos_token] if eos_token else []

        def __call__(self, *, messages, **variables):
            return llama_cpp.llama_chat_format.ChatFormatterResponse(
                prompt=self._template.render(messages, **variables),
                stop=list(self._stop),
                added_special=True,
            )

        def to_chat_handler(self):
            make = llama_cpp.llama_chat_format.chat_formatter_to_chat_completion_handler
            return make(self)

    class LlamaBase(llama_cpp.Llama):
        __init__ = _with(
            llama_cpp.Llama.__init__,
            suppress_stdout_stderr=_leave,
            internals=_changed(llama_cpp._internals, LlamaModel=_Model, LlamaBatch=_Batch),
            llama_chat_format=_changed(llama_cpp.llama_chat_format, Jinja2ChatFormatter=Formatter),
        )
