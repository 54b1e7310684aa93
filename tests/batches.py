"""Batches of several sequences through the C API, which Llama itself does not offer."""

from typing import Any

import numpy as np

from mobilellm_cpp import MobileLLM
from mobilellm_cpp.engine.library import llama_cpp


def decode(
    llm: MobileLLM,
    entries: list[tuple[int, int, int]],
    wanted: list[int] | None = None,
    context: Any = None,
) -> np.ndarray:
    """float32 [len(wanted), n_vocab]: logits after a batch of (token, position, sequence), of those
    numbered in `wanted`, or of all. context: a llama_context of the model, by default its own."""
    wanted = list(range(len(entries))) if wanted is None else wanted
    context = context or llm.ctx
    batch = llama_cpp.llama_batch_init(len(entries), 0, 1)
    try:
        batch.n_tokens = len(entries)
        for i, (token, position, sequence) in enumerate(entries):
            batch.token[i] = token
            batch.pos[i] = position
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = sequence
            batch.logits[i] = i in wanted
        assert llama_cpp.llama_decode(context, batch) == 0
        logits = llama_cpp.llama_get_logits(context)
        return np.ctypeslib.as_array(logits, (len(wanted), llm.n_vocab())).copy()
    finally:
        llama_cpp.llama_batch_free(batch)
