"""The typed base of MobileLLM says what llama_cpp.Llama takes."""

import inspect
import types
from typing import Union, get_args, get_origin, get_type_hints

import pytest

from mobilellm_cpp.engine import llama_base
from mobilellm_cpp.engine.library import llama_cpp

Llama = llama_cpp.Llama
NAMES = {
    **vars(llama_cpp.llama_chat_format),
    **vars(llama_cpp.llama_tokenizer),
    **vars(llama_cpp.llama),
}
OWN = {"n_ctx", "n_threads", "flash_attn", "verbose"}  # MobileLLM's constructor names them itself


def plain(kind):
    """A type in one spelling: List[int] is list[int], Optional[int] is int | None."""
    origin = get_origin(kind)
    if origin is None:
        return kind
    if origin in (Union, types.UnionType):
        return frozenset(map(plain, get_args(kind)))
    return origin, *map(plain, get_args(kind))


@pytest.mark.parametrize(
    "function, arguments, left_out",
    [
        (Llama.__init__, llama_base.LlamaArguments, {"self", "model_path", "kwargs", *OWN}),
        (Llama.__init__, llama_base.ModelArguments, {"self", "model_path", "kwargs"}),
        (Llama.create_completion, llama_base.TextCompletion, {"self", "prompt", "stream"}),
        (Llama.__call__, llama_base.TextCompletion, {"self", "prompt", "stream"}),
        (Llama.create_chat_completion, llama_base.ChatCompletion, {"self", "messages", "stream"}),
    ],
)
def test_arguments(function, arguments, left_out):
    signature = inspect.signature(function, eval_str=True)
    real = {n: plain(p.annotation) for n, p in signature.parameters.items() if n not in left_out}
    typed = {n: plain(t) for n, t in get_type_hints(arguments, localns=NAMES).items()}
    typed.pop("cache_type", None)  # which llama_cpp.Llama does not have
    assert typed.keys() == real.keys()
    wider = {"functions", "function_call", "tools", "tool_choice", "response_format"}  # Json
    wider |= {"n_ctx", "n_threads", "flash_attn", "verbose"}  # MobileLLM's own meaning
    assert {n: t for n, t in typed.items() if n not in wider} == {
        n: t for n, t in real.items() if n not in wider
    }
