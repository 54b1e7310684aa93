"""Answers under a constraint."""

from mobilellm_cpp import MobileLLM, convert_checkpoint
from mobilellm_cpp.cache import DEMO
from mobilellm_cpp.engine.library import llama_cpp
from mobilellm_cpp.engine.structured import Constraint


def demo_model(folder):
    convert_checkpoint(DEMO, folder / "demo.gguf", type="q8_0")
    return MobileLLM(folder / "demo.gguf", n_ctx=512, n_threads=1)


def answer(llm, constraint, seed, temperature=1.5, max_tokens=150):
    """What the model says under a constraint, or None where it is cut off."""
    prompt = llm.tokenize(b"Once upon a time")
    llm.set_seed(seed)
    said = []
    sampling = dict(top_k=0, top_p=1.0, min_p=0.0, temp=temperature)
    for token in llm.generate(prompt, **sampling, logits_processor=[constraint]):
        if llama_cpp.llama_vocab_is_eog(llm._model.vocab, token):
            return b"".join(said).decode()
        if len(said) == max_tokens:
            return None
        said.append(llm._piece(token))


def answers(llm, vocabulary, n=6, **form):
    found = [answer(llm, Constraint(vocabulary, **form), seed) for seed in range(n)]
    found = [text for text in found if text is not None]
    assert found, "no answer came to its end"
    return found


def closed(**properties):
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }
