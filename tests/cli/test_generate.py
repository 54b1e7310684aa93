"""`mobilellm generate` as scripts use it."""

import json
import os
import random
import re
import signal
import subprocess
import sysconfig
from pathlib import Path

import jsonschema
import openai
import pytest

from mobilellm_cpp.engine.arguments import _SAMPLING
from mobilellm_cpp.engine.sampling import Sampler
from mobilellm_cpp.engine.sampling_types import SETTINGS, Sampling

MOBILELLM = str(Path(sysconfig.get_path("scripts")) / "mobilellm")
SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["Marta", "Pip"]}, "age": {"type": "integer", "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
GBNF = 'root ::= ("yes" | "no") "!"\n'


def generate(model, *arguments, stdin="", code=0, **keywords):
    done = subprocess.run(
        [MOBILELLM, "generate", str(model), *map(str, arguments)],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=120,
        **keywords,
    )
    assert done.returncode == code, done.stderr
    return done.stdout if code == 0 else done.stderr


def test_the_text_is_an_argument_a_file_or_stdin(model, llm, tmp_path):
    file = tmp_path / "prompt.txt"
    file.write_text("Once upon a time\n")
    options = ("-n", 20, "--seed", 5, "-t", 1)
    text = "".join(llm.stream("Once upon a time", max_tokens=20, seed=5)) + "\n"
    assert generate(model, "-p", "Once upon a time", *options) == text
    assert generate(model, "-f", file, *options) == text
    assert generate(model, *options, stdin="Once upon a time\n") == text
    assert generate(model, "-f", "-", *options, stdin="Once upon a time\r\n") == text


def test_a_prompt_is_kept_on_disk(model, tmp_path, monkeypatch):
    monkeypatch.setenv("MOBILELLM_CACHE", str(tmp_path))
    options = ("-p", "the quick brown fox " * 40, "-n", 8, "--seed", 1)
    made = [generate(model, *options, "--prompt-cache") for _ in range(2)]
    assert made == [generate(model, *options)] * 2
    assert len(list((tmp_path / "prompts").glob("*.prompt"))) == 1


def test_the_seed_makes_the_text_whatever_the_threads(model):
    options = ("-p", "Marta", "-n", 60, "--temperature", 1.5, "--top-k", 0)
    made = {generate(model, *options, "--seed", 9, "-t", t) for t in (1, 2)}
    assert len(made) == 1
    assert generate(model, *options, "--seed", 10) not in made
    done = subprocess.run([MOBILELLM, "generate", model, *map(str, options)], capture_output=True)
    seed = re.search(rb"; seed (\d+)\n", done.stderr)[1]
    assert generate(model, *options, "--seed", seed.decode()).encode() == done.stdout


def test_every_setting_of_sampling_is_an_option(model, llm):
    """Options, checks, types and the sampler's own defaults say the same."""
    draw = random.Random(0)
    help = subprocess.run([MOBILELLM, "generate", "-h"], capture_output=True, text=True).stdout
    for name in Sampling.__annotations__:
        if name in ("max_tokens", "response_format", "logprobs"):
            continue  # -n, --json-schema, and with --json
        assert re.search(f"--{name.replace('_', '-')}[ ,]", help)
        assert name in _SAMPLING or name not in SETTINGS
    defaults = Sampler.__init__.__kwdefaults__
    for name, setting in SETTINGS.items():
        name = "temp" if name == "temperature" else name
        no_sampler = name in ("max_tokens", "seed", "speculative")
        assert no_sampler or defaults[name] == setting.default
    options, sampling = [], {}
    for name, setting in SETTINGS.items():
        if name != "max_tokens":
            most = min(setting.most, 2.0 if setting.kind is float else 90)
            value = setting.kind(draw.uniform(setting.least, most))
            sampling[name] = value
            options += [f"--{name.replace('_', '-')}", value]
    sampling["mirostat_mode"] = 2
    sampling["logit_bias"] = {300: 4.0, 301: -2.5}
    sampling["stop"] = ["xyz", "\n\n"]
    options += ["--mirostat-mode", 2, "--logit-bias", "300=4", "--logit-bias", "301=-2.5"]
    options += ["--stop", "xyz", "--stop", "\n\n"]
    text = "".join(llm.stream("Pip", max_tokens=25, **sampling))
    assert generate(model, "-p", "Pip", "-n", 25, "-t", 1, *options) == text + "\n"


def test_forms(model, tmp_path):
    (tmp_path / "schema.json").write_text(json.dumps(SCHEMA))
    (tmp_path / "yes.gbnf").write_text(GBNF)
    options = ("-p", "The answer:", "-n", 200, "--temperature", 1.5)
    for given in (json.dumps(SCHEMA), tmp_path / "schema.json"):
        answer = json.loads(generate(model, *options, "--json-schema", given))
        jsonschema.validate(answer, SCHEMA)
    assert re.fullmatch("[0-9]{3}-x\n", generate(model, *options, "--regex", "[0-9]{3}-x"))
    for given in (GBNF, tmp_path / "yes.gbnf"):
        assert generate(model, *options, "--grammar", given) in ("yes!\n", "no!\n")
    assert generate(model, *options, "--lark", 'start: "a" | "b"') in ("a\n", "b\n")


def test_json_is_openais(model, llm):
    options = ("-p", "Who are you?", "-n", 12, "--json", "--logprobs", 3, "--seed", 2, "--n", 3)
    said = json.loads(generate(model, *options, "-t", 1))
    completion = openai.types.Completion.model_validate(said)
    assert [choice.index for choice in completion.choices] == [0, 1, 2]
    for choice in completion.choices:
        alone = llm.stream("Who are you?", max_tokens=12, seed=2 + choice.index)
        assert choice.text == "".join(alone)
        assert choice.finish_reason == alone.finish_reason
        found = choice.logprobs
        assert "".join(found.tokens) == choice.text
        assert all(len(best) == 3 and max(best.values()) <= 0 for best in found.top_logprobs)
        for at, token in zip(found.text_offset, found.tokens, strict=True):
            assert choice.text[at:].startswith(token)
    assert completion.usage.completion_tokens == sum(
        len(c.logprobs.tokens) for c in completion.choices
    )
    said = json.loads(generate(model, *options, "--system", "Be brief.", "-t", 1))
    chat = openai.types.chat.ChatCompletion.model_validate(said)
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Who are you?"},
    ]
    answer = llm.chat(messages, max_tokens=12, seed=2)
    assert chat.choices[0].message.content == answer
    assert len(chat.choices[0].logprobs.content) == answer.usage["completion_tokens"]


def test_a_reader_that_goes_away_is_no_error(model):
    command = f"'{MOBILELLM}' generate '{model}' -p a -n 900 --regex '[a-z]{{4000,}}' | head -c 5"
    done = subprocess.run(
        ["bash", "-c", f"{command}; echo; echo ${{PIPESTATUS[0]}}"], capture_output=True, text=True
    )
    assert re.fullmatch("[a-z]{5}\n0\n", done.stdout) and done.stderr == ""


def test_ctrl_c_is_no_traceback(model):
    process = subprocess.Popen(
        [MOBILELLM, "generate", str(model), "-p", "a", "-n", "100000", "--ctx", "100000"]
        + ["--regex", "[a-z]{100000,}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        assert os.read(process.stdout.fileno(), 1)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
    finally:
        process.kill()
    assert (process.returncode, error) == (130, b"")


@pytest.mark.parametrize("closed", ["<&- >&-", "<&- >&- 2>&-"])
def test_closed_streams_are_no_tracebacks(model, closed):
    command = f"'{MOBILELLM}' generate '{model}' -p Marta -n 5 --seed 1 {closed}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.returncode == 0 and "Traceback" not in done.stderr


def test_wrong_usage(model, tmp_path):
    assert "with -p or with -f" in generate(model, "-p", "a", "-f", "b", code=2)
    assert "need --json" in generate(model, "-p", "a", "--logprobs", 2, code=2)
    assert "only one form" in generate(model, "-p", "a", "--regex", "a", "--lark", "b", code=2)
    assert "TOKEN=NUMBER" in generate(model, "-p", "a", "--logit-bias", "hello", code=2)
    assert "--top-p" in generate(model, "-p", "a", "--top-p", "7", code=2)
    for wrong in (
        ("-f", "none.txt"),
        ("-p", "a", "--json-schema", "none.json"),
        ("-p", "a", "--grammar", "root ::= ("),
        ("-p", "a", "--logit-bias", "99999999=1"),
        ("-p", ""),
    ):
        said = generate(model, *wrong, code=0 if wrong == ("-p", "") else 1, cwd=tmp_path)
        if wrong != ("-p", ""):
            assert said.count("\n") == 1 and said.startswith("mobilellm: ")
