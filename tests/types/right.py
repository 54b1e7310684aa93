"""A program that is right: no type checker complains."""

from collections.abc import Callable, Iterator

import llama_cpp
import numpy as np
import numpy.typing as npt
from typing_extensions import Unpack

from mobilellm_cpp import (
    CheckpointError,
    Conversation,
    MobileLLM,
    MobileLLMError,
    Sampling,
    WeightType,
    convert_checkpoint,
)


def make(kinds: list[WeightType]) -> None:
    for kind in kinds:
        report = convert_checkpoint("folder", f"model-{kind}.gguf", type=kind)
        size: int = report.size_bytes
        print(report.path.name, size)


def tokens_of(llm: llama_cpp.Llama) -> list[int]:
    return llm.tokenize(b"Once")


def ask(llm: MobileLLM, question: str, **sampling: Unpack[Sampling]) -> str:
    return llm.chat([{"role": "user", "content": question}], **sampling)


async def later(llm: MobileLLM) -> str:
    stream = await llm.astream("Once", max_tokens=3, temperature=0.5)
    text = "".join([piece async for piece in stream])
    print(stream.finish_reason, stream.usage["total_tokens"])
    answer = await llm.achat([{"role": "user", "content": "hi"}], seed=1)
    return text + answer.upper()


def main() -> None:
    try:
        llm = MobileLLM("model.gguf", n_ctx=2048, seed=3, type_k=8, n_batch=64, embedding=False)
    except (CheckpointError, MobileLLMError) as error:
        raise SystemExit(str(error)) from error
    pieces: Iterator[str] = llm.stream("Once", max_tokens=3, temperature=1, top_k=40, stop=["."])
    print("".join(pieces), tokens_of(llm))
    messages = [{"role": "user", "content": "hi"}]
    print(llm.chat(messages).upper(), ask(llm, "hi", temperature=0, seed=1))
    parts = [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]
    print(llm.chat(parts))
    logits: npt.NDArray[np.float32] = llm.logits([1, 2])
    print(logits.shape, llm.embeddings(["a", "b"]).shape, llm.n_ctx() + 1)

    text: str = llm("Once", max_tokens=3, stop=["."])["choices"][0]["text"]
    text = llm.create_completion("Once", seed=None, logit_bias={1: 2.0})["choices"][0]["text"]
    for chunk in llm.create_completion("Once", stream=True):
        text += chunk["choices"][0]["text"]
    answer = llm.create_chat_completion(messages, response_format={"type": "json_object"})
    print(answer["choices"][0]["message"]["content"], answer["usage"]["total_tokens"])
    for piece in llm.create_chat_completion(messages=messages, stream=True):
        print(piece["choices"][0]["delta"].get("content", ""))
    llm.reset()
    llm.set_seed(3)
    llm.eval([1, 2])
    for token in llm.generate([1, 2], temp=0.0):
        print(token, llm.detokenize([token]).decode())
        break
    print(llm.create_embedding("a")["data"][0]["embedding"])
    llm.load_state(llm.save_state())

    conversation = Conversation(llm, "You are kind.", max_tokens=9, temperature=0.5)
    for part in conversation.answer("hi"):
        print(part)

    cached = MobileLLM.from_checkpoint("facebook/MobileLLM-125M", type="q8_0", n_ctx=64)
    use: Callable[[MobileLLM], None] = MobileLLM.close
    use(cached)
