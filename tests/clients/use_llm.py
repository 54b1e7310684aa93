"""Simon Willison's llm with its plug-ins for GGUF files."""

import os
import subprocess
import sys
import tempfile

bin = os.path.dirname(sys.executable)
with tempfile.TemporaryDirectory() as folder:
    environment = {**os.environ, "LLM_USER_PATH": folder, "HOME": folder}

    def llm(*arguments):
        command = [os.path.join(bin, "llm"), *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert llm("--version").startswith("llm, version")
    plugins = llm("plugins")
    assert "llm-gguf" in plugins and "llm-llama-cpp" in plugins, plugins
    llm("gguf", "register-model", "pip", sys.argv[1])
    assert llm("-m", "gguf/pip", "Who are you?").strip()
    llm("llama-cpp", "add-model", sys.argv[1], "--alias", "pip2")
    assert llm("-m", "pip2", "User: Hello\nAssistant:", "-o", "max_tokens", "20").strip()
