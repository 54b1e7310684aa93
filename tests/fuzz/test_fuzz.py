"""A slice of `make fuzz`, the inputs that once failed, and whether a failure would be seen."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fuzz import run, worker
from fuzz.cases import KINDS, draw_case

from mobilellm_cpp import CheckpointError, ModelError


@pytest.fixture(scope="module")
def fuzzer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[run.Fuzzer]:
    program = os.environ.get("MOBILELLM_USE_FILE")  # set by `make sanitize`
    with run.Fuzzer(tmp_path_factory.mktemp("fuzz"), program) as fuzzer:
        yield fuzzer
    assert not (fuzzer.sanitized and fuzzer.sanitized.complaints)


@pytest.mark.parametrize(
    ("kind", "cases"),
    [
        ("checkpoint", 200),
        ("adapter", 100),
        ("gguf", 200),
        ("verify", 100),
        ("lora", 100),
        ("state", 100),
    ],
)
def test_slice(kind: str, cases: int, fuzzer: run.Fuzzer) -> None:
    tally = fuzzer.run_all(run.drawn(kind, 0, range(cases), fuzzer.seeds))
    assert not tally.failures
    assert tally.passed >= run.SHARE * tally.cases
    # the cases are neither all harmless nor all hopeless
    assert 0.05 * cases < tally.valid < 0.9 * cases


@pytest.mark.parametrize(("name", "case"), run.kept())
def test_once_failed(name: str, case: dict[str, Any], fuzzer: run.Fuzzer) -> None:
    assert fuzzer.run(case).get("failure") is None


@pytest.mark.parametrize("kind", KINDS)
def test_cases_are_repeatable(kind: str, fuzzer: run.Fuzzer) -> None:
    cases = [draw_case(kind, 3, number, fuzzer.seeds) for number in range(20)]
    again = [draw_case(kind, 3, number, fuzzer.seeds) for number in range(20)]
    assert json.dumps(cases) == json.dumps(again)
    assert len({json.dumps(case) for case in cases}) == 20
    for case in cases:
        folders = [fuzzer.folder / f"again-{i}" for i in range(2)]
        for folder, copy in zip(folders, (case, json.loads(json.dumps(case))), strict=True):
            worker.write_case(copy, fuzzer.seeds, folder)
        subprocess.run(["diff", "-r", "--no-dereference", *folders], check=True)
        subprocess.run(["rm", "-r", *folders], check=True)


def broken_with(error: BaseException) -> Any:
    def runner(case: Any, source: Path, out: Path) -> tuple[bool, None]:
        raise error

    return runner


def careless(act: Any) -> Any:
    def runner(case: Any, source: Path, out: Path) -> tuple[bool, None]:
        act(source, out)
        return True, None

    return runner


FAULTS = {
    "another class": (broken_with(ValueError("x")), "ValueError"),
    "out of memory": (broken_with(MemoryError()), "MemoryError"),
    "exits": (broken_with(SystemExit(0)), "SystemExit"),
    "refused late": (broken_with(ModelError("x")), "refused by the engine"),
    "writes beside": (
        careless(lambda source, out: (out.parent.parent / "x").write_text("")),
        "did open",
    ),
    "leaves a file": (
        careless(lambda source, out: tempfile.mkstemp()),
        "left tmp/",
    ),
    "renames": (careless(lambda source, out: source.rename(out)), "did os.rename"),
    "follows a link": (
        careless(lambda source, out: (source.parent / "outside").write_text("x")),
        "link points to",
    ),
    "runs a program": (careless(lambda source, out: os.system("true")), "did os.system"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_seen(
    fault: str, fuzzer: run.Fuzzer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner, expected = FAULTS[fault]
    answer = carried_out(runner, fuzzer, tmp_path, monkeypatch)
    assert expected in answer["failure"]


def carried_out(
    runner: Any, fuzzer: run.Fuzzer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> dict[str, Any]:
    """The worker's answer about a case that is run by `runner`."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "work" / "tmp"))
    case = draw_case("gguf", 0, 0, fuzzer.seeds)
    watch = worker.Watch()
    before = os.getcwd()
    try:
        return worker.carry_out(runner, case, fuzzer.seeds, tmp_path / "work", watch)
    finally:
        os.chdir(before)


@pytest.mark.parametrize(
    ("harmless", "edits", "expected"),
    [
        (False, [], "a wrong file passes"),
        (True, [["set", "llama.rope.freq_base", 6, 5.0]], "a right file does not pass"),
    ],
)
def test_a_verification_that_errs_is_seen(
    harmless: bool, edits: list[Any], expected: str, fuzzer: run.Fuzzer
) -> None:
    case = {"kind": "verify", "input": "llama-f32", "edits": edits, "harmless": harmless}
    assert expected in fuzzer.run(case)["failure"]
    assert "failure" not in fuzzer.run({**case, "harmless": not harmless})


def test_memory_is_seen(
    fuzzer: run.Fuzzer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "MEMORY", 1 << 20)
    answer = carried_out(careless(lambda source, out: None), fuzzer, tmp_path, monkeypatch)
    assert "MiB of memory" in answer["failure"]


@pytest.mark.parametrize("message", ["", " ", "std::bad_alloc", "failed to allocate 3 GB"])
def test_what_is_no_sentence(message: str) -> None:
    with pytest.raises(worker.Failure):
        worker.check_sentence(CheckpointError(message))


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        ("import os; os.abort()", "exit -6"),
        ("import sys; sys.exit('farewell')", "exit 1: farewell"),
        ("input(); import time; time.sleep(60)", "no answer"),
        ("input(); print(1, flush=True); input(); import os; os.kill(os.getpid(), 9)", "exit -9"),
    ],
)
def test_deaths_are_seen(
    program: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "TICK", 0.02)
    subject = run.Subject([sys.executable, "-c", program], tmp_path)
    with pytest.raises(run.Died, match=expected):
        for _ in range(2):
            subject.ask("x")


def test_undefined_behaviour_of_ours_is_seen(tmp_path: Path) -> None:
    """Upstream's is not ours to mend."""
    lines = [f"/x/{folder}/a.cpp:1:2: runtime error: y" for folder in ("kernels", "llama.cpp/src")]
    program = (
        f"import sys; input(); print(1, flush=True); sys.stderr.write({chr(10).join(lines)!r})"
    )
    subject = run.Subject([sys.executable, "-c", program], tmp_path)
    subject.ask("x")
    subject.close()
    assert subject.complaints == lines[:1]
