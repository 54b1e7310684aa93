"""Functions that a model may call: a call fits its schema, comes back parsed, and gets its result
in the next turn."""

import asyncio

import jsonschema
import pytest

from mobilellm_cpp import MobileLLM, ModelError
from mobilellm_cpp.cache import DEMO
from mobilellm_cpp.engine.tools import Offer

HELLO = [{"role": "user", "content": "Who bakes the bread here?"}]
WEATHER = {
    "name": "weather",
    "description": "Tells the weather of a place.",
    "parameters": {
        "type": "object",
        "properties": {
            "place": {"enum": ["Tarnby", "Mill Lane"]},
            "days": {"type": "integer", "minimum": 1, "maximum": 9},
        },
        "required": ["place", "days"],
        "additionalProperties": False,
    },
}
LIGHT = {
    "type": "function",
    "function": {
        "name": "switch.light-2",
        "parameters": {
            "type": "object",
            "properties": {"on": {"type": "boolean"}},
            "required": ["on"],
            "additionalProperties": False,
        },
    },
}


@pytest.fixture(scope="module")
def llm():
    with MobileLLM.from_checkpoint(DEMO, "q8_0", n_threads=1) as llm:
        yield llm


@pytest.mark.parametrize("choice", ["required", "weather", "switch.light-2"])
def test_a_call_fits_its_schema(llm, choice):
    schemas = {"weather": WEATHER, "switch.light-2": LIGHT["function"]}
    for seed in range(6):
        answer = llm.chat(
            HELLO, tools=[WEATHER, LIGHT], tool_choice=choice, temperature=1.5, top_k=0, seed=seed
        )
        (call,) = answer.tool_calls
        assert answer == "" and answer.finish_reason == "tool_calls"
        assert call.name == choice or choice == "required"
        jsonschema.validate(call.arguments, schemas[call.name]["parameters"])
        assert answer.usage["completion_tokens"] > 3 and call.id


def test_it_may_answer_in_words(llm):
    plain = llm.chat(HELLO, tools=[WEATHER], tool_choice="none", temperature=0)
    assert plain == llm.chat(HELLO, temperature=0) and plain.tool_calls == []
    told = llm.chat(HELLO, tools=[WEATHER], temperature=0, max_tokens=40)  # the demo knows no tools
    assert told and told.tool_calls == [] and told.finish_reason in ("stop", "length")
    assert plain.message() == {"role": "assistant", "content": plain}


def test_the_result_goes_into_the_next_turn(llm):
    answer = llm.chat(HELLO, tools=[WEATHER], tool_choice="required", temperature=0)
    (call,) = answer.tool_calls
    message = answer.message()
    assert message["tool_calls"][0]["function"]["name"] == "weather"
    result = {"role": "tool", "tool_call_id": call.id, "content": "It rains."}
    for tools in (None, [WEATHER]):
        said = llm.chat([*HELLO, message, result], tools=tools, temperature=0, max_tokens=20)
        assert isinstance(said, str)
    # a template without tools reads call and result as words
    from mobilellm_cpp.engine.tools import plain

    first, second = plain([message, result])
    assert '"weather"' in first["content"] and second["content"].endswith("It rains.")


def test_a_call_that_is_cut_off_is_none(llm):
    answer = llm.chat(HELLO, tools=[WEATHER], tool_choice="required", temperature=0, max_tokens=4)
    assert answer.finish_reason == "length" and answer.tool_calls == []


def test_streams(llm):
    asked = {"tools": [WEATHER], "temperature": 0, "max_tokens": 40}
    words = llm.stream(HELLO, **asked)
    pieces = list(words)
    assert "".join(pieces) == llm.chat(HELLO, **asked) and len(pieces) > 1
    assert words.tool_calls == []
    called = llm.stream(HELLO, tools=[LIGHT], temperature=0, tool_choice="required")
    assert list(called) == [] and called.finish_reason == "tool_calls"
    assert isinstance(called.tool_calls[0].arguments["on"], bool)
    with pytest.raises(ModelError, match="tools need messages"):
        llm.stream("Who?", tools=[WEATHER])


def test_several_calls(llm):
    asked = {"tools": [LIGHT], "temperature": 1.5, "top_k": 0}
    asked |= {"tool_choice": "required", "parallel_tool_calls": True}
    most = 0
    for seed in range(2):
        answer = llm.chat(HELLO, **asked, seed=seed)
        assert answer == "" and answer.finish_reason == "tool_calls"
        for call in answer.tool_calls:
            jsonschema.validate(call.arguments, LIGHT["function"]["parameters"])
        assert len({call.id for call in answer.tool_calls}) == len(answer.tool_calls) <= 8
        most = max(most, len(answer.tool_calls))
    assert most > 1
    # and they are read back as one message, with a result for each
    results = [
        {"role": "tool", "tool_call_id": call.id, "content": "Done."} for call in answer.tool_calls
    ]
    assert llm.chat([*HELLO, answer.message(), *results], tools=[WEATHER], max_tokens=5)


@pytest.mark.parametrize(
    "text",
    [
        '{"name": "a", "arguments": {"b": "}\\n{"}}\n{"name": "a", "arguments": {}}',
        '<tool_call>\n{"name": "a", "arguments": {"b": "}\\n{"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "a", "arguments": {}}\n</tool_call>',
    ],
)
def test_the_forms_of_several_calls(text):
    tools = [{"type": "function", "function": {"name": "a"}}]
    calls = Offer(tools, "auto", "<tool_call>", several=True).called(text)
    assert [call.arguments for call in calls] == [{"b": "}\n{"}, {}]
    assert Offer(tools, "auto", "").called(text + '\n{"name": "a", "argu') == []


def test_asyncio(llm):
    asked = {"tools": [LIGHT], "tool_choice": "required", "temperature": 0}
    answer = asyncio.run(llm.achat(HELLO, **asked))
    assert isinstance(answer.tool_calls[0].arguments["on"], bool)

    async def streamed():
        stream = await llm.astream(HELLO, **asked)
        return [piece async for piece in stream], stream.tool_calls

    pieces, calls = asyncio.run(streamed())
    assert pieces == [] and calls[0].arguments == answer.tool_calls[0].arguments


def test_what_cannot_be_offered(llm):
    def refused(says, **arguments):
        with pytest.raises(ModelError, match=says):
            llm.chat(HELLO, max_tokens=2, **arguments)

    refused("a list of functions", tools="weather")
    refused("a tool is", tools=[{"name": "a b"}])
    refused("a tool is", tools=[3])
    refused("the same name", tools=[WEATHER, WEATHER])
    refused("'nothing', which is not among tools", tools=[WEATHER], tool_choice="nothing")
    refused("regex does not go with tools", tools=[WEATHER], regex="a")
    refused("not", tools=[{"name": "a", "parameters": {"not": {}}}])
