"""Many prompts in one call: each gets what it gets alone."""

import asyncio
import itertools

import pytest

from mobilellm_cpp import MobileLLM, ModelError
from mobilellm_cpp.cache import DEMO

TEXT = "the quick brown fox jumps over a lazy dog and asks who bakes the bread here"
WORDS = TEXT.split()


@pytest.fixture(scope="module", params=["q8_0", "f32"])  # computed together, and in turn
def llm(request):
    with MobileLLM.from_checkpoint(DEMO, request.param, n_ctx=512, n_threads=1) as llm:
        yield llm


def prompts(n):
    """Texts of 1 to 90 words and messages; many begin alike."""
    for i in range(n):
        text = " ".join(itertools.islice(itertools.cycle(WORDS), 1 + i * 37 % 90))
        yield [{"role": "user", "content": text}] if i % 3 == 0 else text


def alone(llm, prompt, **sampling):
    stream = llm.stream(prompt, **sampling)
    return "".join(stream), stream.finish_reason, stream.usage


def test_each_gets_what_it_gets_alone(llm):
    sampling = {"max_tokens": 14, "temperature": 1.0, "top_k": 0, "stop": ["the "]}
    answers = llm.batch(prompts(40), seeds=range(40), **sampling)
    found = [(str(a), a.finish_reason, a.usage) for a in answers]
    assert found == [alone(llm, p, seed=i, **sampling) for i, p in enumerate(prompts(40))]
    assert {a.finish_reason for a in answers} == {"stop", "length"}
    again = llm.batch(prompts(4), max_tokens=5, seed=3)
    assert again == [alone(llm, p, max_tokens=5, seed=3)[0] for p in prompts(4)]


def test_tokens_are_computed_together():
    with MobileLLM.from_checkpoint(DEMO, "q8_0", n_ctx=512, n_threads=1) as llm:
        llm.batch(["warm"], max_tokens=1)
        made, compute = [], llm._sequences._compute
        llm._sequences._compute = lambda *a, **k: made.append(1) or compute(*a, **k)
        answers = llm.batch(["a b c d"] * 8, max_tokens=20, regex="[a-z]{200,}")
        assert sum(answer.usage["completion_tokens"] for answer in answers) == 8 * 20
        assert len(made) < 2 * 20  # 160 one by one


def test_prompts_are_taken_when_there_is_a_place(llm):
    taken = []

    def endless():
        for i in itertools.count():
            taken.append(i)
            yield f"number {i}"

    for number, answer in llm.batch_as_completed(endless(), max_tokens=3):
        assert isinstance(answer, str) and number <= taken[-1] < 40
        if number >= 20:
            break


def test_errors(llm):
    long = "word " * 2000
    with pytest.raises(ModelError, match="prompt 1: the prompt has .* holds 512: .* n_ctx$"):
        llm.batch(["a", long, "b"], max_tokens=2)
    first, error, last = llm.batch(["a", long, "b"], max_tokens=2, return_exceptions=True)
    assert isinstance(error, ModelError) and isinstance(first, str) and isinstance(last, str)
    with pytest.raises(ModelError, match="not one text"):
        llm.batch("hello")
    with pytest.raises(ModelError, match="no seed for prompt 1"):
        llm.batch(["a", "b"], seeds=[1])
    with pytest.raises(ModelError, match="did you mean temperature"):
        llm.batch(["a"], temprature=1)
    assert llm.batch([]) == []


def test_asyncio(llm):
    found = asyncio.run(llm.abatch(["a", "b"], max_tokens=4, seed=1))
    assert found == llm.batch(["a", "b"], max_tokens=4, seed=1)


@pytest.mark.parametrize("n", [1, 2, 5, 16])
def test_a_context_of_a_few_tokens(n):
    """llama.cpp aborts where more sequences than tokens of a batch are asked for."""
    with MobileLLM.from_checkpoint(DEMO, "q8_0", n_ctx=n, n_threads=1) as llm:
        assert llm.logits([1]).shape == (1, llm.n_vocab())
        if n > 2:
            assert len(llm.batch([[1], [1, 2]], max_tokens=1)) == 2
