"""GBNF grammars as samplers: one that cannot be followed is refused, where upstream gives NULL."""

from typing import Any

from ..errors import ModelError
from .library import lib, llama_cpp, reason

lib.mobilellm_grammar_init.argtypes = llama_cpp.llama_cpp.llama_sampler_init_grammar.argtypes
lib.mobilellm_grammar_init.restype = llama_cpp.llama_cpp.llama_sampler_p_ctypes


def checked_grammar(vocab: Any, grammar: Any) -> Any:
    """A sampler that allows what a llama_cpp.LlamaGrammar does, for the chain of samplers that
    will own it. Raises ModelError, with the reason, for a grammar that is not GBNF, names a rule
    that it does not define, has left recursion, or needs memory without end."""
    try:
        text, root = grammar._grammar.encode(), grammar._root.encode()
    except (AttributeError, UnicodeEncodeError):
        raise ModelError("the grammar is not a LlamaGrammar of UTF-8 text") from None
    if b"\0" in text:
        raise ModelError("the grammar holds a zero byte")
    sampler = lib.mobilellm_grammar_init(vocab, text, root)
    if not sampler:
        raise ModelError(reason() or "the grammar cannot be followed")
    return sampler
