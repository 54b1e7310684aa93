"""The official openai client over our server, held to what the model says when it is asked
directly."""

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Literal

import httpx
import numpy as np
import openai
import pytest
from pydantic import BaseModel, Field
from serving import running

IMAGE = {"type": "image_url", "image_url": {"url": "data:,"}}
HELLO = [{"role": "user", "content": "Hello! Who are you?"}]


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def test_models(client):
    (model,) = client.models.list().data
    assert model.id == "demo" and client.models.retrieve("demo") == model
    with pytest.raises(openai.NotFoundError, match="'demo' is"):
        client.models.retrieve("gpt-4o")


def test_an_answer(client, llm):
    made = client.chat.completions.create(model="demo", messages=HELLO, temperature=0)
    said = llm.chat(HELLO, temperature=0)
    (choice,) = made.choices
    assert choice.message.content == said and choice.finish_reason == "stop"
    assert choice.message.role == "assistant" and choice.logprobs is None
    assert made.usage.prompt_tokens == len(llm.chat_tokens(HELLO)) == said.usage["prompt_tokens"]
    assert made.usage.completion_tokens == said.usage["completion_tokens"]
    assert made.usage.total_tokens == said.usage["total_tokens"]


@pytest.mark.parametrize("limit", ["max_tokens", "max_completion_tokens"])
def test_a_limit_of_tokens(client, llm, limit):
    made = client.chat.completions.create(model="demo", messages=HELLO, temperature=0, **{limit: 3})
    assert made.choices[0].finish_reason == "length" and made.usage.completion_tokens == 3
    assert made.choices[0].message.content == llm.chat(HELLO, temperature=0, max_tokens=3)


def test_a_stream(client, llm):
    chunks = list(
        client.chat.completions.create(
            model="demo",
            messages=HELLO,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    said = llm.chat(HELLO, temperature=0)
    *body, last = chunks
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in body) == said
    assert [c.choices[0].finish_reason for c in body] == [None] * (len(body) - 1) + ["stop"]
    assert all(c.usage is None for c in body) and last.choices == []
    used = last.usage.model_dump(exclude={"prompt_tokens_details"}, exclude_none=True)
    assert used == said.usage
    assert len({c.id for c in chunks}) == 1 and len(body) > 5


def test_stop_strings(client, llm):
    said = str(llm.chat(HELLO, temperature=0))
    stop = [said[12:16], "never said"]
    for streamed in (False, True):
        made = client.chat.completions.create(
            model="demo", messages=HELLO, temperature=0, stop=stop, stream=streamed
        )
        chunks = list(made) if streamed else []
        text = "".join(c.choices[0].delta.content or "" for c in chunks)
        reason = chunks[-1].choices[0].finish_reason if streamed else made.choices[0].finish_reason
        assert (text if streamed else made.choices[0].message.content) == said[:12]
        assert reason == "stop"


def test_log_probabilities(client, llm):
    """Held to the softmax of the logits of the same tokens, computed as a prompt. One by one the
    fused step computes with other bits."""
    asked = dict(model="demo", messages=HELLO, temperature=0, logprobs=True, top_logprobs=3)
    made = client.chat.completions.create(**asked)
    found = made.choices[0].logprobs.content
    assert "".join(each.token for each in found).lstrip(" ") == made.choices[0].message.content
    tokens = llm.chat_tokens(HELLO)
    answer = [int(np.argmax(llm.logits(tokens)[-1]))]
    while len(answer) < len(found):
        answer.append(int(np.argmax(llm.logits(tokens + answer)[-1])))
    rows = llm.logits(tokens + answer).astype(np.float64)[len(tokens) - 1 : -1]
    rows -= np.log(np.exp(rows).sum(1, keepdims=True))
    for each, row, token in zip(found, rows, answer, strict=True):
        assert bytes(each.bytes) == llm._piece(token)
        assert each.logprob == pytest.approx(row[token], abs=0.02)
        best = np.sort(row)[::-1][:3]
        assert [b.logprob for b in each.top_logprobs] == pytest.approx(best, abs=0.5)
        assert len(each.top_logprobs) == 3
    streamed = [c.choices[0] for c in client.chat.completions.create(**asked, stream=True)]
    again = [each for c in streamed if c.logprobs for each in c.logprobs.content]
    assert again == found
    for choice in streamed:  # each with the text that it belongs to
        if choice.logprobs:
            text = "".join(each.token for each in choice.logprobs.content)
            assert text.lstrip(" ") == (choice.delta.content or "").lstrip(" ")


def test_log_probabilities_end_where_the_text_does(client, llm):
    said = str(llm.chat(HELLO, temperature=0))
    asked = dict(model="demo", messages=HELLO, temperature=0, logprobs=True, stop=said[8:14])
    made = client.chat.completions.create(**asked).choices[0]
    assert made.message.content == said[:8]
    text = "".join(each.token for each in made.logprobs.content)
    assert text.lstrip(" ") == said[:8] or made.logprobs.content[-1].token.endswith(said[8])


def test_choices_and_seeds(client):
    asked = dict(model="demo", messages=HELLO, temperature=5, max_tokens=12, n=3, top_p=1)
    asked["extra_body"] = {"top_k": 0, "min_p": 0}
    one, two = (client.chat.completions.create(**asked, seed=7) for _ in range(2))
    texts = [choice.message.content for choice in one.choices]
    assert texts == [choice.message.content for choice in two.choices]
    assert len(set(texts)) == 3 and [choice.index for choice in one.choices] == [0, 1, 2]
    assert texts != [c.message.content for c in client.chat.completions.create(**asked).choices]
    streamed = ["", "", ""]
    for chunk in client.chat.completions.create(**asked, seed=7, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
    assert streamed == texts
    prompt = client.chat.completions.create(**{**asked, "n": 1}).usage.prompt_tokens
    assert one.usage.prompt_tokens == prompt


def test_structured_answers(client):
    class Guide(BaseModel):
        name: Literal["Pip", "Ann"]
        year: Annotated[int, Field(ge=1900, le=2100)]
        open: bool

    made = client.chat.completions.parse(
        model="demo", messages=HELLO, response_format=Guide, temperature=0, max_tokens=200
    )
    assert isinstance(made.choices[0].message.parsed, Guide)
    with client.chat.completions.stream(
        model="demo", messages=HELLO, response_format=Guide, temperature=0, max_tokens=200
    ) as stream:
        assert stream.get_final_completion().choices[0].message.parsed == (
            made.choices[0].message.parsed
        )
    loose = client.chat.completions.create(
        model="demo",
        messages=HELLO,
        response_format={"type": "json_object"},
        extra_body={"top_k": 5},
        max_tokens=300,
        seed=3,
    )
    if loose.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(loose.choices[0].message.content), dict)
    with pytest.raises(openai.LengthFinishReasonError):
        client.chat.completions.parse(
            model="demo", messages=HELLO, response_format=Guide, temperature=0, max_tokens=3
        )


def test_logit_bias(client, llm):
    (word,) = llm.tokenize(b" Pip", add_bos=False)[-1:]
    made = client.chat.completions.create(
        model="demo", messages=HELLO, temperature=0, logit_bias={str(word): -100}
    )
    assert "Pip" in llm.chat(HELLO, temperature=0)
    assert "Pip" not in made.choices[0].message.content


def test_completions(client, llm):
    text = "The old lighthouse"
    made = client.completions.create(
        model="demo", prompt=text, temperature=0, max_tokens=9, logprobs=2, echo=False
    )
    said = "".join(llm.stream(text, temperature=0, max_tokens=9))
    (choice,) = made.choices
    assert choice.text == said == "".join(choice.logprobs.tokens)
    assert [len(best) for best in choice.logprobs.top_logprobs] == [
        2
    ] * made.usage.completion_tokens
    ids = llm.tokenize(text.encode())
    many = client.completions.create(
        model="demo", prompt=[ids, ids], temperature=0, max_tokens=9, n=2
    )
    assert [choice.text for choice in many.choices] == [said] * 4
    assert many.usage.prompt_tokens == 2 * len(ids)
    chunks = client.completions.create(
        model="demo", prompt=text, temperature=0, max_tokens=9, echo=True, stream=True
    )
    parts = [chunk.choices[0] for chunk in chunks]
    assert "".join(part.text for part in parts) == text + said
    assert parts[-1].finish_reason in ("stop", "length")


def test_how_likely_a_text_is(client, llm):
    text = " ".join(["The old lighthouse keeper asks who bakes the bread by the sea"] * 6)
    ids = llm.tokenize(text.encode())
    assert len(ids) > 70  # more than are computed at a time
    logits = llm.logits(ids).astype(np.float64)
    wanted = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    of_text = [float(wanted[i, token]) for i, token in enumerate(ids[1:])]
    asked = dict(model="demo", prompt=text, echo=True, temperature=0, logprobs=2)
    made = client.completions.create(**asked, max_tokens=0)
    (choice,) = made.choices
    assert choice.text == text == "".join(choice.logprobs.tokens)
    assert made.usage.completion_tokens == 0 and made.usage.prompt_tokens == len(ids)
    np.testing.assert_allclose(choice.logprobs.token_logprobs, of_text, atol=0.02)
    offsets, tokens = choice.logprobs.text_offset, choice.logprobs.tokens
    assert all(
        text[at : at + len(token)] == token for at, token in zip(offsets, tokens, strict=True)
    )
    best = [max(each, key=each.get) for each in choice.logprobs.top_logprobs]
    said = [llm.detokenize([int(row.argmax())], special=True).decode() for row in logits[:-1]]
    assert sum(a.strip() == b.strip() for a, b in zip(best, said, strict=True)) > 0.95 * len(best)
    # ids are taken as they are, and what follows them comes behind them
    (choice,) = client.completions.create(**{**asked, "prompt": ids}, max_tokens=4).choices
    assert choice.logprobs.token_logprobs[0] is None and choice.logprobs.top_logprobs[0] is None
    np.testing.assert_allclose(choice.logprobs.token_logprobs[1 : len(ids)], of_text, atol=0.02)
    assert len(choice.logprobs.tokens) == len(ids) + 4
    assert choice.text.endswith("".join(llm.stream(ids, temperature=0, max_tokens=4)))
    chunks = client.completions.create(**{**asked, "prompt": ids}, max_tokens=4, stream=True)
    parts = [chunk.choices[0] for chunk in chunks]
    together = [part.logprobs.token_logprobs for part in parts if part.logprobs]
    assert sum(together, []) == choice.logprobs.token_logprobs


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"temperature": -1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages.0.role"),
        ({"n": 0}, "n"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"extra_body": {"temprature": 1}}, "temprature"),
        ({"response_format": {"type": "yaml"}}, None),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"not": {}}}}},
            None,
        ),
        ({"logit_bias": {"9999999": 1}}, None),
        ({"stop": ""}, None),
        ({"messages": [{"role": "user", "content": [IMAGE]}]}, "messages.0.content"),
    ],
)
def test_what_is_wrong_is_said(client, change, param):
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**{"model": "demo", "messages": HELLO, **change})
    assert caught.value.type == "invalid_request_error"
    assert param is None or str(caught.value.param).startswith(param)


def test_an_image_is_refused_by_its_kind(client):
    with pytest.raises(openai.BadRequestError, match="content: this model reads only text, not im"):
        messages = [{"role": "user", "content": [{"type": "text", "text": "a cat?"}, IMAGE]}]
        client.chat.completions.create(model="demo", messages=messages)
    with pytest.raises(openai.BadRequestError, match="input: this model reads only text"):
        image = {"type": "input_image", "image_url": "data:,"}
        client.responses.create(model="demo", input=[{"role": "user", "content": [image]}])


def test_other_errors(client, server, llm):
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="gpt-4o", messages=HELLO)
    assert caught.value.code == "model_not_found"
    long = [{"role": "user", "content": "word " * 4 * llm.n_ctx()}]
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(model="demo", messages=long, stream=stream)
        assert caught.value.code == "context_length_exceeded"
    for body in (b"", b"{", b"[" * 100_000, b"\xff", b"null", b'{"model": "\\ud800"}'):
        got = httpx.post(f"{server.url}/v1/chat/completions", content=body)
        assert got.status_code == 400 and got.json()["error"]["message"]
    assert httpx.get(f"{server.url}/v1/nothing").json()["error"]["type"] == "invalid_request_error"
    assert httpx.get(f"{server.url}/v1/chat/completions").status_code == 405


def test_many_at_a_time_are_what_they_are_alone(client, llm, server):
    words = ("The", "A", "My", "Her", "Our", "No", "Two", "I")
    prompts = [f"{word} and the boat" for word in words]
    alone = ["".join(llm.stream(p, temperature=0, max_tokens=24)) for p in prompts]

    def ask(prompt):
        return "".join(
            chunk.choices[0].text
            for chunk in client.completions.create(
                model="demo", prompt=prompt, temperature=0, max_tokens=24, stream=True
            )
        )

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, prompts * 2)) == alone * 2
    assert server.idle()


def test_a_stream_that_is_closed_frees_the_place(client, server):
    made = client.chat.completions.create(
        model="demo", messages=HELLO, stream=True, logit_bias={"2": -100}
    )
    assert next(iter(made)).choices
    made.close()
    assert server.idle(5)


def test_who_leaves_frees_the_place(client, server):
    for stream in (True, False):
        body = {"model": "demo", "messages": HELLO, "stream": stream, "max_tokens": 2000}
        body["logit_bias"] = {"2": -100}  # goes on to the end of the context
        connection = httpx.Client(timeout=30)
        request = connection.build_request("POST", f"{server.url}/v1/chat/completions", json=body)
        if stream:
            response = connection.send(request, stream=True)
            next(response.iter_lines())
            response.close()
        else:
            with pytest.raises(httpx.ReadTimeout):
                connection.post(request.url, json=body, timeout=0.3)
        connection.close()
        assert server.idle(5)


def test_too_many_are_turned_away(llm):
    from mobilellm_cpp.server.service import Limits

    with running(llm, limits=Limits(max_waiting=1, seconds=60)) as server:
        scheduler = server.service.scheduler
        free = threading.Event()
        going = scheduler._round
        scheduler._round = lambda work: (free.wait(), going(work))  # nothing moves
        body = {"model": "demo", "prompt": "a", "max_tokens": 2}
        url = f"{server.url}/v1/completions"
        with ThreadPoolExecutor(64) as pool:
            asked = [pool.submit(httpx.post, url, json=body, timeout=60) for _ in range(48)]
            while sum(each.done() for each in asked) < 20:
                time.sleep(0.01)
            free.set()
            got = [each.result() for each in asked]
        assert {each.status_code for each in got} == {200, 503}
        turned = next(each for each in got if each.status_code == 503)
        assert turned.headers["retry-after"] == "1"
        assert turned.json()["error"]["code"] == "overloaded"


def test_a_deadline(llm):
    from mobilellm_cpp.server.service import Limits

    body = {"model": "demo", "messages": HELLO, "max_tokens": 2000, "logit_bias": {"2": -100}}
    with running(llm, limits=Limits(seconds=0.2)) as server:
        url = f"{server.url}/v1/chat/completions"
        got = httpx.post(url, json=body)
        assert got.status_code == 503 and got.json()["error"]["code"] == "timeout"
        got = httpx.post(url, json={**body, "stream": True})
        *_, last = got.text.strip().split("\n\n")
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "timeout"
        assert server.idle()


def test_embeddings(client, llm):
    texts = ["A boat.", "The old lighthouse stands " + "by the sea " * 60, "Bread"]
    made = client.embeddings.create(model="demo", input=texts)
    want = llm.embeddings(texts)
    assert np.array_equal(np.array([each.embedding for each in made.data], np.float32), want)
    assert [each.index for each in made.data] == [0, 1, 2]
    ids = [llm.tokenize(text.encode()) for text in texts]
    assert made.usage.prompt_tokens == made.usage.total_tokens == sum(map(len, ids))
    again = client.embeddings.create(model="demo", input=ids, encoding_format="float")
    assert np.allclose([each.embedding for each in again.data], want, atol=0)
    with pytest.raises(openai.BadRequestError, match="dimensions"):
        client.embeddings.create(model="demo", input="a", dimensions=3)
    with pytest.raises(openai.BadRequestError):
        client.embeddings.create(model="demo", input=[""] * 3000)


def test_embeddings_beside_answers(client, llm):
    """Neither changes the other, and an answer goes on between the steps of a long text."""
    text = "the sea was old and the bread was warm " * 90
    said = "".join(llm.stream("The", temperature=0, max_tokens=60))
    with ThreadPoolExecutor(2) as pool:
        vectors = pool.submit(client.embeddings.create, model="demo", input=[text] * 4)
        made = client.completions.create(model="demo", prompt="The", temperature=0, max_tokens=60)
    assert made.choices[0].text == said
    want = llm.embeddings([text])[0]
    assert all(np.array_equal(np.float32(v.embedding), want) for v in vectors.result().data)


def test_metrics(client, server):
    from prometheus_client.parser import text_string_to_metric_families

    def read():
        text = httpx.get(f"{server.url}/metrics").text
        samples = [s for family in text_string_to_metric_families(text) for s in family.samples]
        return {(s.name, *sorted(s.labels.values())): s.value for s in samples}

    before = read()
    made = client.completions.create(model="demo", prompt="The", max_tokens=5, temperature=0)
    assert server.idle()
    after = read()
    for name, tokens in (
        ("mobilellm_prompt_tokens_total", made.usage.prompt_tokens),
        ("mobilellm_completion_tokens_total", made.usage.completion_tokens),
        ("mobilellm_first_token_seconds_count", 1),
    ):
        assert after[name,] - before[name,] == tokens
    assert after["mobilellm_requests_total", "/v1/completions", "200"] >= 1
    assert after["mobilellm_answers_going",] == 0
