"""How weights are brought to the caches changes no bit of the logits."""

import ctypes
import hashlib

import pytest
from sessions import TOKENS, Session, load

from mobilellm_cpp.engine.library import lib

HINTS = range(5)  # none, nta, t2, t1, t0
DISTANCES = (0, 1, 2, 4, 1000)  # times 64 columns

lib.mobilellm_streaming_force.argtypes = [ctypes.c_int32, ctypes.c_int64]
lib.mobilellm_streaming_force.restype = None
lib.mobilellm_streaming_text.restype = ctypes.c_char_p


def digest(llm, n_threads):
    """Of the logits of single tokens, and of a batch."""
    session = Session(llm, n_ctx=256, n_threads=n_threads, n_threads_batch=n_threads)
    rows = [session.run(TOKENS[:8]), session.whole(TOKENS[:40], first=8)]
    session.close()
    return hashlib.sha256(b"".join(row.tobytes() for row in rows)).hexdigest()


@pytest.mark.parametrize("name", ["q4_0", "shared"])
def test_the_same_bits_for_every_hint_distance_and_thread_count(files, name):
    want = digest(load(files[name]), 1)
    try:
        for hint in HINTS:
            for ahead in DISTANCES if hint else (0,):
                lib.mobilellm_streaming_force(hint, ahead)
                assert lib.mobilellm_streaming_text().startswith(b"forced: ")
                llm = load(files[name])
                for n_threads in (1, 2, 3):
                    assert digest(llm, n_threads) == want, (hint, ahead, n_threads)
    finally:
        lib.mobilellm_streaming_force(-1, 0)
