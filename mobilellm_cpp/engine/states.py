"""Saved states of a context: garbage and those of other models are refused."""

import ctypes
from typing import Any

from ..errors import ModelError
from .library import lib, llama_cpp, reason

lib.mobilellm_state_set.argtypes = [
    llama_cpp.llama_cpp.llama_context_p_ctypes,
    ctypes.c_void_p,
    ctypes.c_size_t,
    llama_cpp.llama_cpp.llama_seq_id,
]
lib.mobilellm_state_set.restype = ctypes.c_bool


def put_state(context: Any, state: Any, sequence: int) -> bool:
    """Puts a state, bytes or an array of ctypes, into a context, or into one of its sequences where
    that is not negative. False for what does not fit: what it was to fill is as it was, or empty.
    The numbers of the cache itself are trusted."""
    return bool(lib.mobilellm_state_set(context, state, len(state), sequence))


def restore_state(context: Any, state: bytes, sequence: int = -1) -> None:
    """put_state that raises ModelError, with the reason."""
    if not isinstance(state, bytes):
        raise ModelError(f"a saved state is bytes, not {type(state).__name__}")
    if not put_state(context, state, sequence):
        raise ModelError(reason() or "the saved state does not fit this context")
