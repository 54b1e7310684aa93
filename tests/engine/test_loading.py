"""What loading leaves out of llama.cpp's own, and the memory it takes."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoints import make_checkpoint
from gguf import GGUFReader

from mobilellm_cpp import convert_checkpoint


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    """19 MB of weights."""
    folder = tmp_path_factory.mktemp("loading")
    sizes = {"layers": 5, "hidden": 576, "heads": 9, "kv_heads": 3, "ffn": 1536, "dtype": "f16"}
    convert_checkpoint(make_checkpoint(folder / "c", **sizes), folder / "m.gguf", type="q8_0")
    return folder / "m.gguf"


def loaded(path: Path, script: str = "", **env: str) -> subprocess.CompletedProcess:
    head = "import json, sys\nfrom mobilellm_cpp import MobileLLM\nfrom pathlib import Path\n"
    kept = {key: value for key, value in os.environ.items() if key != "MOBILELLM_KERNELS"}
    done = subprocess.run(
        [sys.executable, "-c", head + (script or SHOW), str(path)],
        env={**kept, **env}, capture_output=True, text=True, cwd="/",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done


SHOW = "MobileLLM(sys.argv[1], n_threads=1, n_ctx=64, verbose=True)"


def test_the_log_shows_the_beginning_of_long_arrays(path):
    """As llama.cpp does, which first writes out the whole."""
    log = loaded(path).stderr
    reader = GGUFReader(path)
    n = len(reader.fields["tokenizer.ggml.tokens"].data)
    assert n > 40
    for name, text in {
        "tokens": lambda x: json.dumps(bytes(x).decode(), ensure_ascii=False),
        "scores": lambda x: f"{x[0]:.6f}",
        "token_type": lambda x: str(x[0]),
    }.items():
        field = reader.fields[f"tokenizer.ggml.{name}"]
        whole = "[" + ", ".join(text(field.parts[i]) for i in field.data) + "]"
        shown = re.search(rf"tokenizer\.ggml\.{name} arr\[\w+,{n}\] += (.*)", log)[1]
        assert shown == whole.encode()[:37].decode() + "..."


def test_special_tokens_known_by_text_have_brackets(llama_cpp_source):
    """All others are passed over in the loops that look for them (mobilellm_plain_word)."""
    source = (llama_cpp_source / "src" / "llama-vocab.cpp").read_text()
    start = source.index("// auto-detect special tokens by text")
    end = source.index("quick hack for gpt-oss")
    texts = re.findall(r't\.first == "([^"]+)"', source[start:end])
    assert len(texts) > 50
    assert all(re.search(r"[<\[]", text) for text in texts)


PEAK = """
def resident(key):
    status = Path("/proc/self/status").read_text()
    return int(status.partition(key + ":")[2].split()[0]) * 1024
from mobilellm_cpp.engine.library import llama_cpp
llama_cpp.llama_backend_init()
params = llama_cpp.llama_model_default_params()
before = resident("VmRSS")
llama_cpp.llama_model_load_from_file(sys.argv[1].encode(), params)
print(resident("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_file_and_packed_weights_are_not_in_memory_both(path):
    size = path.stat().st_size
    assert int(loaded(path, PEAK).stdout) < 1.5 * size


AHEAD = """
import json, sys
from mobilellm_cpp.engine import ahead
path, options = sys.argv[1], json.loads(sys.argv[2])
ahead.begin(path)
if begun := ahead._begun:
    begun.join()
    print(begun.model is not None)
from mobilellm_cpp import MobileLLM
llm = MobileLLM(path, n_threads=1, n_ctx=64, **options)
print(begun is not None and begun.model == llm._model.model)
print(ascii("".join(llm.stream("a", max_tokens=8, temperature=0))))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only there")
def test_a_file_that_was_loaded_ahead_is_not_loaded_again(path):
    def run(code: str, options: dict) -> subprocess.CompletedProcess:
        command = [sys.executable, "-c", code, str(path), json.dumps(options)]
        return subprocess.run(command, capture_output=True, text=True, cwd="/")

    first = run(AHEAD, {}).stdout.splitlines()
    other = run(AHEAD, {"use_mmap": False}).stdout.splitlines()  # not what was loaded
    plain = run(AHEAD.replace("ahead.begin(path)", ""), {}).stdout.splitlines()
    assert first == ["True", "True", *plain[1:]]
    assert other == ["True", "False", *plain[1:]]
    assert len(plain[1]) > 4

    path.with_name("bad.gguf").write_bytes(path.read_bytes()[:-100])
    bad = AHEAD.replace("sys.argv[1]", "sys.argv[1].replace('m.gguf', 'bad.gguf')")
    done = run(bad, {})
    assert "False" in done.stdout and "is cut short: 100 of" in done.stderr.splitlines()[-1]
