"""LangChain's ChatLlamaCpp, LlamaCpp and LlamaCppEmbeddings."""

import sys

import examples
from langchain_community.chat_models import ChatLlamaCpp
from langchain_community.embeddings import LlamaCppEmbeddings
from langchain_community.llms import LlamaCpp

from mobilellm_cpp import MobileLLM

model = {"model_path": sys.argv[1], "n_ctx": 512, "n_threads": 1, "verbose": False}
chat = ChatLlamaCpp(**model, temperature=0, max_tokens=40, stop=["\n"])
said = chat.invoke("Who are you?").content
assert "Pip" in said, said
assert "".join(piece.content for piece in chat.stream("Who are you?")) == said
llm = LlamaCpp(**model, temperature=0, max_tokens=40, stop=["\n"])
assert "Pip" in llm.invoke("User: Who are you?\nAssistant:")
assert "".join(llm.stream("User: Who are you?\nAssistant:"))
# a plain Llama gives one vector for each token, MobileLLM one for each text
assert len(LlamaCppEmbeddings(**model).embed_documents(["a", "b"])) >= 2
pooled = LlamaCppEmbeddings(client=MobileLLM(sys.argv[1], embedding=True, n_threads=1))
vectors = pooled.embed_documents(["a", "b"])
assert len(vectors) == 2 and vectors[0] != vectors[1]
assert len(examples.run("langchain_community", sys.argv[1])["vectors"]) == 2
