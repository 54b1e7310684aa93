"""Tools: how a model is told of them, the form that holds its answer to a call, and what it called.

A call is JSON, {"name": ..., "arguments": {...}}, which the grammar of the answer holds to the
tool's schema; several calls stand in lines of their own. Where the model may choose, an answer that
begins with a brace (or <tool_call>, as many chat templates have it) is a call, and any other is
text."""

import json
import re
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import ModelError
from .structured import json_rule

if TYPE_CHECKING:
    from .answers import Stream
    from .model import MobileLLM

FORMS = {"json_schema", "regex", "lark", "grammar", "response_format"}
NAME = re.compile(r"[a-zA-Z0-9_.-]{1,64}")
TAG = "<tool_call>"
MAX_CALLS = 8  # in an answer: a small model may well not know when to end
TOLD = """You may call one of these functions:
{tools}
To call one, answer with nothing but {{"name": "its name", "{key}": {{...}}}}."""


class ToolCall(NamedTuple):
    """A function that a model called: its name, its arguments, which fit the function's schema, and
    what the message with its result names as tool_call_id."""

    name: str
    arguments: dict[str, Any]
    id: str

    def as_openai(self) -> dict[str, Any]:
        """In the form of OpenAI's messages."""
        function = {"name": self.name, "arguments": json.dumps(self.arguments)}
        return {"id": self.id, "type": "function", "function": function}


class Offer:
    """tools: as OpenAI's chat completions have them, {"type": "function", "function": {"name",
    "description", "parameters"}}. choice: "auto", "required", or the name of a tool that must be
    called. template: the model's chat template. several: an answer may be several calls."""

    def __init__(
        self, tools: Sequence[Mapping[str, Any]], choice: str, template: str, several: bool = False
    ) -> None:
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
        self.lark = self._grammar(called, several)

    def _grammar(self, functions: Sequence[Mapping[str, Any]], several: bool) -> str:
        calls = []
        for number, function in enumerate(functions):
            begin = json.dumps(f'{{"name": "{function["name"]}", "{self._key}": ')
            schema = function.get("parameters") or {"type": "object", "properties": {}}
            calls.append(f'c{number}: {begin} {json_rule(schema)} "}}"')
        call = "call: " + " | ".join(f"c{number}" for number in range(len(calls)))
        start = "start: SPACE? (TEXT | calls | tagged)"
        if not self.may_be_text:
            start = "start: SPACE? calls"
        rules = [
            'SPACE: " "',
            r"LINE: /\n?/",
            r"TEXT: /([^{<\s]|<[^t]|<t[^o])(.|\n)*/",
            "calls: call" + (rf' ("\n" call){{0,{MAX_CALLS - 1}}}' if several else ""),
            "tagged: tag" + (rf' ("\n" tag){{0,{MAX_CALLS - 1}}}' if several else ""),
            'tag: "<tool_call>" LINE call LINE "</tool_call>"',
        ]
        return "\n".join([start, *rules, call, *calls]) + "\n"

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

    def called(self, text: str) -> list[ToolCall]:
        """The calls that a whole answer is; none where it is text, or cut off."""
        found, rest = [], text.strip()
        while rest:
            rest = rest.removeprefix(TAG).lstrip()
            try:
                made, end = json.JSONDecoder().raw_decode(rest)
                name, arguments = made["name"], made[self._key]
            except (ValueError, KeyError, TypeError, RecursionError):
                return []
            found.append(ToolCall(name, arguments, f"call_{uuid.uuid4().hex[:24]}"))
            rest = rest[end:].lstrip().removeprefix("</tool_call>").lstrip()
        return found

    def texts(self, pieces: Iterator[str], stream: "Stream") -> Iterator[str]:
        """The pieces of a stream as they come once they are known to be none of a call. What is
        called is in tool_calls at its end."""
        held, is_text = "", False
        for piece in pieces:
            held += "" if is_text else piece
            if is_text:
                yield piece
            elif self.is_call(held) is False:
                is_text = True
                yield held.lstrip(" ")
            else:
                yield ""  # a step of the engine has ended
        if not is_text:
            stream.tool_calls = self.called(held)
            if stream.tool_calls:
                stream.finish_reason = "tool_calls"
            else:
                yield held.lstrip(" ")


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
    llm: "MobileLLM",
    messages: Sequence[Mapping[str, Any]],
    offer: Offer | None,
    sampling: Mapping[str, Any],
) -> "Stream":
    """The answer to a conversation, in which tools may be called."""
    if offer is None:
        knows = "tool" in llm.metadata.get("tokenizer.chat_template", "")
        return llm._stream(messages if knows else plain(messages), sampling, None)
    if forms := sorted(FORMS & set(sampling)):
        raise ModelError(f"{forms[0]} does not go with tools, which give the answer its form")
    stop = sampling.get("stop") or []
    stop = [stop] if isinstance(stop, str) else stop
    own = llm._stop if offer.may_be_text else ()
    given = {**sampling, "lark": offer.lark, "stop": [*stop, *own]}
    stream = llm._stream(offer.prompt(llm, messages), given, None)
    stream._pieces = offer.texts(stream._pieces, stream)
    return stream


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


def offered(tools: Any, choice: str, template: str, several: bool = False) -> Offer | None:
    """What chat's arguments offer. Raises ModelError."""
    if not tools or choice == "none":
        return None
    return Offer(checked_tools(tools), choice, template, several)
