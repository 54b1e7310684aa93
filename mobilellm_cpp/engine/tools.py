"""Tools: how a model is told of them, the form that holds its answer to a call, and what it called.

A call is JSON, {"name": ..., "arguments": {...}}, which the grammar of the answer holds to the
tool's schema. Where the model may choose, an answer that begins with a brace (or <tool_call>, as
many chat templates have it) is a call, and any other is text."""

import json
import re
import uuid
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import ModelError
from .structured import json_rule

if TYPE_CHECKING:
    from .answers import Stream
    from .model import MobileLLM

FORMS = {"json_schema", "regex", "lark", "grammar", "response_format"}
NAME = re.compile(r"[a-zA-Z0-9_.-]{1,64}")
TAG = "<tool_call>"
TOLD = """You may call one of these functions:
{tools}
To call one, answer with nothing but {{"name": "its name", "{key}": {{...}}}}."""


class ToolCall(NamedTuple):
    """A function that a model called: its name, its arguments, which fit the function's schema, and
    what the message with its result names as tool_call_id."""

    name: str
    arguments: dict[str, Any]
    id: str


class Offer:
    """tools: as OpenAI's chat completions have them, {"type": "function", "function": {"name",
    "description", "parameters"}}. choice: "auto", "required", or the name of a tool that must be
    called. template: the model's chat template."""

    def __init__(self, tools: Sequence[Mapping[str, Any]], choice: str, template: str) -> None:
        self._tools = [dict(tool) for tool in tools]
        self._told_by_template = "tools" in template
        llama = '"parameters": ' in template and TAG not in template
        self._key = "parameters" if llama else "arguments"
        self.may_be_text = choice == "auto"
        called = [tool["function"] for tool in tools]
        if choice not in ("auto", "required"):
            called = [each for each in called if each["name"] == choice]
            if not called:
                raise ModelError(f"tool_choice names {choice!r}, which is not among tools")
        self.lark = self._grammar(called)

    def _grammar(self, functions: Sequence[Mapping[str, Any]]) -> str:
        calls = []
        for number, function in enumerate(functions):
            begin = json.dumps(f'{{"name": "{function["name"]}", "{self._key}": ')
            schema = function.get("parameters") or {"type": "object", "properties": {}}
            calls.append(f'c{number}: {begin} {json_rule(schema)} "}}"')
        call = "call: " + " | ".join(f"c{number}" for number in range(len(calls)))
        start = 'start: SPACE? (TEXT | call | "<tool_call>" LINE call LINE "</tool_call>")'
        if not self.may_be_text:
            start = "start: SPACE? call"
        terminals = [
            'SPACE: " "',
            r"LINE: /\n?/",
            r"TEXT: /([^{<\s]|<[^t]|<t[^o])(.|\n)*/",
        ]
        return "\n".join([start, *terminals, call, *calls]) + "\n"

    def prompt(self, llm: "MobileLLM", messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """The tokens of a conversation in which the tools are told."""
        if self._told_by_template:
            return llm.chat_tokens(messages, self._tools)
        tools = "\n".join(json.dumps(tool["function"]) for tool in self._tools)
        told = TOLD.format(tools=tools, key=self._key)
        first, *rest = messages
        if first["role"] == "system":
            told = f"{first['content']}\n\n{told}"
        else:
            rest = list(messages)
        return llm.chat_tokens([{"role": "system", "content": told}, *plain(rest, self._key)])

    def is_call(self, text: str) -> bool | None:
        """Whether a text that begins like this is a call; None: that is open."""
        text = text.lstrip()
        if not text or (TAG.startswith(text) and text != TAG):
            return None
        return text[0] == "{" or text.startswith(TAG)

    def called(self, text: str) -> dict[str, Any] | None:
        """The tool call that a whole answer is, in OpenAI's form."""
        text = text.strip().removeprefix(TAG).removesuffix("</tool_call>")
        try:
            made = json.loads(text)
            name, arguments = made["name"], made[self._key]
        except (ValueError, KeyError, TypeError):
            return None  # text, or cut off
        function = {"name": name, "arguments": json.dumps(arguments)}
        return {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}


def plain(messages: Sequence[Mapping[str, Any]], key: str = "arguments") -> list[dict[str, Any]]:
    """Messages with calls and results as text, for templates that know neither."""
    found = []
    for message in messages:
        message = dict(message)
        if calls := message.pop("tool_calls", None):
            said = [
                json.dumps({"name": call["function"]["name"], key: call["function"]["arguments"]})
                for call in calls
            ]
            message["content"] = "\n".join(filter(None, [message["content"], *said]))
        if message["role"] == "tool":
            message = {"role": "user", "content": f"Result of the call: {message['content']}"}
        found.append(message)
    return found


def start(
    llm: "MobileLLM", messages: Sequence[Mapping[str, Any]], offer: Offer | None, **sampling: Any
) -> "Stream":
    """The answer to a conversation, in which tools may be called."""
    if offer is None:
        knows = "tool" in llm.metadata.get("tokenizer.chat_template", "")
        return llm.stream(messages if knows else plain(messages), **sampling)
    stop = sampling.pop("stop", None) or []
    stop = [stop] if isinstance(stop, str) else stop
    own = llm._stop if offer.may_be_text else ()
    tokens = offer.prompt(llm, messages)
    return llm.stream(tokens, lark=offer.lark, stop=[*stop, *own], **sampling)


def checked_tools(tools: Any) -> list[dict[str, Any]]:
    """Tools in OpenAI's form; each may also be its function alone. Raises ModelError."""
    if not isinstance(tools, (list, tuple)):
        raise ModelError("tools must be a list of functions, each described by a JSON schema")
    found: list[dict[str, Any]] = []
    for tool in tools:
        function = tool.get("function", tool) if isinstance(tool, Mapping) else {}
        if not isinstance(function, Mapping) or not NAME.fullmatch(str(function.get("name") or "")):
            raise ModelError(
                'a tool is {"name": ..., "description": ..., "parameters": a JSON schema}, and its '
                "name consists of letters, digits, _, . and -"
            )
        found.append({"type": "function", "function": dict(function)})
    if len({each["function"]["name"] for each in found}) < len(found):
        raise ModelError("two tools have the same name")
    return found


def answer_with_tools(
    llm: "MobileLLM",
    messages: Sequence[Mapping[str, Any]],
    tools: Any,
    choice: str,
    sampling: Mapping[str, Any],
) -> tuple["Stream", str, list[ToolCall]]:
    """The stream of an answer, which has ended, its text, and the calls that it is."""
    offer = None
    if tools and choice != "none":
        if forms := sorted(FORMS & set(sampling)):
            raise ModelError(f"{forms[0]} does not go with tools, which give the answer its form")
        template = llm.metadata.get("tokenizer.chat_template", "")
        offer = Offer(checked_tools(tools), choice, template)
    stream = start(llm, messages, offer, **sampling)
    text = "".join(stream)
    call = offer.called(text) if offer is not None and offer.is_call(text) else None
    if call is None:  # with tokens for its prompt the stream does not know that it answers messages
        return stream, text if offer is None else text.lstrip(" "), []
    function = call["function"]
    stream.finish_reason = "tool_calls"
    return stream, "", [ToolCall(function["name"], json.loads(function["arguments"]), call["id"])]
