"""Prompts in a folder: the same answers without computing again, whatever happens to the files."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from checkpoints import make_pro

from mobilellm_cpp import MobileLLM, ModelError, convert_checkpoint
from mobilellm_cpp.cache import DEMO

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "and", "bread"]


def text(seed, n=60):
    return " ".join(random.Random(seed).choices(WORDS, k=n))


SYSTEM = text(0, 90)

# Answers prompts over a folder in a process of its own: what was found of each, and what was said.
ASK = """
import json, sys
from mobilellm_cpp import MobileLLM
path, folder, prompts = json.loads(sys.argv[1])
with MobileLLM(path, n_ctx=1024, n_threads=1) as llm:
    if folder:
        llm.use_prompt_cache(folder)
    for prompt in prompts:
        stream = llm.stream(prompt, max_tokens=8, temperature=1.0, seed=1, logprobs=0)
        said = "".join(stream)
        print(json.dumps([stream._n_found, said, [each.logprob for each in stream.logprobs]]))
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "q8_0.gguf"
    convert_checkpoint(DEMO, path, type="q8_0")
    return path


def ask(model, folder, *prompts, **setting):
    command = [sys.executable, "-c", ASK, json.dumps([str(model), folder and str(folder), prompts])]
    env = {**os.environ, **setting}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def without(model, *prompts, **setting):
    return [ask(model, None, prompt, **setting)[0][1:] for prompt in prompts]


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "ordinary"])
def test_another_process_goes_on_where_one_was(model, tmp_path, fused):
    setting = {} if fused else {"MOBILELLM_KERNELS": "pack"}
    begin = SYSTEM if fused else text(0, 420)  # the ordinary graph takes whole pieces over
    prompts = [begin + text(1, 20), begin + text(2, 30), text(3)]
    first = ask(model, tmp_path, prompts[0], **setting)
    assert len(list(tmp_path.glob("*.prompt"))) == 1 and first[0][0] == 0
    second = ask(model, tmp_path, *prompts, **setting)
    assert [each[1:] for each in second] == without(model, *prompts, **setting)  # to the bit
    with MobileLLM(model) as llm:
        n = len(llm.tokenize(begin.encode()))
    for found, *_ in second[:2]:
        assert found >= n - 14 if fused else found == 512
    assert second[2][0] <= 1


def test_damaged_files_are_of_no_harm(model, tmp_path):
    prompt = SYSTEM + text(4)
    (clean,) = ask(model, tmp_path, prompt)
    (file,) = tmp_path.glob("*.prompt")
    data = file.read_bytes()
    draw = random.Random(0)
    spoiled = [data[: draw.randrange(len(data))] for _ in range(3)] + [b"", b"hello"]
    for _ in range(3):
        at = draw.randrange(len(data))
        spoiled.append(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    with MobileLLM(model, n_ctx=1024, n_threads=1) as llm:
        for content in spoiled:
            file.write_bytes(content)
            llm._sequences.change(lambda: None)  # nothing is in memory
            llm.use_prompt_cache(tmp_path)
            stream = llm.stream(prompt, max_tokens=8, temperature=1.0, seed=1, logprobs=0)
            assert "".join(stream) == clean[1] and stream._n_found == 0
            llm._prompts.wait()
    assert file.read_bytes() == data


def test_who_is_killed_leaves_nothing_half_written(model, tmp_path):
    prompts = [text(seed, 80) for seed in range(100, 160)]
    command = [sys.executable, "-c", ASK, json.dumps([str(model), str(tmp_path), prompts])]
    for lines in (1, 4, 9):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        for _ in range(lines):
            process.stdout.readline()
        process.send_signal(signal.SIGKILL)
        process.wait()
    files = list(tmp_path.glob("*.prompt"))
    with MobileLLM(model, n_ctx=1024, n_threads=1) as llm:
        llm.use_prompt_cache(tmp_path)
        assert files and all(llm._prompts._read(file.name) for file in files)
    found = ask(model, tmp_path, *prompts[:3])
    assert [each[1:] for each in found] == without(model, *prompts[:3])


def test_processes_at_the_same_time(model, tmp_path):
    prompts = [SYSTEM + text(seed, 10) for seed in range(4)]
    command = [sys.executable, "-c", ASK, json.dumps([str(model), str(tmp_path), prompts])]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    expected = without(model, *prompts)
    for process in running:
        said, _ = process.communicate(timeout=120)
        assert [json.loads(line)[1:] for line in said.splitlines()] == expected


def test_room_and_other_models(model, tmp_path):
    with MobileLLM(model, n_ctx=1024, n_threads=1) as llm:
        for seed in range(5):
            llm.use_prompt_cache(tmp_path, max_bytes=1)
            llm.chat([{"role": "user", "content": text(seed)}], max_tokens=1)
            llm._prompts.wait()
            (left,) = tmp_path.glob("*.prompt")  # the one that was used last
        os.utime(left, (time.time(), time.time()))
        llm.use_prompt_cache(tmp_path)
        assert [name for name, _ in llm._prompts._known()] == [left.name]
        llm.stream("short", max_tokens=1)
    with MobileLLM(model, n_ctx=1024, n_threads=1, type_k=0, flash_attn=False) as other:
        other.use_prompt_cache(tmp_path)  # its K and V are others
        assert not list(other._prompts._known())
    with MobileLLM(model) as llm, pytest.raises(ModelError, match="Not a directory"):
        llm.use_prompt_cache(Path(__file__) / "none")


def test_sliding_windows_do_without(tmp_path):
    make_pro(tmp_path / "pro", sliding=[0, 1, 1], dtype="f32")
    convert_checkpoint(tmp_path / "pro", tmp_path / "pro.gguf", type="q8_0")
    with MobileLLM(tmp_path / "pro.gguf", n_ctx=512, n_threads=1) as llm:
        llm.use_prompt_cache(tmp_path / "kept")
        prompt = list(range(3, 200))
        before = llm.batch([prompt], max_tokens=3, seed=1)
        assert before == llm.batch([prompt], max_tokens=3, seed=1)
        assert not list((tmp_path / "kept").glob("*.prompt"))


def test_completions_of_llama_cpp_take_part(model, tmp_path, caplog):
    said = []
    for _ in range(2):
        with MobileLLM(model, n_ctx=1024, n_threads=1) as llm:
            llm.use_prompt_cache(tmp_path)
            with caplog.at_level("INFO", "mobilellm_cpp"):
                made = llm.create_completion(SYSTEM, max_tokens=8, temperature=0)
            said.append(made["choices"][0]["text"])
            assert ("a prompt of" in caplog.text) == (len(said) == 2)
            llm._prompts.wait()
        assert len(list(tmp_path.glob("*.prompt"))) == 1
    assert said[0] == said[1] == without_cache(model, SYSTEM)


def without_cache(model, prompt):
    with MobileLLM(model, n_ctx=1024, n_threads=1) as llm:
        return "".join(llm.stream(prompt, max_tokens=8, temperature=0))
