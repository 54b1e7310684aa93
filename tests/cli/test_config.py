"""The file of defaults: what is in it counts, what is typed wins, and mistakes are named."""

import json
import subprocess
import sysconfig
from pathlib import Path

import pytest
import typer

from mobilellm_cpp import MobileLLM
from mobilellm_cpp.cli import app
from mobilellm_cpp.configuration import ConfigurationError, configuration_file, defaults

MOBILELLM = str(Path(sysconfig.get_path("scripts")) / "mobilellm")


@pytest.fixture
def config(tmp_path, monkeypatch):
    """Writes the file."""
    path = tmp_path / "config.toml"
    monkeypatch.setenv("MOBILELLM_CONFIG", str(path))
    return path.write_text


def run(*arguments, code=0):
    done = subprocess.run([MOBILELLM, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    return done.stdout if code == 0 else done.stderr


def test_defaults_count_and_what_is_typed_wins(config, model):
    config(
        f"seed = 3\n[generate]\nmodel = '{model}'\ntokens = 12\ntemperature = 1.5\n"
        f"stop = 'the'\nthreads = 1\njson = true\n[bench]\nrepeat = 2\n"
    )
    with MobileLLM(model, n_threads=1) as llm:
        (choice,) = json.loads(run("generate", "-p", "Once"))["choices"]
        text = "".join(llm.stream("Once", max_tokens=12, temperature=1.5, seed=3, stop="the"))
        assert (choice["text"], choice["seed"]) == (text, 3)
        typed = run("generate", "-p", "Once", "--temperature", "0", "-n", "5", "--stop", "xyz")
        text = "".join(llm.stream("Once", max_tokens=5, temperature=0.0, stop="xyz"))
        assert json.loads(typed)["choices"][0]["text"] == text


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("temprature = 1", "names the option temprature, .* did you mean temperature?"),
        ("[generat]\na = 1", "names the command generat, .* did you mean generate?"),
        ("[generate]\ntop_pp = 1", "generate and its option top_pp, .* did you mean top-p?"),
        ("[generate]\njson = 1", "json is true or false, not 1"),
        ("[generate]\ntokens = true", "tokens is not true"),
        ("[generate]\ntop-k = [1, 2]", "top-k is one value"),
        ("[generate]\ntop-k = {a = 1}", "top-k is one value"),
        ("[generate", "is not TOML"),
        ("a = \x00", "is not TOML"),
    ],
)
def test_mistakes_are_named(config, text, says):
    config(text)
    with pytest.raises(ConfigurationError, match=says) as error:
        defaults(typer.main.get_command(app))
    assert str(configuration_file()) in str(error.value)


def test_mistakes_are_sentences(config, model):
    config("temprature = 1")
    said = run("generate", model, "-p", "a", code=1)
    assert said.startswith("mobilellm: ") and said.count("\n") == 1
    config("[generate]\ntop_p = 7")
    said = run("generate", model, "-p", "a", code=2)
    assert "--top-p" in said and f"(defaults come from {configuration_file()})" in said


def test_there_need_not_be_a_file(tmp_path, monkeypatch):
    monkeypatch.setenv("MOBILELLM_CONFIG", str(tmp_path / "none.toml"))
    assert defaults(typer.main.get_command(app)) == {}
    monkeypatch.setenv("MOBILELLM_CONFIG", str(tmp_path))
    with pytest.raises(ConfigurationError, match="directory"):
        defaults(typer.main.get_command(app))
    monkeypatch.delenv("MOBILELLM_CONFIG")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert configuration_file() == tmp_path / "mobilellm-cpp" / "config.toml"
