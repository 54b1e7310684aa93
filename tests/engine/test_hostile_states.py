"""Saved states that are spoiled, truncated, or of another model: an exception, and the process and
its memory stay as they were."""

import json
import subprocess
import sys

import pytest
from checkpoints import make_checkpoint, make_pro

from mobilellm_cpp import convert_checkpoint

SPOIL = """
import json, random, resource, sys
from mobilellm_cpp import MobileLLM, ModelError
from mobilellm_cpp.engine.library import lib, llama_cpp as c
from mobilellm_cpp.engine.states import restore_state

TOKENS = list(range(1, 20))

def context(path):
    llm = MobileLLM(path, n_ctx=64, n_threads=1)
    params = c.llama_context_default_params()
    params.n_ctx, params.n_threads, params.n_threads_batch = 64, 1, 1
    llm.raw = c.llama_init_from_model(llm.model, params)
    assert decode(llm) == 0
    return llm

def decode(llm):
    tokens = (c.llama_token * len(TOKENS))(*TOKENS)
    return lib.mobilellm_decode(llm.raw, c.llama_batch_get_one(tokens, len(TOKENS)))

def use(llm):
    c.llama_memory_seq_rm(c.llama_get_memory(llm.raw), 0, -1, -1)
    return decode(llm)

def saved(llm, sequence):
    whole = sequence < 0
    size = c.llama_state_get_size(llm.raw) if whole else c.llama_state_seq_get_size(llm.raw, 0)
    buffer = (c.ctypes.c_uint8 * size)()
    if whole:
        size = c.llama_state_get_data(llm.raw, buffer, size)
    else:
        size = c.llama_state_seq_get_data(llm.raw, buffer, size, sequence)
    return bytes(buffer)[:size]

path, other, sequence = sys.argv[1], sys.argv[2], int(sys.argv[3])
llm, neighbour = context(path), context(other)
state = saved(llm, sequence)
assert len(state) > 4000
restore_state(llm.raw, state, sequence)
assert saved(llm, sequence) == state

before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
wrong = [b"", b"x", b"<html>not found</html>" * 99, bytes(1000), b"\\xff" * 1000, state + b"x"]
wrong += [state[: len(state) * n // 20] for n in range(20)] + [saved(neighbour, sequence)]
refused = []
for spoiled in wrong:
    try:
        restore_state(llm.raw, spoiled, sequence)
        print("TAKEN", wrong.index(spoiled))
    except ModelError as error:
        refused.append(str(error))
    assert use(llm) == 0
print(json.dumps(refused))

rng = random.Random(1)
for _ in range(1500):
    spoiled = bytearray(state)
    for _ in range(rng.choice([1, 1, 2, 5])):
        near = rng.random() < 0.8  # most of what is trusted stands in front
        at = rng.randrange(min(400, len(spoiled)) if near else len(spoiled))
        width = rng.choice([1, 1, 4])
        value = rng.choice([rng.randbytes(width), bytes(width), b"\\xff" * width, b"\\x7f" * width])
        spoiled[at : at + width] = value
    try:
        restore_state(llm.raw, bytes(spoiled), sequence)
    except ModelError as error:
        pass
    use(llm)
restore_state(llm.raw, state, sequence)
assert len(saved(llm, sequence)) == len(state)
assert use(llm) == 0
c.llama_free(llm.raw)
c.llama_free(neighbour.raw)

# as a caller of MobileLLM hands it over: what does not fit is computed again
llm.eval(TOKENS)
sound = llm.save_state()
for spoiled in wrong[:6] + [rng.randbytes(500) for _ in range(20)]:
    sound.llama_state, sound.llama_state_size = spoiled, len(spoiled)
    llm.load_state(sound)
    llm.eval([3, 4])
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("states")
    make_checkpoint(folder / "a", dtype="f32")
    make_checkpoint(folder / "b", dtype="f32", layers=3)
    make_pro(folder / "pro", dtype="f32")
    for name in ("a", "b", "pro"):
        convert_checkpoint(folder / name, folder / f"{name}.gguf", type="f32")
    return folder


@pytest.mark.parametrize("sequence", [-1, 0])
@pytest.mark.parametrize("model", ["a", "pro"])
def test_spoiled_states(files, model, sequence):
    command = [sys.executable, "-c", SPOIL, files / f"{model}.gguf", files / "b.gguf"]
    done = subprocess.run(
        [*map(str, command), str(sequence)], capture_output=True, text=True, cwd="/", timeout=300
    )
    assert done.returncode == 0, done.stderr[-1500:]
    refused, megabytes = done.stdout.splitlines()
    assert all(sentence.startswith("the saved state ") for sentence in json.loads(refused))
    assert int(megabytes) < 100
