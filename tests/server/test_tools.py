"""Tools through the official openai client: calls that must, may and must not be made."""

from typing import Annotated, Literal

import openai
import pytest
from pydantic import BaseModel, Field

HELLO = [{"role": "user", "content": "Hello! Who are you?"}]


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


class Weather(BaseModel):
    """Tells the weather of a place."""

    place: Literal["Tarnby", "Oslo"]
    days: Annotated[int, Field(ge=1, le=9)]


class Lamp(BaseModel):
    """Lights the lamp."""

    on: bool


TOOLS = [openai.pydantic_function_tool(Weather), openai.pydantic_function_tool(Lamp)]


@pytest.mark.parametrize("choice", ["required", "Weather", "Lamp"])
def test_tools_that_must_be_called(client, choice):
    asked = dict(model="demo", messages=HELLO, tools=TOOLS, temperature=0)
    asked["tool_choice"] = (
        choice if choice == "required" else {"type": "function", "function": {"name": choice}}
    )
    made = client.chat.completions.parse(**asked)
    (choice_made,) = made.choices
    assert choice_made.finish_reason == "tool_calls" and choice_made.message.content is None
    (call,) = choice_made.message.tool_calls
    assert isinstance(call.function.parsed_arguments, (Weather, Lamp))
    assert choice == "required" or call.function.name == choice
    with client.chat.completions.stream(**asked) as stream:
        again = stream.get_final_completion().choices[0]
    assert again.finish_reason == "tool_calls"
    assert again.message.tool_calls[0].function == call.function
    cut = client.chat.completions.create(**asked, max_tokens=4).choices[0]
    assert cut.finish_reason == "length" and cut.message.tool_calls is None


def test_several_calls_in_an_answer(client):
    asked = dict(model="demo", messages=HELLO, tools=TOOLS[1:], tool_choice="required")
    asked |= dict(temperature=1.5, extra_body={"top_k": 0}, parallel_tool_calls=True)
    made = client.chat.completions.parse(**asked, seed=1).choices[0]
    calls = made.message.tool_calls
    assert len(calls) > 1 and made.finish_reason == "tool_calls"
    assert all(isinstance(call.function.parsed_arguments, Lamp) for call in calls)
    with client.chat.completions.stream(**asked, seed=1) as stream:
        again = stream.get_final_completion().choices[0].message.tool_calls
    assert [call.function.arguments for call in again] == [c.function.arguments for c in calls]
    assert len({call.id for call in again}) == len(calls)


def test_a_tool_that_may_be_called(client, llm):
    asked = dict(model="demo", messages=HELLO, tools=TOOLS, temperature=0, max_tokens=80)
    made = client.chat.completions.create(**asked).choices[0]  # the demo model knows no tools
    assert made.message.content and not made.message.content.startswith(" ")
    assert made.message.tool_calls is None and made.finish_reason in ("stop", "length")
    streamed = [c.choices[0] for c in client.chat.completions.create(**asked, stream=True)]
    assert "".join(c.delta.content or "" for c in streamed) == made.message.content
    assert streamed[-1].finish_reason == made.finish_reason and len(streamed) > 4
    none = client.chat.completions.create(**asked, tool_choice="none").choices[0]
    assert none.message.content == llm.chat(HELLO, temperature=0)
    brace = llm.tokenize(b"{", add_bos=False)[-1]
    made = client.chat.completions.create(**asked, logit_bias={str(brace): 100}).choices[0]
    assert made.finish_reason in ("tool_calls", "length")  # a brace begins a call


def test_results_of_tools(client):
    call = {"name": "Lamp", "arguments": '{"on": true}'}
    messages = [
        *HELLO,
        {"role": "assistant", "tool_calls": [{"id": "1", "type": "function", "function": call}]},
        {"role": "tool", "tool_call_id": "1", "content": "The lamp is on."},
    ]
    for tools in ({}, {"tools": TOOLS}):
        made = client.chat.completions.create(
            model="demo", messages=messages, temperature=0, max_tokens=20, **tools
        )
        assert made.usage.prompt_tokens > 30


def test_wrong_tools(client):
    for wrong in (
        {"tool_choice": "required"},
        {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "Nothing"}}},
        {"tools": TOOLS, "response_format": {"type": "json_object"}},
        {"tools": [{"type": "function", "function": {"name": "a b"}}]},
        {"tools": [{"type": "function", "function": {"name": "a", "parameters": {"not": {}}}}]},
    ):
        with pytest.raises(openai.BadRequestError):
            client.chat.completions.create(model="demo", messages=HELLO, **wrong)
