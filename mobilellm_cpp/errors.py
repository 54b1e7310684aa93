"""The exceptions of mobilellm_cpp: one sentence each, ready to be shown to a person."""


class MobileLLMError(Exception):
    """Something the user can understand and mend; the message is one sentence."""


class CheckpointError(MobileLLMError):
    """A checkpoint that cannot be converted: names the file and the field or tensor."""


class ModelError(MobileLLMError):
    """A GGUF file or an engine call that cannot be carried out."""
