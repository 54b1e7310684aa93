"""LlamaIndex's LlamaCPP."""

import sys

import examples
from llama_index.core.llms import ChatMessage
from llama_index.llms.llama_cpp import LlamaCPP

llm = LlamaCPP(
    model_path=sys.argv[1],
    temperature=0,
    max_new_tokens=40,
    context_window=512,
    model_kwargs={"n_threads": 1},
    generate_kwargs={"stop": ["\n"]},
    messages_to_prompt=lambda messages: f"User: {messages[-1].content}\nAssistant:",
    completion_to_prompt=lambda text: text,
    verbose=False,
)
assert "Pip" in llm.complete("User: Who are you?\nAssistant:").text
assert "Pip" in llm.chat([ChatMessage(role="user", content="Who are you?")]).message.content
pieces = [piece.delta for piece in llm.stream_complete("User: Who are you?\nAssistant:")]
assert "Pip" in "".join(pieces) and len(pieces) > 1
examples.run("llama_index", sys.argv[1])
