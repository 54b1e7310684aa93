"""A program in which each line with an arrow is wrong, and a type checker says so."""

import mobilellm_cpp
from mobilellm_cpp import Conversation, MobileLLM, convert_checkpoint, verify

messages = [{"role": "user", "content": "hi"}]
llm = MobileLLM("m")
llm.strem("x")  # <- no such method
MobileLLM("m", n_contexts=3)  # <- no such argument
MobileLLM("m", n_ctx="3")  # <-
MobileLLM()  # <-
convert_checkpoint("m", type="q5")  # <- no such type of weights
MobileLLM.from_checkpoint("m", type="q5")  # <-
MobileLLM.from_checkpoint("m", n_contexts=3)  # <-
llm.stream("x", temprature=1)  # <- no such argument
llm.stream("x", temperature="hot")  # <-
llm.stream("x", max_tokens=1.5)  # <-
llm.stream(3)  # <-
llm.chat(messages, temprature=1)  # <-
llm.chat("hi")  # <- not messages
llm("x", temprature=1)  # <-
llm.create_completion("x", temprature=1)  # <-
llm.create_chat_completion(messages, temprature=1)  # <-
print(llm("x", stream=True)["choices"])  # <- pieces
print(llm("x")["choices"][0]["txt"])  # <- no such key
llm.embeddings("a").size()  # <- a method that is none
llm.logits("hi")  # <- not tokens
llm.n_ctx().upper()  # <-
Conversation(llm, temprature=1)  # <-
Conversation("m")  # <-
mobilellm_cpp.verfy("m", "c")  # <-
print(verify("m", "c").okay)  # <-
