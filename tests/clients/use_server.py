"""python -m llama_cpp.server, asked by the openai package."""

import sys

import openai
from pydantic import BaseModel
from serving import server


class Answer(BaseModel):
    yes: bool


messages = [{"role": "user", "content": "Who are you?"}]
with server(sys.argv[1], "--embedding", "true") as address:
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none")
    ask = {"model": "m", "messages": messages, "max_tokens": 40, "temperature": 0, "stop": ["\n"]}
    said = client.chat.completions.create(**ask).choices[0].message.content
    assert "Pip" in said, said
    pieces = client.chat.completions.create(**ask, stream=True)
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == said
    text = client.completions.create(model="m", prompt="User: Hello\nAssistant:", max_tokens=8)
    assert text.choices[0].text and text.usage.completion_tokens <= 8
    vector = client.embeddings.create(model="m", input="hello").data[0].embedding
    assert len(vector) > 0
    # this server knows a schema as json_object only
    schema = {"type": "json_object", "schema": Answer.model_json_schema()}
    parsed = client.chat.completions.parse(
        model="m",
        messages=messages,
        response_format=Answer,
        extra_body={"response_format": schema},
        max_tokens=100,
    )
    assert isinstance(parsed.choices[0].message.parsed, Answer)
