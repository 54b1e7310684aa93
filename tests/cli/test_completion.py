"""Completion of commands, options and models, in the shells themselves."""

import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pexpect
import pytest

FOLDER = sysconfig.get_path("scripts")


def script(shell):
    """The script that --show-completion prints, where it cannot see the shell."""
    environment = {**os.environ, "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    command = [Path(FOLDER) / "mobilellm", "--show-completion", shell]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def shell(request, tmp_path, monkeypatch):
    if not shutil.which(request.param):
        pytest.skip(f"{request.param} is not installed")
    monkeypatch.setenv("PATH", f"{FOLDER}:{os.environ['PATH']}")
    monkeypatch.setenv("MOBILELLM_CACHE", str(tmp_path))
    for name in ("MobileLLM-125M", "MobileLLM-R1"):  # as converted
        (tmp_path / f"{name}-q4_0-0.gguf").write_bytes(b"")
        about = f'{{"source": "facebook/{name}", "code": ""}}'
        (tmp_path / f"{name}-q4_0-0.whole").write_text(f"0 0 0\n{about}\n")
    (tmp_path / "completion").write_text(script(request.param))
    return request.param, tmp_path / "completion"


@pytest.mark.parametrize("shell", ["bash", "fish"], indirect=True)
def test_completions(shell):
    name, path = shell

    def completed(line):
        words = line.split(" ")
        if name == "fish":
            command = f"source {path}; complete -C '{line}'"
        else:
            command = f"source {path}; COMP_WORDS=({line}); COMP_CWORD={len(words) - 1}; "
            command += "_mobilellm_completion mobilellm; printf '%s\\n' \"${COMPREPLY[@]}\""
        done = subprocess.run([name, "-c", command], capture_output=True, text=True)
        assert done.returncode == 0 and done.stderr == "", done.stderr
        return [line.split("\t")[0] for line in done.stdout.split("\n") if line]

    assert completed("mobilellm gen") == ["generate"]
    assert {"--temperature", "--top-k", "--json-schema"} <= set(completed("mobilellm generate --"))
    assert completed("mobilellm models pr") == ["prune"]
    assert completed("mobilellm chat fac") == ["facebook/MobileLLM-125M", "facebook/MobileLLM-R1"]
    assert completed("mobilellm chat facebook/MobileLLM-R") == ["facebook/MobileLLM-R1"]


@pytest.mark.parametrize("shell", ["zsh"], indirect=True)
def test_zsh_completes_what_is_typed(shell):
    _, path = shell
    child = pexpect.spawn("zsh", ["-f"], encoding="utf-8", timeout=60, dimensions=(50, 120))
    try:
        child.sendline(f"autoload -U compinit; compinit -u -D; source {path}; echo rea''dy")
        child.expect("ready")
        child.send("mobilellm gener\t")
        child.expect("mobilellm generate")
        child.send("--temper\t")
        child.expect("--temperature")
    finally:
        child.close(force=True)
