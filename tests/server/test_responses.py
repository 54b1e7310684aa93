"""OpenAI's responses, through its client."""

import json
from typing import Annotated, Literal

import openai
import pytest
from pydantic import BaseModel, Field

ASKED = "Hello! Who are you?"
MESSAGES = [{"role": "user", "content": ASKED}]


class Guide(BaseModel):
    name: Literal["Pip", "Ann"]
    year: Annotated[int, Field(ge=1900, le=2100)]


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def test_a_response(client, llm):
    said = llm.chat(MESSAGES, temperature=0)
    made = client.responses.create(model="demo", input=ASKED, temperature=0)
    assert made.output_text == said and made.status == "completed"
    assert made.usage.input_tokens == said.usage["prompt_tokens"]
    assert made.usage.output_tokens == said.usage["completion_tokens"]
    cut = client.responses.create(model="demo", input=ASKED, temperature=0, max_output_tokens=3)
    assert cut.status == "incomplete" and cut.incomplete_details.reason == "max_output_tokens"
    system = [{"role": "system", "content": "Be brief."}, *MESSAGES]
    made = client.responses.create(
        model="demo", input=MESSAGES, instructions="Be brief.", temperature=0
    )
    assert made.output_text == llm.chat(system, temperature=0)
    again = [*MESSAGES, *(item.model_dump() for item in made.output), *MESSAGES]
    assert client.responses.create(model="demo", input=again, temperature=0).output_text


def test_its_events(client, llm):
    with client.responses.stream(model="demo", input=ASKED, temperature=0) as stream:
        events = list(stream)
        assert stream.get_final_response().output_text == llm.chat(MESSAGES, temperature=0)
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type.removeprefix("response.") for event in events]
    assert kinds[:4] == ["created", "in_progress", "output_item.added", "content_part.added"]
    ends = ["output_text.done", "content_part.done", "output_item.done", "completed"]
    assert kinds[-4:] == ends and set(kinds[4:-4]) == {"output_text.delta"}


def test_parse(client):
    made = client.responses.parse(model="demo", input=ASKED, text_format=Guide, temperature=0)
    assert isinstance(made.output_parsed, Guide)


def test_tools(client):
    tool = openai.pydantic_function_tool(Guide)["function"]
    asked = dict(
        model="demo",
        input=ASKED,
        tools=[{"type": "function", **tool}],
        tool_choice="required",
        temperature=0,
    )
    (call,) = client.responses.create(**asked).output
    assert call.type == "function_call" and call.name == "Guide"
    Guide.model_validate_json(call.arguments)
    with client.responses.stream(**asked) as stream:
        events = list(stream)
        (again,) = stream.get_final_response().output
    assert again.arguments == call.arguments
    kinds = [event.type.removeprefix("response.") for event in events]
    assert "function_call_arguments.done" in kinds and kinds[-1] == "completed"
    lamp = {"type": "object", "properties": {"on": {"type": "boolean"}}, "required": ["on"]}
    more = {**asked, "tools": [{"type": "function", "name": "lamp", "parameters": lamp}]}
    more |= {"temperature": 1.5, "extra_body": {"seed": 3}, "parallel_tool_calls": True}
    made = client.responses.create(**more)
    with client.responses.stream(**more) as stream:
        list(stream)
        again = stream.get_final_response().output
    assert [each.arguments for each in made.output] == [each.arguments for each in again]
    assert (
        made.parallel_tool_calls
        and len(again) > 1
        and {each.type for each in again} == {"function_call"}
    )
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "It is Pip."}
    history = [*MESSAGES, call.model_dump(exclude_none=True), result]
    made = client.responses.create(**{**asked, "input": history, "tool_choice": "none"})
    assert made.output[0].type == "message"


@pytest.mark.parametrize(
    "wrong",
    [
        {"previous_response_id": "resp_1"},
        {"background": True},
        {"tools": [{"type": "web_search"}]},
        {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
        {"text": {"format": {"type": "json_schema", "name": "a", "schema": {"not": {}}}}},
        {"tool_choice": "required"},
    ],
)
def test_what_there_is_not(client, wrong):
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(**{"model": "demo", "input": ASKED, **wrong})
    assert json.loads(caught.value.response.text)["error"]["message"]
