"""The asyncio variants: the same results, a loop that goes on, and calls that end when told."""

import asyncio
import threading
import time

import numpy as np
import pytest

from mobilellm_cpp import MobileLLM, ModelError
from mobilellm_cpp.cache import DEMO

HI = [{"role": "user", "content": "who are you?"}]
LONG = {"max_tokens": 400, "regex": "[a-z]{3000,}"}  # far more pieces than are made ahead


@pytest.fixture(scope="module")
def llm():
    with MobileLLM.from_checkpoint(DEMO, "q8_0", n_ctx=512, n_threads=1) as llm:
        yield llm


async def gone(timeout: float = 60) -> bool:
    """Whether all threads of calls end."""
    end = time.monotonic() + timeout
    while any(thread.name == "mobilellm" for thread in threading.enumerate()):
        if time.monotonic() > end:
            return False
        await asyncio.sleep(0.005)
    return True


def test_the_results_are_those_of_the_calls_without_a(llm):
    async def all_of_them():
        stream = await llm.astream("Once upon", max_tokens=30, temperature=1.0, seed=4)
        pieces = [piece async for piece in stream]
        chunks = await llm.acreate_completion("Marta", max_tokens=8, temperature=0, stream=True)
        said = "".join([chunk["choices"][0]["text"] async for chunk in chunks])
        whole = await llm.acreate_completion("Marta", max_tokens=8, temperature=0)
        chat = await llm.acreate_chat_completion(HI, max_tokens=8, temperature=0)
        return (
            ("".join(pieces), stream.finish_reason, stream.usage),
            (said, whole["choices"][0]["text"], chat["choices"][0]["message"]["content"]),
            await llm.achat(HI, max_tokens=20, temperature=0.0),
            await llm.aembeddings(["a", "b"]),
        )

    stream, completions, answer, vectors = asyncio.run(all_of_them())
    same = llm.stream("Once upon", max_tokens=30, temperature=1.0, seed=4)
    assert stream == ("".join(same), same.finish_reason, same.usage)
    text = llm.create_completion("Marta", max_tokens=8, temperature=0)["choices"][0]["text"]
    chat = llm.create_chat_completion(HI, max_tokens=8, temperature=0)["choices"][0]
    assert completions == (text, text, chat["message"]["content"])
    said = llm.chat(HI, max_tokens=20, temperature=0.0)
    assert (answer, answer.usage) == (said, said.usage)
    assert np.array_equal(vectors, llm.embeddings(["a", "b"]))


def test_many_at_a_time(llm):
    texts = [f"Tell me about number {i}" for i in range(24)]

    async def one(text):
        return "".join([piece async for piece in llm.astream(text, max_tokens=12, temperature=0.0)])

    async def together():
        return await asyncio.gather(*map(one, texts))

    alone = ["".join(llm.stream(text, max_tokens=12, temperature=0.0)) for text in texts]
    assert asyncio.run(together()) == alone


def test_errors_come_when_it_is_awaited_or_with_the_first_piece(llm):
    async def fails():
        with pytest.raises(ModelError, match="did you mean temperature"):
            await llm.astream("hello", temprature=1)
        with pytest.raises(ModelError, match="the context holds 512"):
            await llm.astream("word " * 2000).__anext__()
        with pytest.raises(ModelError, match="messages must be"):
            await llm.achat([])

    asyncio.run(fails())


@pytest.mark.parametrize("call", ["stream", "chat", "embeddings", "completion"])
def test_the_loop_goes_on_and_a_cancelled_call_ends_at_once(llm, call):
    """The model is held up, as by a step without end: whoever waited for it would wait for ever."""

    async def read():
        if call == "chat":
            return await llm.achat(HI, max_tokens=5)
        if call == "embeddings":
            return await llm.aembeddings(["hello"])
        if call == "completion":
            return await llm.acreate_completion("hello", max_tokens=5)
        return [piece async for piece in llm.astream("hello", max_tokens=5)]

    async def cancel():
        with llm._sequences.lock:
            task = asyncio.create_task(read())
            for _ in range(5):
                await asyncio.sleep(0.01)
            assert not task.done()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        return await gone()

    assert asyncio.run(cancel())


def test_a_call_ends_within_a_prompt(llm):
    """Between two steps of a prompt nobody but the canceller says that it should end."""
    steps = []
    go_on = type(llm._sequences)._go_on

    def counted(self, first):
        steps.append(first)
        if len(steps) == 1:
            work.cancel()
        return go_on(self, first)

    async def start():
        nonlocal work
        with llm._sequences.lock:  # it does not begin yet
            stream = llm.astream("a " * 200, max_tokens=5)
            work = stream._work
        pieces = [piece async for piece in stream]
        return pieces, await gone()

    work = None
    before = llm._sequences.n_ubatch
    llm._sequences.n_ubatch = 32  # a prompt of several steps
    llm._sequences._go_on = counted.__get__(llm._sequences)
    try:
        pieces, ended = asyncio.run(start())
    finally:
        llm._sequences.n_ubatch = before
        del llm._sequences._go_on
    assert ended and pieces == [] and len(steps) == 1


@pytest.mark.parametrize("how", ["aclose", "del", "with", "loop"])
def test_who_leaves_in_the_midst_leaves_nothing_behind(how):
    with MobileLLM.from_checkpoint(DEMO, "q8_0", n_ctx=512, n_threads=1) as llm:

        async def leave():
            stream = llm.astream("Once upon", **LONG)
            assert await stream.__anext__()
            assert stream.finish_reason is None
            assert stream.usage["prompt_tokens"] == len(llm.tokenize(b"Once upon"))
            if how == "aclose":
                await stream.aclose()
            if how == "with":
                async with stream:
                    pass
            if how == "del":
                del stream
            return how == "loop" or await gone()

        assert asyncio.run(leave())
        assert asyncio.run(gone())


def test_a_reader_who_waits_holds_its_writer(llm):
    async def read_slowly():
        stream = llm.astream("Once upon", **LONG)
        await stream.__anext__()
        while len(stream._work.items) < 16:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)
        ahead = len(stream._work.items)
        await stream.aclose()
        return ahead, await gone()

    assert asyncio.run(read_slowly()) == (16, True)
