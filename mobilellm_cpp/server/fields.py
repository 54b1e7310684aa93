"""The fields of OpenAI's requests, and how they become arguments of MobileLLM.stream.

A field that is not here is refused by its name, never passed over; those that change nothing on a
server with one model and no accounts are accepted."""

import contextlib
import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints

MAX_CHOICES = 16
MAX_TEXTS = 2048  # in a request
Name = Annotated[str, StringConstraints(max_length=512)]
Whole = Annotated[int, Field(ge=0, le=2**31 - 1)]
Penalty = Annotated[float, Field(ge=-2, le=2)]


class Fields(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


def _only_text(content: Any) -> Any:
    """Content of a message. What is no text is named here: a union of kinds says nothing of it."""
    for part in content if isinstance(content, list) else ():
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(kind, str) and not kind.endswith("text"):
            raise ValueError(f"this model reads only text, not {kind[:40]}")
    return content


def _only_texts(items: Any) -> Any:
    """The same for a list of messages."""
    for item in items if isinstance(items, list) else ():
        _only_text(item.get("content") if isinstance(item, dict) else None)
    return items


class TextPart(Fields):
    type: Literal["text"]
    text: str


class Call(Fields):
    name: str
    arguments: str


class ToolCall(Fields):
    id: str
    type: Literal["function"] = "function"
    function: Call
    index: int | None = None  # as streams have it

    def plain(self) -> dict[str, Any]:
        arguments: Any = self.function.arguments
        with contextlib.suppress(ValueError, RecursionError):
            arguments = json.loads(arguments)  # an object, as templates want it
        function = {"name": self.function.name, "arguments": arguments}
        return {"id": self.id, "type": "function", "function": function}


class Message(Fields):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[str | list[TextPart] | None, BeforeValidator(_only_text)] = None
    name: str | None = None
    tool_call_id: str | None = None
    tool_calls: list[ToolCall] | None = None
    refusal: str | None = None
    reasoning_content: str | None = None

    def plain(self) -> dict[str, Any]:
        """As chat templates know messages."""
        content = self.content
        if isinstance(content, list):
            content = "".join(part.text for part in content)
        role = "system" if self.role == "developer" else self.role
        message: dict[str, Any] = {"role": role, "content": content or ""}
        for field in ("name", "tool_call_id"):
            if (value := getattr(self, field)) is not None:
                message[field] = value
        if self.tool_calls:
            message["tool_calls"] = [call.plain() for call in self.tool_calls]
        return message


class Function(Fields):
    name: Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Fields):
    type: Literal["function"]
    function: Function


class ChosenName(Fields):
    name: str


class ChosenTool(Fields):
    type: Literal["function"]
    function: ChosenName


class StreamOptions(Fields):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class Sampled(Fields):
    """What all requests for text share."""

    model: Name
    temperature: Annotated[float, Field(ge=0, le=1e6)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Whole | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    typical_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repeat_penalty: Annotated[float, Field(ge=1e-3, le=1e3)] | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: str | Annotated[list[str], Field(max_length=16)] | None = None
    logit_bias: Mapping[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    regex: str | None = None
    lark: str | None = None
    grammar: str | None = None
    user: str | None = None

    def sampling(self, number: int = 0) -> dict[str, Any]:
        """Arguments of MobileLLM.stream for a choice; each has a seed of its own."""
        names = "temperature top_p top_k min_p typical_p repeat_penalty frequency_penalty"
        names += " presence_penalty stop logit_bias regex lark grammar"
        found = {name: getattr(self, name) for name in names.split()}
        if self.seed is not None:
            found["seed"] = (self.seed + number) & 0x7FFFFFFF
        return {name: value for name, value in found.items() if value is not None}

    def form_names(self) -> list[str]:
        """The fields that say which form the answer has."""
        names = ("response_format", "regex", "lark", "grammar")
        given = {name: getattr(self, name, None) for name in names}
        return [name for name in names if given[name] not in (None, {"type": "text"})]


class ChatRequest(Sampled):
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_TEXTS)]
    max_tokens: Whole | None = None
    max_completion_tokens: Whole | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: dict[str, Any] | None = None
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ChosenTool | None = None
    parallel_tool_calls: bool | None = None
    store: bool | None = None
    metadata: dict[str, Any] | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None


Texts = (
    str
    | Annotated[list[str], Field(min_length=1, max_length=MAX_TEXTS)]
    | Annotated[list[int], Field(min_length=1)]
    | Annotated[
        list[Annotated[list[int], Field(min_length=1)]], Field(min_length=1, max_length=MAX_TEXTS)
    ]
)


class CompletionRequest(Sampled):
    prompt: Texts
    max_tokens: Whole | None = 16
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    best_of: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    echo: bool | None = None
    suffix: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None


class EmbeddingRequest(Fields):
    model: Name
    input: Texts
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Field(ge=1)] | None = None
    user: str | None = None


class InputText(Fields):
    type: Literal["input_text", "output_text", "text"]
    text: str
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None


class InputMessage(Fields):
    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[InputText]
    id: str | None = None
    status: str | None = None
    phase: str | None = None

    def plain(self) -> dict[str, Any]:
        content = self.content
        if isinstance(content, list):
            content = "".join(part.text for part in content)
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": content}


class InputCall(Fields):
    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str
    id: str | None = None
    status: str | None = None
    parsed_arguments: Any = None

    def plain(self) -> dict[str, Any]:
        call = ToolCall(id=self.call_id, function=Call(name=self.name, arguments=self.arguments))
        return {"role": "assistant", "content": "", "tool_calls": [call.plain()]}


class InputResult(Fields):
    type: Literal["function_call_output"]
    call_id: str
    output: str | list[InputText]
    id: str | None = None
    status: str | None = None

    def plain(self) -> dict[str, Any]:
        output = self.output
        if isinstance(output, list):
            output = "".join(part.text for part in output)
        return {"role": "tool", "tool_call_id": self.call_id, "content": output}


class TextFormat(Fields):
    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None


class TextField(Fields):
    format: TextFormat | None = None
    verbosity: str | None = None


class ResponsesTool(Function):
    type: Literal["function"]


class ResponsesChosen(Fields):
    type: Literal["function"]
    name: str


class ResponsesRequest(Fields):
    model: Name
    input: Annotated[
        str
        | Annotated[
            list[InputMessage | InputCall | InputResult],
            Field(min_length=1, max_length=MAX_TEXTS),
        ],
        BeforeValidator(_only_texts),
    ]
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=1e6)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    text: TextField | None = None
    tools: Annotated[list[ResponsesTool], Field(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ResponsesChosen | None = None
    stream: bool | None = None
    parallel_tool_calls: bool | None = None
    store: bool | None = None
    metadata: dict[str, Any] | None = None
    user: str | None = None
    truncation: Literal["disabled"] | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    stream_options: StreamOptions | None = None
    include: Annotated[list[str], Field(max_length=0)] | None = None

    def messages(self) -> list[dict[str, Any]]:
        told = [{"role": "system", "content": self.instructions}] if self.instructions else []
        if isinstance(self.input, str):
            return [*told, {"role": "user", "content": self.input}]
        return [*told, *(item.plain() for item in self.input)]

    def response_format(self) -> dict[str, Any] | None:
        """In the words of chat completions."""
        form = self.text.format if self.text else None
        if form is None or form.type == "text":
            return None
        return {"type": form.type, "json_schema": {"schema": form.schema_}}

    def sampling(self) -> dict[str, Any]:
        found = {
            "max_tokens": self.max_output_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "seed": self.seed,
            "response_format": self.response_format(),
        }
        return {name: value for name, value in found.items() if value is not None}
