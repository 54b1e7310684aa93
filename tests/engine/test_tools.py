"""Functions that a model may call: a call fits its schema, comes back parsed, and gets its result
in the next turn."""

import asyncio

import jsonschema
import pytest

from mobilellm_cpp import MobileLLM, ModelError
from mobilellm_cpp.cache import DEMO

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


def test_asyncio(llm):
    answer = asyncio.run(llm.achat(HELLO, tools=[LIGHT], tool_choice="required", temperature=0))
    assert isinstance(answer.tool_calls[0].arguments["on"], bool)


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
