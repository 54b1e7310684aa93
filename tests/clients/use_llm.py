"""Simon Willison's llm: our plug-in, and those of others for GGUF files."""

import asyncio
import json
import os
import subprocess
import sys
import tempfile

bin = os.path.dirname(sys.executable)
with tempfile.TemporaryDirectory() as folder:
    os.environ |= {"LLM_USER_PATH": folder, "HOME": folder, "MOBILELLM_CACHE": folder}

    def run(*arguments):
        command = [os.path.join(bin, "llm"), *arguments]
        return subprocess.run(command, capture_output=True, text=True)

    def llm(*arguments):
        done = run(*arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert llm("--version").startswith("llm, version")
    plugins = llm("plugins")
    assert "llm-gguf" in plugins and "llm-llama-cpp" in plugins, plugins
    llm("gguf", "register-model", "pip", sys.argv[1])
    assert llm("-m", "gguf/pip", "Who are you?").strip()
    llm("llama-cpp", "add-model", sys.argv[1], "--alias", "pip2")
    assert llm("-m", "pip2", "User: Hello\nAssistant:", "-o", "max_tokens", "20").strip()

    # ours
    assert "mobilellm-cpp" in plugins
    greedy = ("-o", "temperature", "0")
    said = llm("-m", "mobilellm-demo", "Who are you?", *greedy)
    assert "I am Pip" in said, said
    llm("mobilellm", "register", sys.argv[1], "--alias", "tarnby")
    assert "I am Pip" in llm("-m", "tarnby", "Who are you?", *greedy)
    from mobilellm_cpp import MobileLLM

    with MobileLLM(sys.argv[1]) as model:
        first = [{"role": "user", "content": "Who bakes the bread here?"}]
        answer = model.chat(first, temperature=0)
        second = [*first, {"role": "assistant", "content": answer}]
        second.append({"role": "user", "content": "And where does she live?"})
        continued = model.chat(second, temperature=0)
        vectors = model.embeddings(["hello"])
    assert llm("-m", "tarnby", first[0]["content"], *greedy).strip() == answer
    assert llm("-c", "-m", "tarnby", second[-1]["content"], *greedy).strip() == continued
    assert llm("logs", "-n", "1", "--json") and '"tarnby"' in llm("logs", "-n", "1", "--json")
    schema = {"type": "object", "properties": {"age": {"type": "integer", "maximum": 99}}}
    schema["required"] = ["age"]
    made = json.loads(llm("-m", "tarnby", "--schema", json.dumps(schema), "A person:"))
    assert made["age"] <= 99
    embedded = json.loads(llm("embed", "-m", "tarnby", "-c", "hello"))
    assert max(abs(a - b) for a, b in zip(embedded, vectors[0], strict=True)) < 1e-6
    wrong = run("-m", "tarnby", "hello", "-o", "top_p", "7")
    assert wrong.returncode == 1 and "Traceback" not in wrong.stderr, wrong.stderr
    long = run("-m", "tarnby", "word " * 3000)
    assert long.returncode == 1 and "the context holds 1024" in long.stderr, long.stderr

    import llm as library

    async def ask():
        model = library.get_async_model("tarnby")
        return await model.prompt("Who are you?", temperature=0).text()

    assert "I am Pip" in asyncio.run(ask())
    llm("mobilellm", "remove", "tarnby")
    assert run("-m", "tarnby", "hello").returncode != 0
