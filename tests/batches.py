"""Batches of several sequences through the C API, which Llama itself does not offer."""

import numpy as np

from mobilellm_cpp import MobileLLM
from mobilellm_cpp.library import llama_cpp


def decode(llm: MobileLLM, entries: list[tuple[int, int, int]]) -> np.ndarray:
    """float32 [len(entries), n_vocab]: logits after one batch of (token, position, sequence)."""
    batch = llama_cpp.llama_batch_init(len(entries), 0, 1)
    try:
        batch.n_tokens = len(entries)
        for i, (token, position, sequence) in enumerate(entries):
            batch.token[i] = token
            batch.pos[i] = position
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = sequence
            batch.logits[i] = True
        assert llama_cpp.llama_decode(llm.ctx, batch) == 0
        logits = llama_cpp.llama_get_logits(llm.ctx)
        return np.ctypeslib.as_array(logits, (len(entries), llm.n_vocab())).copy()
    finally:
        llama_cpp.llama_batch_free(batch)
