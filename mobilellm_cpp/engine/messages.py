"""Messages of a chat, checked, and the template of models that have none."""

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import ModelError

# {"role": "system" | "user" | "assistant", "content": a text, or OpenAI's list of text parts}
Message = Mapping[str, Any]


# For files without a chat template: the base models, which continue a dialogue as text.
PLAIN_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'system' %}{{ m['content'] }}\n"
    "{% elif m['role'] == 'user' %}User: {{ m['content'] }}\nAssistant:"
    "{% else %} {{ m['content'] }}\n{% endif %}{% endfor %}"
)


PLAIN_STOP: tuple[str, ...] = ("\nUser:", "\nAssistant:")


def utf8(text: str) -> bytes:
    """UTF-8; what no UTF-8 can say (undecodable bytes of a shell) is left to the tokenizer."""
    return text.encode("utf-8", "surrogatepass")


def checked_messages(messages: Any) -> list[dict[str, Any]]:
    """Messages with their text parts joined."""
    if not isinstance(messages, (list, tuple)) or not messages:
        raise ModelError('messages must be a list of {"role": ..., "content": ...}, at least one')
    found = []
    for message in messages:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ModelError('messages must be a list of {"role": ..., "content": ...}')
        content = message.get("content")
        if isinstance(content, (list, tuple)):
            content = "".join(_part(part) for part in content)
        if not isinstance(content, str) and not (content is None and len(message) > 2):
            raise ModelError("the content of a message is neither a text nor a list of text parts")
        found.append({**message, "content": content or ""})
    return found


def _part(part: Any) -> str:
    text = part.get("text") if isinstance(part, Mapping) else part
    if not isinstance(text, str) or (isinstance(part, Mapping) and part.get("type") != "text"):
        raise ModelError("a part of a message is not a text: this model reads only text")
    return text


class StoppingFormatter:
    """A chat template for llama_cpp's chat handlers, with the stop strings that go with it."""

    def __init__(self, template: Any, stop: Sequence[str]) -> None:
        self._template, self._stop = template, list(stop)

    def __call__(self, **arguments: Any) -> Any:
        formatted = self._template(**arguments)
        formatted.stop = [
            *self._stop,
            *([formatted.stop] if isinstance(formatted.stop, str) else formatted.stop or []),
        ]
        return formatted
