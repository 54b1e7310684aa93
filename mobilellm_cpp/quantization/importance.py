"""How strong each column of a matrix's inputs is on a text, without torch: from our own libllama.

llama.cpp calls back after each node of a graph that is asked for; those that feed a matrix have the
names below. (quantization/imatrix.py finds the same sums with torch, for files of llama.cpp.)
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import numpy.typing as npt

from ..engine.gguf_file import block_schedule, open_gguf
from ..engine.library import decode, guard, lib, llama_cpp
from ..engine.model import MobileLLM
from ..engine.threads import default_threads
from ..errors import ModelError
from ..quant.mixes import EMBEDDING, HEAD
from .source import Source

Floats = npt.NDArray[np.float32]

TOKENS = 512
OUTPUTS = 8  # each so many tokens one goes through the last block's feed-forward part and the head
NODES = {
    "attn_norm": ("attn_q", "attn_k", "attn_v"),
    "kqv_out": ("attn_output",),
    "ffn_norm": ("ffn_gate", "ffn_up"),
    "ffn_swiglu": ("ffn_down",),
}
LAST = "result_norm"  # what the head multiplies


def _declare(name: str, result: Any) -> Any:
    function = getattr(lib, name)
    function.restype, function.argtypes = result, [ctypes.c_void_p]
    return function


_name = _declare("ggml_get_name", ctypes.c_char_p)
_data = _declare("ggml_get_data", ctypes.c_void_p)
_count = _declare("ggml_nelements", ctypes.c_int64)


def column_importance(source: Source, text: str) -> dict[str, Floats]:
    """The mean squares [columns] of the inputs of the matrices of a float file, summed over the
    executions of a block. Matrices that it cannot say anything of are left out: all of a file that
    libllama does not run."""
    sums: dict[str, Floats] = {}

    def add(matrix: str, rows: Floats) -> None:
        if matrix in source.tensors and len(rows) == source.tensors[matrix].shape[-1]:
            sums[matrix] = sums.get(matrix, np.float32(0)) + rows

    def see(tensor: int, ask: bool) -> bool:
        name, _, layer = _name(tensor).decode("utf-8", "replace").partition("-")
        wanted = name == LAST or (name in NODES and layer.isdigit())
        if ask or not wanted:
            return wanted or not ask
        if name == LAST:
            parts = [EMBEDDING if source.tied else HEAD]
        else:
            parts = [f"blk.{schedule[int(layer)]}.{part}.weight" for part in NODES[name]]
        columns = source.tensors[parts[0]].shape[-1]
        values = (ctypes.c_float * _count(tensor)).from_address(_data(tensor))
        squares = np.square(np.frombuffer(values, np.float32).reshape(-1, columns)).mean(0)
        for part in parts:
            add(part, squares)
        return True

    raised: list[BaseException] = []

    @llama_cpp.ggml_backend_sched_eval_callback  # type: ignore[untyped-decorator]
    def watch(tensor: int, ask: bool, _: object) -> bool:
        try:
            return not raised and see(tensor, ask)
        except BaseException as error:  # Ctrl-C, which ctypes would print and forget
            raised.append(error)
            return False

    with open_gguf(source.path) as file:
        schedule = block_schedule(file)
    try:
        threads = default_threads()  # named, or the best number would be measured first
        with MobileLLM(source.path, n_ctx=TOKENS, n_threads=threads, cache_type="f16") as llm:
            _run(llm, text, watch)
    except ModelError:  # a file that can be rounded, and not run
        return {}
    if raised:
        raise raised[0]
    if source.tied and EMBEDDING in sums:  # as an embedding, all columns of a row count alike
        sums[EMBEDDING] += sums[EMBEDDING].mean()
    means = {name: found.mean() for name, found in sums.items()}
    return {  # a column whose input was zero on this text counts a little
        name: found + np.float32(1e-3) * means[name]
        for name, found in sums.items()
        if 0 < means[name] < np.inf
    }


def _run(llm: MobileLLM, text: str, watch: Any) -> None:
    tokens = llm.tokenize(text[: 8 * TOKENS].encode())[:TOKENS]
    params = type(llm.context_params).from_buffer_copy(llm.context_params)
    params.cb_eval = watch
    params.n_ctx = params.n_batch = params.n_ubatch = max(len(tokens), 32)
    with guard(llm.model_path):
        context = llama_cpp.llama_init_from_model(llm.model, params)
    if not context:
        raise ModelError(f"{llm.model_path} cannot be run")
    batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
    try:
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i] = token, i
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
            batch.logits[i] = i % OUTPUTS == OUTPUTS - 1 or i == len(tokens) - 1
        decode(context, batch)
    finally:
        llama_cpp.llama_batch_free(batch)
        llama_cpp.llama_free(context)
