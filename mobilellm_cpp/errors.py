"""The exceptions of mobilellm_cpp: one sentence each, ready to be shown to a person."""

MAX_LENGTH = 600  # characters of a message; what a file puts into one can be long


class MobileLLMError(Exception):
    """Something the user can understand and mend; the message is one sentence on one line.

    It may quote a stranger's file: what would move a terminal's cursor is escaped.
    """

    def __init__(self, message: str) -> None:
        text = " ".join(message.splitlines())
        text = "".join(c if c.isprintable() else _escaped(c) for c in text)
        if len(text) > MAX_LENGTH:
            text = f"{text[: MAX_LENGTH - 200]} ... {text[-195:]}"
        super().__init__(text)


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode()


class CheckpointError(MobileLLMError):
    """A checkpoint that cannot be converted: names the file and the field or tensor."""


class ModelError(MobileLLMError):
    """A GGUF file or an engine call that cannot be carried out."""


class ContextError(ModelError):
    """More tokens than the context holds. `said` is the message without what mends it, which has
    other names elsewhere."""

    def __init__(self, said: str) -> None:
        super().__init__(f"{said}: load the model with a larger n_ctx")
        self.said = said
