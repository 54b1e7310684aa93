"""Many callers of one model, in any order and from any thread: each gets what it gets alone."""

import gc
import os
import random
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sessions import SHAPE

from mobilellm_cpp import MobileLLM, ModelError, convert_checkpoint
from mobilellm_cpp.cache import DEMO
from mobilellm_cpp.engine.inherited import _COPY
from mobilellm_cpp.engine.places import Places
from mobilellm_cpp.engine.sequence_state import FEW

TEXT = "the quick brown fox jumps over a lazy dog and asks who bakes the bread here"
WORDS = TEXT.split()


def prompt(seed: int) -> str:
    """A text of 1 to 60 words; many begin alike."""
    draw = random.Random(seed)
    start = WORDS[: draw.choice([0, 5, 12])]
    return " ".join(start + draw.choices(WORDS, k=draw.randint(1, 48)))


KINDS = ("stream", "sampled", "completion", "generate", "logits", "embeddings", "state")


def ask(llm: MobileLLM, kind: str, seed: int) -> object:
    """One call of each kind, whose result depends on the seed alone."""
    text = prompt(seed)
    if kind == "stream":
        return "".join(llm.stream(text, max_tokens=12, temperature=0.0))
    if kind == "sampled":
        return "".join(llm.stream(text, max_tokens=12, temperature=1.2, top_k=0, seed=seed))
    if kind == "completion":
        made = llm(text, max_tokens=10, temperature=0.9, repeat_penalty=1.2, seed=seed)
        return made["choices"][0]["text"]
    if kind == "generate":
        tokens = llm.generate(llm.tokenize(text.encode()), temp=0.0)
        return [next(tokens) for _ in range(10)]
    if kind == "logits":
        return llm.logits(llm.tokenize(text.encode())).tobytes()
    if kind == "embeddings":
        return llm.embeddings([text, text[: len(text) // 2 + 1]]).tobytes()
    view = llm._view()  # the low-level calls, on a state of their own
    view.eval(llm.tokenize(text.encode()))
    state = view.save_state()
    first = view.sample(temp=0.0)
    view.reset()
    view.load_state(state)
    view.eval([first])
    return first, view.sample(temp=0.0)


def opened(files, name: str, n_threads: int) -> MobileLLM:
    """A model; `ordinary` is one that does not run in the fused step."""
    other = {"kv_overrides": {"llama.logit_scale": 1.0}} if name == "ordinary" else {}
    file = files["f32" if name == "ordinary" else name]
    return MobileLLM(file, n_ctx=256, n_threads=n_threads, **other)


@pytest.fixture(scope="module")
def alone(files):
    """What a call gives on a model of its own."""
    known: dict[tuple[str, str, int], object] = {}

    def result(name: str, kind: str, seed: int) -> object:
        key = (name, kind, seed)
        if key not in known:
            with opened(files, name, 1) as llm:
                known[key] = ask(llm, kind, seed)
        return known[key]

    return result


@pytest.fixture(scope="module", params=["shared", "llama", "f16", "ordinary", "pro"])
def shared(request, files):
    with opened(files, request.param, 2) as llm:
        yield request.param, llm
        assert llm.computes_together == (request.param != "ordinary")


def test_sixteen_threads(shared, alone):
    name, llm = shared
    work = [(KINDS[i % len(KINDS)], i % 9) for i in range(56)]
    random.Random(1).shuffle(work)
    with ThreadPoolExecutor(16) as pool:
        got = list(pool.map(lambda item: ask(llm, *item), work))
    for item, result in zip(work, got, strict=True):
        assert result == alone(name, *item), item


def test_a_restored_state_waits_for_room(files, monkeypatch):
    """Were it computed again, that would be in the other way, whose bits differ."""
    with MobileLLM(files["q4_0"], n_ctx=256, n_threads=1) as llm:
        llm.eval(list(range(5, 155)))
        state = llm.save_state()
        llm.eval([7])
        expected = llm._last_logits.copy()
        llm.reset()
        other = llm._sequences.open(list(range(9, 149)))
        other.next(_COPY)
        with monkeypatch.context() as patch:
            patch.setattr(Places, "_may_go", lambda *_: False)
            llm.load_state(state)
            assert llm._own.state.slot is None and llm._own.state.done == 150
        llm.eval([7])
        assert np.array_equal(llm._last_logits, expected)


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.tuples(st.sampled_from(["open", "go", "drop", *KINDS]), st.integers(0, 8))))
def test_streams_in_turn_with_calls_between(shared, alone, moves):
    """One thread that holds several answers open: none reads another's words."""
    name, llm = shared
    streams: list[tuple[int, object, str]] = []
    for move, seed in moves:
        if move == "open":
            stream = llm.stream(prompt(seed), max_tokens=12, temperature=0.0)
            streams.append((seed, stream, ""))
        elif move == "go" and streams:
            at = seed % len(streams)
            seed, stream, text = streams[at]
            streams[at] = (seed, stream, text + next(stream, ""))
        elif move == "drop" and streams:
            del streams[seed % len(streams)]
        elif move in KINDS:
            assert ask(llm, move, seed) == alone(name, move, seed)
    for seed, stream, text in streams:
        assert text + "".join(stream) == alone(name, "stream", seed)


def test_answers_that_are_made_together_are_computed_together(files, monkeypatch):
    from mobilellm_cpp.engine import sequences

    sizes = []
    run = sequences.run_step
    monkeypatch.setattr(
        sequences, "run_step", lambda c, step: (sizes.append(step.native.n_tokens), run(c, step))[1]
    )
    llm = MobileLLM(files["shared"], n_ctx=1024, n_threads=1)
    asked = {"max_tokens": 20, "temperature": 0.0, "speculative": 0}
    streams = [llm.stream(prompt(i), **asked) for i in range(4)]
    for stream in streams:
        next(stream)
    sizes.clear()
    while any([next(stream, None) is not None for stream in streams]):
        pass
    assert max(sizes) == 4 and len(sizes) < 30


def test_one_thread_goes_on_with_many_a_step_at_a_time(files, alone, monkeypatch):
    """advance makes one step at most, also while a stop string may be coming, and reads a prompt
    piece by piece."""
    from mobilellm_cpp.engine import sequences

    steps = []
    run = sequences.run_step
    monkeypatch.setattr(sequences, "run_step", lambda *given: (steps.append(1), run(*given))[1])
    long = " ".join(WORDS * 12)
    with MobileLLM(files["shared"], n_ctx=2048, n_threads=1) as llm:
        told = "".join(llm.stream(long, max_tokens=12, temperature=0.0))
        streams = [llm.stream(prompt(i), max_tokens=12, temperature=0.0) for i in range(4)]
        held = f"{alone('shared', 'stream', 0)}!"
        streams.append(llm.stream(prompt(0), max_tokens=12, temperature=0.0, stop=[held]))
        streams.append(llm.stream(long, max_tokens=12, temperature=0.0))
        texts = [""] * 6
        going = dict(enumerate(streams))
        while going:
            for number, stream in list(going.items()):
                before = len(steps)
                try:
                    texts[number] += stream.advance()
                except StopIteration:
                    del going[number]
                assert len(steps) <= before + 1
        assert texts[:4] == [alone("shared", "stream", i) for i in range(4)]
        assert texts[4:] == [texts[0], told]
        assert [stream.finish_reason for stream in streams] == ["length"] * 6


def test_a_callback_that_raises_reaches_its_caller_alone(files, alone):
    class Mine(Exception):
        pass

    def bad(ids, logits):
        if len(ids) > 20:
            raise Mine("from a processor")
        return logits

    with MobileLLM(files["shared"], n_ctx=256, n_threads=1) as llm:
        other = llm.stream(prompt(3), max_tokens=12, temperature=0.0)
        text = next(other)
        with pytest.raises(Mine, match="from a processor"):
            llm("a b c d e f g h i j k l", max_tokens=40, logits_processor=[bad])
        assert text + "".join(other) == alone("shared", "stream", 3)
        assert ask(llm, "logits", 4) == alone("shared", "logits", 4)


def test_an_abandoned_generate_has_not_evaluated_its_last_token(files):
    with MobileLLM(files["shared"], n_ctx=256, n_threads=1) as llm:
        prompt = llm.tokenize(b"hello there")
        token = next(llm.generate(prompt, temp=0.0))
        assert llm.n_tokens == len(prompt) and llm.input_ids.tolist() == prompt
        llm.eval([token])
        assert llm.input_ids.tolist() == [*prompt, token]


def test_what_is_abandoned_leaves_nothing_behind(files, alone):
    with MobileLLM(files["shared"], n_ctx=256, n_threads=1) as llm:
        for seed in range(40):  # more than there are places
            next(llm.stream(prompt(seed), max_tokens=30))
        assert ask(llm, "stream", 5) == alone("shared", "stream", 5)


def test_streams_that_do_not_fit_into_the_cache_together(files):
    """Three of 120 tokens in a cache of 256: they get their places in turn."""
    texts = [" ".join(random.Random(i).choices(WORDS, k=30)) for i in range(3)]
    options = {"max_tokens": 30, "temperature": 0.0}
    want = []
    for text in texts:
        with MobileLLM(files["shared"], n_ctx=256, n_threads=1) as llm:
            want.append("".join(llm.stream(text, **options)))
    with MobileLLM(files["shared"], n_ctx=256, n_threads=1) as llm:
        with ThreadPoolExecutor(3) as pool:
            got = list(pool.map(lambda text: "".join(llm.stream(text, **options)), texts))
        assert got == want


def test_somebody_else_clears_the_cache(files, alone):
    with MobileLLM(files["shared"], n_ctx=256, n_threads=1) as llm:
        stream = llm.stream(prompt(2), max_tokens=12, temperature=0.0)
        text = next(stream) + next(stream)
        llm._ctx.kv_cache_clear()
        assert text + "".join(stream) == alone("shared", "stream", 2)


def test_the_cut_of_a_prompt_changes_no_bit(files):
    tokens = [1, *random.Random(1).choices(range(3, 500), k=99)]
    rows = [
        MobileLLM(files["shared"], n_ctx=256, n_batch=size, n_threads=1).logits(tokens)
        for size in (27, 40, 64, 128)
    ]
    for other in rows[1:]:
        assert np.array_equal(rows[0], other)


def test_prompts_as_long_as_the_border_between_the_two_ways(files, alone):
    for n in (FEW - 1, FEW, FEW + 1, 2 * FEW, 2 * FEW + 1):
        tokens = [1, *range(30, 30 + n - 1)]
        with MobileLLM(files["shared"], n_ctx=256, n_threads=1) as llm:
            want = llm.logits(tokens)
            list(llm.stream("hello there you", max_tokens=5))
            held = llm.stream("a b c d", max_tokens=9)
            next(held)
            assert np.array_equal(llm.logits(tokens), want), n


def test_close_while_others_ask(files):
    llm = MobileLLM(files["shared"], n_ctx=256, n_threads=1)
    errors = []

    def work():
        try:
            while True:
                "".join(llm.stream("hello", max_tokens=8))
        except ModelError as error:
            errors.append(str(error))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    time.sleep(0.2)
    llm.close()
    for thread in threads:
        thread.join(20)
    assert errors == ["this model is closed"] * 4


@pytest.mark.parametrize(
    "call",
    [
        lambda llm: llm.chat([{"role": "user", "content": "hi"}]),
        lambda llm: next(llm.stream("hi")),
        lambda llm: llm("hi"),
        lambda llm: llm.create_chat_completion([{"role": "user", "content": "hi"}]),
        lambda llm: llm.tokenize(b"hi"),
        lambda llm: llm.detokenize([5, 6]),
        lambda llm: llm.logits([1, 2]),
        lambda llm: llm.embeddings(["hi"]),
        lambda llm: llm.eval([1]),
        lambda llm: llm.sample(),
        lambda llm: llm.save_state(),
        lambda llm: llm.token_eos(),
        lambda llm: llm.ctx,
        lambda llm: next(llm.generate([1, 2])),
    ],
)
def test_calls_after_close(files, call):
    llm = MobileLLM(files["shared"], n_threads=1)
    llm.close()
    llm.close()
    with pytest.raises(ModelError):
        call(llm)


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("way", ["del", "with", "close"])
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's /proc")
def test_memory_after_many_loads(tmp_path, way):
    convert_checkpoint(DEMO, tmp_path / "m.gguf", type="q8_0")
    gc.collect()
    gc.disable()  # nothing may wait for it
    try:
        for i in range(300):
            llm = MobileLLM(tmp_path / "m.gguf", n_threads=1)
            llm("hi", max_tokens=3, temperature=0)
            if way == "with":
                with llm:
                    pass
            elif way == "close":
                llm.close()
            del llm
            if i == 20:
                before = resident()
        assert resident() < 1.05 * before
    finally:
        gc.enable()


def test_seeds(tmp_path):
    convert_checkpoint(DEMO, tmp_path / "m.gguf", type="q8_0")

    def texts(**arguments):
        with MobileLLM(tmp_path / "m.gguf", n_threads=1, **arguments) as llm:
            hot = {"max_tokens": 15, "temperature": 5.0, "min_p": 0.0, "top_p": 1.0}
            return [
                "".join(llm.stream("The village", **hot)),
                "".join(llm.stream("The village", **hot)),
                llm("The village", **hot)["choices"][0]["text"],
            ]

    assert texts(seed=42) == texts(seed=42) != texts(seed=43)
    assert texts(seed=4294967295) == texts(seed=4294967295)
    first, second = texts(), texts()
    assert len({*first, *second}) == 6  # another text at every start and every call


def test_finish_reason_and_usage(files):
    with MobileLLM(files["shared"], n_ctx=256, n_threads=1) as llm:
        stream = llm.stream("hello", max_tokens=5, temperature=0.0)
        assert stream.finish_reason is None
        text = "".join(stream)
        n = len(llm.tokenize(b"hello"))
        assert stream.finish_reason == "length"
        assert stream.usage == {"prompt_tokens": n, "completion_tokens": 5, "total_tokens": n + 5}
        stopped = llm.stream("hello", max_tokens=5, temperature=0.0, stop=text[2:4])
        assert "".join(stopped) == text[: text.find(text[2:4])] and stopped.finish_reason == "stop"
        answer = llm.chat([{"role": "user", "content": "hi"}], max_tokens=3)
        assert answer.usage["completion_tokens"] <= 3 and answer.finish_reason in ("stop", "length")


def test_text_parts(files):
    with MobileLLM(files["shared"], n_ctx=256, n_threads=1) as llm:
        parts = [{"type": "text", "text": "who bakes "}, {"type": "text", "text": "the bread"}]
        plain = [{"role": "user", "content": "who bakes the bread"}]
        split = [{"role": "user", "content": parts}]
        assert llm.chat_tokens(plain) == llm.chat_tokens(split)
        usage = [llm.create_chat_completion(m, max_tokens=1)["usage"] for m in (plain, split)]
        assert usage[0] == usage[1]
        with pytest.raises(ModelError, match="reads only text"):
            llm.chat([{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}])


def test_embedding_mode(files):
    texts = ["hello", "who bakes the bread here and why so early in the morning", "x y"]
    with MobileLLM(files["shared"], n_ctx=256, n_threads=1) as llm:
        want = llm.embeddings(texts)
        with pytest.raises(RuntimeError, match="embedding=True"):
            llm.embed("hello")
    for pooling in ({}, {"pooling_type": 1}):
        with MobileLLM(files["shared"], n_ctx=256, n_threads=1, embedding=True, **pooling) as llm:
            assert np.array_equal(llm.embeddings(texts), want)
            got = np.array(llm.embed(texts, normalize=True))
            np.testing.assert_allclose(got, want, atol=1e-6)
            assert ask(llm, "stream", 3)
            made = llm.create_embedding(texts)
            assert made["usage"]["prompt_tokens"] > 10 and len(made["data"]) == 3
    with MobileLLM(files["shared"], n_ctx=256, n_threads=1, embedding=True, pooling_type=0) as llm:
        assert len(llm.embed("hello there")) == len(llm.tokenize(b"hello there"))


def test_log_probabilities_are_plain_numbers(files):
    with MobileLLM(files["shared"], n_ctx=256, n_threads=1, logits_all=True) as llm:
        options = {"max_tokens": 4, "logprobs": 3, "temperature": 0.0}
        found = llm("hello there", **options)["choices"][0]["logprobs"]
        assert all(type(x) is float for x in found["token_logprobs"])
        assert all(type(x) is float for best in found["top_logprobs"] for x in best.values())
        assert max(found["top_logprobs"][1].values()) == found["token_logprobs"][1]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_fork_while_other_threads_ask(files):
    """The child goes on with what it forked from, however many threads were in the middle."""
    script = f"""
import os, sys, threading
from mobilellm_cpp import MobileLLM
llm = MobileLLM({str(files["shared"])!r}, n_ctx=256, n_threads=2)
want = "".join(llm.stream("hello there", max_tokens=10, temperature=0))
held = llm.stream("hello there", max_tokens=10, temperature=0)
begun = next(held)
busy = True
def work():
    while busy:
        "".join(llm.stream("a b c", max_tokens=10))
threads = [threading.Thread(target=work) for _ in range(3)]
[t.start() for t in threads]
for _ in range(5):
    pid = os.fork()
    if pid == 0:
        same = "".join(llm.stream("hello there", max_tokens=10, temperature=0)) == want
        same = same and begun + "".join(held) == want
        llm.close()  # waits for nobody: the other threads are gone
        os._exit(0 if same else 1)
    assert os.waitpid(pid, 0)[1] == 0
busy = False
[t.join() for t in threads]
print("done")
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120
    )
    assert done.stdout.strip() == "done", done.stderr[-2000:]


def test_the_shape_is_one_that_the_fused_step_takes():
    assert SHAPE["hidden"] // SHAPE["heads"] % 32 == 0
