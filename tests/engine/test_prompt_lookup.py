"""Texts with drafts are the texts without, whoever else is computed in the same steps, and whether
drafts are right or wrong."""

import random
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mobilellm_cpp import Conversation, MobileLLM
from mobilellm_cpp.engine import sequence, sequences
from mobilellm_cpp.engine.prompt_lookup import MOST, Costs, PromptLookup

HOW = (
    {"temperature": 0.0},
    {"temperature": 0.9},
    {"temperature": 1.0, "top_k": 0, "repeat_penalty": 1.3},
    {"temperature": 0.8, "mirostat_mode": 2},
    {"temperature": 0.8, "logprobs": 2},
    {"temperature": 0.7, "logit_bias": {7: 2.0}},
    {"temperature": 0.8, "regex": "[a-z ]+"},
)


@pytest.fixture(
    scope="module", params=["q4_0", "llama", "shared", "reverse", "untied", "f32", "pro"]
)
def llm(request, files):
    with MobileLLM(files[request.param], n_ctx=256, n_threads=1) as llm:
        yield llm


@pytest.fixture
def sizes(monkeypatch):
    """The tokens of each step."""
    made: list[int] = []
    run = sequences.run_step
    monkeypatch.setattr(
        sequences, "run_step", lambda c, step: (made.append(step.native.n_tokens), run(c, step))[1]
    )
    return made


def prompt(llm: MobileLLM, seed: int) -> list[int]:
    """Tokens that begin to say something a second time."""
    draw = random.Random(seed)
    part = [draw.randrange(5, llm.n_vocab()) for _ in range(draw.randint(4, 30))]
    return part + part[: draw.randint(2, len(part))]


def text(llm: MobileLLM, tokens: list[int], **how: object) -> tuple[object, ...]:
    stream = llm.stream(tokens, max_tokens=40, **how)
    return "".join(stream), stream.usage, stream.finish_reason, stream.logprobs


class Guess(PromptLookup):
    """Drafts of any length that are right as often as not."""

    known: list[int]  # the token ids of the text without drafts
    draw: random.Random

    def draft(self, tokens, room, gain, cost):
        n = self.draw.randint(0, max(0, min(room, self._most, self._end - len(tokens))))
        right = self.known[len(tokens) :][:n]
        return [t if self.draw.random() < 0.8 else self.draw.randrange(5, 500) for t in right]


def guessing(llm: MobileLLM, monkeypatch, seed: int, tokens: list[int], how: dict) -> None:
    given = {**how, "logprobs": 0}
    kept = llm.stream(tokens, max_tokens=40, speculative=0, **given)
    list(kept)
    known = tokens + [each.token for each in kept.logprobs]
    guess = type("Told", (Guess,), {"known": known, "draw": random.Random(seed)})
    monkeypatch.setattr(sequence, "PromptLookup", guess)


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 2**31), how=st.sampled_from(HOW), stop=st.booleans())
def test_texts_are_equal(llm, seed, how, stop):
    tokens, how = prompt(llm, seed), {**how, "seed": seed}
    plain = text(llm, tokens, speculative=0, **how)
    if stop:
        how["stop"] = plain[0][len(plain[0]) // 2 :][:3] or "x"
        plain = text(llm, tokens, speculative=0, **how)
    with pytest.MonkeyPatch.context() as patch:
        guessing(llm, patch, seed, tokens, how)
        assert text(llm, tokens, **how) == plain
    assert text(llm, tokens, **how) == plain


class Quoting(PromptLookup):
    """Sees the text that is written as though it stood before its prompt."""

    known: list[int]

    def draft(self, tokens, *given):
        self._end = 10**6
        return super().draft(self.known + tokens, *given)


def test_right_drafts_save_steps(files, sizes, monkeypatch):
    monkeypatch.setattr(Costs, "learn", lambda self, n, seconds: None)
    with MobileLLM(files["shared"], n_ctx=512, n_threads=1) as llm:
        tokens = llm.tokenize(b"foxes")
        how = {"max_tokens": 200, "temperature": 1.0, "seed": 1}
        plain = llm.stream(tokens, **how, speculative=0, logprobs=0)
        told, steps = "".join(plain), len(sizes)
        known = tokens + [each.token for each in plain.logprobs]
        monkeypatch.setattr(sequence, "PromptLookup", type("Told", (Quoting,), {"known": known}))
        sizes.clear()
        assert "".join(llm.stream(tokens, **how)) == told
        assert len(sizes) < steps / 4
        assert max(sizes) <= MOST + 1


def test_nothing_is_drafted_where_a_batch_has_other_bits(files, sizes):
    ordinary = {"llama.logit_scale": 1.0}  # a key that the fused step does not know
    with MobileLLM(files["f32"], n_ctx=256, n_threads=1, kv_overrides=ordinary) as llm:
        sizes.clear()
        "".join(llm.stream([5, 6, 7] * 9, max_tokens=60, temperature=0.0))
        assert set(sizes[2:]) == {1}


def test_many_callers(files, monkeypatch):
    """Texts that are computed together, a few of which end early."""
    with MobileLLM(files["shared"], n_ctx=1024, n_threads=1) as llm:
        work = [(prompt(llm, i), {**HOW[i % len(HOW)], "seed": i}) for i in range(20)]
        plain = [text(llm, tokens, speculative=0, **how) for tokens, how in work]
        monkeypatch.setattr(PromptLookup, "draft", _often)
        with ThreadPoolExecutor(6) as pool:
            assert list(pool.map(lambda w: text(llm, w[0], **w[1]), work)) == plain
        streams = [llm.stream(tokens, max_tokens=40, **how) for tokens, how in work]
        made = [""] * len(streams)
        left = set(range(len(streams)))
        for at in list(left):
            if at % 7 == 3:
                next(streams[at])
                streams[at].close()
                left.discard(at)
        going = set(left)
        while going:
            for at in list(going):
                try:
                    made[at] += streams[at].advance()
                except StopIteration:
                    going.discard(at)
        assert [made[at] for at in left] == [plain[at][0] for at in left]


def _often(self, tokens, room, gain, cost):
    """The last tokens again, whether or not that makes sense."""
    self._follow(tokens)
    return tokens[-7:][: max(0, min(room, len(tokens) % 9, self._end - len(tokens)))]


def test_the_rest_of_a_draft_is_forgotten(files, monkeypatch):
    """A conversation whose answer is left in the middle, a full context, low-level calls and
    states."""
    monkeypatch.setattr(PromptLookup, "draft", _often)
    with MobileLLM(files["llama"], n_ctx=96, n_threads=1) as llm:
        told = []
        for most in (0, MOST):
            talk = Conversation(llm, max_tokens=24, temperature=0.8, seed=3, speculative=most)
            pieces = talk.answer("a fox")
            said = [next(pieces), next(pieces)]
            pieces.close()
            told.append((said, "".join(talk.answer("and a dog")), talk.size()))
        assert told[0] == told[1]
        full = [text_of(llm, speculative=most) for most in (0, MOST)]
        assert full[0] == full[1] and full[0][1]["total_tokens"] == 96
        view, tokens = llm._view(), llm.tokenize(b"the lazy dog")
        made = view.generate(tokens, temp=0.0)
        tokens = tokens + [next(made) for _ in range(5)]
        state, rest = view.save_state(), [next(made) for _ in range(4)]
        assert state.input_ids.tolist() == tokens[: state.n_tokens]
        assert len(tokens) - state.n_tokens <= 1
        view = llm._view()
        view.load_state(state)
        made = view.generate(tokens, temp=0.0)
        assert [next(made) for _ in range(4)] == rest


def text_of(llm: MobileLLM, **how: object) -> tuple[str, object]:
    stream = llm.stream("a dog asks who bakes the bread", temperature=0.0, **how)
    return "".join(stream), stream.usage


def test_what_is_drafted():
    lookup = PromptLookup(MOST, end=100)
    tokens = [1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2, 3, 4, 5]
    made = lookup.draft(tokens, 11, gain=1.0, cost=0.1)
    assert len(made) > 5 and made == [6, 7, 8, 9, 1, 2, 3, 4, 5, 6, 7][: len(made)]
    assert lookup.draft([*tokens, 6], 3, gain=1.0, cost=0.1) == [7, 8, 9]
    assert lookup.draft([*tokens, 6, 11], 11, gain=1.0, cost=0.1) == []  # never seen


def test_drafts_that_are_wrong_become_few():
    """Pairs return all the time, and what follows them is drawn anew."""
    draw, lookup, drafted = random.Random(1), PromptLookup(MOST, end=10**6), 0
    tokens = [0, 1]
    for _ in range(2000):
        tokens.append(draw.randrange(4))
        drafted += len(lookup.draft(tokens, MOST, gain=1.0, cost=0.3))
    assert drafted < 200


def test_costs():
    costs = Costs()
    for _ in range(50):
        costs.learn(1, 0.010)
        costs.learn(5, 0.014)
    assert costs.more == pytest.approx(0.1, abs=0.01)
