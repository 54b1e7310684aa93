"""stream, chat and chat completions with a form: what MobileLLM's callers get."""

import json
import re

import jsonschema
import numpy as np
import pytest
from formed import demo_model

from mobilellm_cpp import MobileLLM, ModelError, convert_checkpoint
from mobilellm_cpp.cache import DEMO
from mobilellm_cpp.engine.library import llama_cpp

ASK = [{"role": "user", "content": "who bakes the bread here?"}]
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "n": {"type": "integer"}},
    "required": ["name", "n"],
    "additionalProperties": False,
}
TOOLS = [{"type": "function", "function": {"name": "bake", "parameters": SCHEMA}}]
CHOICE = {"type": "function", "function": {"name": "bake"}}


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    return demo_model(tmp_path_factory.mktemp("structured"))


def is_sound(text):
    jsonschema.validate(json.loads(text), SCHEMA)
    return True


FORMS = [
    ({"json_schema": SCHEMA}, is_sound),
    ({"json_schema": json.dumps(SCHEMA)}, is_sound),
    ({"response_format": {"type": "json_object", "schema": SCHEMA}}, is_sound),
    ({"regex": r" {2}\w{3}é?"}, lambda text: re.fullmatch(r" {2}\w{3}é?", text)),
    ({"lark": 'start: "\\nUser:" /[0-9]{2}/'}, lambda text: re.fullmatch(r"\nUser:\d\d", text)),
    ({"grammar": 'root ::= "(" root ")" | "yes" | "no"'}, lambda text: text.strip("()")),
    ({"grammar": llama_cpp.LlamaGrammar.from_string('root ::= " a" | "b"', verbose=False)}, len),
]


@pytest.mark.parametrize(("form", "fits"), FORMS, ids=lambda value: str(value)[:40])
@pytest.mark.parametrize("prompt", ["Once upon a time", ASK], ids=["text", "messages"])
def test_a_text_and_an_answer_have_their_form(llm, form, fits, prompt):
    ended = 0
    for seed in range(6):
        stream = llm.stream(prompt, temperature=1.5, seed=seed, max_tokens=120, **form)
        text = "".join(stream)
        if stream.finish_reason == "stop":
            ended += 1
            assert fits(text)
    assert ended


def test_an_answer_that_is_complete_ends_there(llm):
    stream = llm.stream("hi", regex="a", max_tokens=1)
    assert "".join(stream) == "a"
    assert (stream.finish_reason, stream.usage["completion_tokens"]) == ("stop", 1)
    stream = llm.stream("hi", regex="[a-z]{300}", max_tokens=4)
    assert re.fullmatch("[a-z]+", "".join(stream)) and stream.finish_reason == "length"


def test_a_chat_completion_has_the_form_asked_for(llm):
    for response_format in [
        {"type": "json_object", "schema": SCHEMA},
        {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}},
    ]:
        for seed in range(5):
            (choice,) = llm.create_chat_completion(
                ASK, temperature=1.2, seed=seed, max_tokens=150, response_format=response_format
            )["choices"]
            if choice["finish_reason"] == "stop":
                is_sound(choice["message"]["content"])


def test_processors_and_a_logit_bias_go_together(llm):
    """llama_cpp.Llama drops both."""
    (a,) = llm.tokenize(b"a", add_bos=False)[-1:]

    def only_a_and_b(tokens, logits):
        kept = logits[[a, a + 1]].copy()
        logits[:] = -np.inf
        logits[[a, a + 1]] = kept
        return logits

    settings = dict(logits_processor=[only_a_and_b], logit_bias={a: 100.0, a + 2: 100.0})
    answer = llm.create_completion("x", max_tokens=4, temperature=1.0, **settings)
    assert answer["choices"][0]["text"] == llm.detokenize([a] * 4).decode()


def test_a_streamed_chat_completion_has_the_form_asked_for(llm):
    chunks = llm.create_chat_completion(
        ASK,
        seed=3,
        max_tokens=200,
        stream=True,
        response_format={"type": "json_object", "schema": SCHEMA},
        logit_bias={"300": 2.0},
    )
    choices = [chunk["choices"][0] for chunk in chunks]
    assert choices[-1]["finish_reason"] == "stop"
    is_sound("".join(choice["delta"].get("content") or "" for choice in choices))


@pytest.mark.parametrize(
    "arguments",
    [
        {"tools": TOOLS, "tool_choice": CHOICE},
        {"functions": [TOOLS[0]["function"]], "function_call": {"name": "bake"}},
    ],
    ids=["tools", "functions"],
)
def test_a_chosen_tool_is_called_with_what_it_takes(llm, arguments):
    """llama_cpp's own grammar lets raw line ends through in strings."""
    for seed in range(5):
        (choice,) = llm.create_chat_completion(
            ASK, temperature=1.2, seed=seed, max_tokens=150, **arguments
        )["choices"]
        (call,) = choice["message"]["tool_calls"]
        assert call["function"]["name"] == "bake"
        if llm.tokenize(call["function"]["arguments"].encode(), add_bos=False)[150:] == []:
            text = call["function"]["arguments"]
            assert not text.endswith("}") or is_sound(text)


def test_answers_of_other_forms_at_the_same_time(llm):
    """Each is what it is alone."""
    forms = [{"json_schema": SCHEMA}, {"regex": "[a-z ]{30}"}, {}, {"lark": 'start: ("x" "y"?)+'}]
    settings = dict(max_tokens=40, temperature=1.0)
    alone = [
        "".join(llm.stream("Once", seed=seed, **settings, **form))
        for seed, form in enumerate(forms)
    ]
    streams = [llm.stream("Once", seed=seed, **settings, **form) for seed, form in enumerate(forms)]
    texts = [""] * len(streams)
    for _ in range(60):
        for i, stream in enumerate(streams):
            texts[i] += next(stream, "")
    assert texts == alone


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"regex": "(a"}, "unclosed group"),
        ({"regex": "a", "lark": "start: /a/"}, "one form"),
        ({"response_format": {"type": "json_object"}, "grammar": "root ::= "}, "one form"),
        ({"grammar": "root ::= answr"}, "answr"),
        ({"response_format": {"type": "xml"}}, "xml"),
        ({"json_schema": []}, "must be an object"),
    ],
)
def test_a_form_that_cannot_be_followed_is_refused_at_once(llm, arguments, reason):
    with pytest.raises(ModelError, match=re.escape(reason)):
        llm.stream("hi", **arguments)


def test_a_chat_completion_refuses_bad_forms(llm):
    for arguments in [
        {"response_format": {"type": "json_object", "schema": {"type": "objec"}}},
        {"response_format": {"type": "yaml"}},
        {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "eat"}}},
    ]:
        with pytest.raises(ModelError):
            llm.create_chat_completion(ASK, max_tokens=4, **arguments)
        with pytest.raises(ModelError):
            llm.create_chat_completion(ASK, max_tokens=4, stream=True, **arguments)


def test_no_form_after_close(tmp_path):
    convert_checkpoint(DEMO, tmp_path / "demo.gguf", type="q8_0")
    llm = MobileLLM(tmp_path / "demo.gguf", n_ctx=64, n_threads=1)
    llm.close()
    with pytest.raises(ModelError, match="closed"):
        llm.stream("hi", regex="a")
