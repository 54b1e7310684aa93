"""Ollama's API, through its client."""

import json
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import ollama
import pytest

HELLO = [{"role": "user", "content": "Hello! Who are you?"}]
GREEDY = {"temperature": 0, "num_ctx": 4096, "num_gpu": 1}


@pytest.fixture(scope="module")
def client(server):
    return ollama.Client(host=server.url)


def test_chat(client, llm):
    said = llm.chat(HELLO, temperature=0)
    made = client.chat("demo", HELLO, options=GREEDY)
    assert made.message.content == said and made.done and made.done_reason == "stop"
    assert made.prompt_eval_count == said.usage["prompt_tokens"]
    assert made.eval_count == said.usage["completion_tokens"]
    assert 0 < made.prompt_eval_duration <= made.total_duration
    parts = list(client.chat("demo:latest", HELLO, options=GREEDY, stream=True))
    assert "".join(part.message.content for part in parts) == said and len(parts) > 5
    assert [part.done for part in parts] == [False] * (len(parts) - 1) + [True]
    cut = client.chat("demo", HELLO, options={**GREEDY, "num_predict": 3, "stop": ["never"]})
    assert cut.done_reason == "length" and cut.eval_count == 3


def test_generate(client, llm):
    made = client.generate("demo", "Hello! Who are you?", options=GREEDY)
    assert made.response == llm.chat(HELLO, temperature=0)
    text = "The old lighthouse"
    parts = client.generate(
        "demo", text, raw=True, stream=True, options={**GREEDY, "num_predict": 12}
    )
    raw = "".join(part.response for part in parts)
    assert raw == "".join(llm.stream(text, temperature=0, max_tokens=12))
    system = [{"role": "system", "content": "Be brief."}, *HELLO]
    made = client.generate("demo", "Hello! Who are you?", system="Be brief.", options=GREEDY)
    assert made.response == llm.chat(system, temperature=0)
    assert client.generate("demo").done_reason == "load"


def test_structured_answers(client):
    schema = {
        "type": "object",
        "properties": {"open": {"type": "boolean"}, "kind": {"enum": ["a", "b"]}},
        "required": ["open", "kind"],
    }
    made = client.chat("demo", HELLO, format=schema, options=GREEDY)
    assert set(json.loads(made.message.content)) == {"open", "kind"}
    made = client.generate("demo", "x", format="json", options={**GREEDY, "num_predict": 60})
    assert made.response.lstrip().startswith("{")


def test_tools(client, llm):
    def light(on: bool) -> str:
        """Lights the lamp.

        Args:
            on: whether it is to burn
        """
        return "done"

    made = client.chat("demo", HELLO, tools=[light], options={**GREEDY, "num_predict": 40})
    assert made.message.content or made.message.tool_calls
    call = {"function": {"name": "light", "arguments": {"on": True}}}
    history = [
        *HELLO,
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "done", "tool_name": "light"},
    ]
    made = client.chat("demo", history, tools=[light], options={**GREEDY, "num_predict": 9})
    assert made.prompt_eval_count > 30


def test_embed(client, llm):
    texts = ["A boat.", "Bread"]
    made = client.embed("demo", texts)
    assert np.array_equal(np.float32(made.embeddings), llm.embeddings(texts))
    old = client.embeddings("demo", "Bread")
    assert np.array_equal(np.float32(old.embedding), llm.embeddings(["Bread"])[0])


def test_about_the_model(client, server):
    (model,) = client.list().models
    assert model.model == "demo:latest" and model.size > 1000 and model.details.format == "gguf"
    assert client.ps().models[0].model == "demo:latest"
    shown = client.show("demo")
    assert shown.details.family == "mobilellm" and "completion" in shown.capabilities
    assert shown.modelinfo["general.architecture"] == "mobilellm"
    assert httpx.get(f"{server.url}/api/version").json()["version"]


def test_errors(client, server):
    with pytest.raises(ollama.ResponseError, match="not found") as caught:
        client.chat("llama3", HELLO)
    assert caught.value.status_code == 404
    with pytest.raises(ollama.ResponseError, match="images"):
        client.chat("demo", [{"role": "user", "content": "x", "images": [b"png"]}])
    with pytest.raises(ollama.ResponseError, match="temperature"):
        client.chat("demo", HELLO, options={"temperature": -1})
    for body in (b"", b"[]", b'{"model": 3}'):
        got = httpx.post(f"{server.url}/api/chat", content=body)
        assert got.status_code == 400 and isinstance(got.json()["error"], str)


def test_many_at_a_time(client, llm):
    questions = [f"{i}: who bakes the bread?" for i in range(6)]

    def ask(question):
        return client.chat("demo", [{"role": "user", "content": question}], options=GREEDY)

    with ThreadPoolExecutor(6) as pool:
        got = [made.message.content for made in pool.map(ask, questions)]
    alone = [llm.chat([{"role": "user", "content": q}], temperature=0) for q in questions]
    assert got == alone
