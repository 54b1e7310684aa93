"""Fuzzing of the converter and of what loads GGUF files: `make fuzz`.

Each case is a sound input that was spoiled in a few places. It must end in a valid result or in
one of our errors, with one sentence: no crash, nothing that takes longer than 10 seconds or more
than 2 GB, no file but the output. A run is repeated by its seed, a case by its name:

    python tests/fuzz --case gguf:SEED:NUMBER
"""

from __future__ import annotations

import argparse
import json
import os
import random
import select
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fuzz.cases import KINDS, Case, draw_case, write_case
from fuzz.seeds import make_seeds

HERE = Path(__file__).resolve().parent
FAILED = HERE / "failed.jsonl"
BATCH = 500  # cases for one process
TICK, TICKS = 0.5, 20  # a hang: so many waits without an answer, however long the machine slept
SHARE = 0.5  # of the cases gets past the header at least

WORKER = [sys.executable, str(HERE / "worker.py")]
# what upstream leaves behind when a load fails is not our concern
SANITIZERS = "detect_leaks=0:allocator_may_return_null=1:max_allocation_size_mb=2048"
ENVIRONMENT = {
    "PYTHONDONTWRITEBYTECODE": "1",
    "PYTHONWARNINGS": "error::RuntimeWarning",  # a line on a terminal that nobody understands
    "ASAN_OPTIONS": f"{SANITIZERS}:hard_rss_limit_mb=2048",
    "UBSAN_OPTIONS": "print_stacktrace=1",
}

OURS = ("/mobilellm_cpp/native/", "/kernels/", "/tests/native/")  # in what UBSan complains about


class Died(Exception):
    """How a process ended instead of answering."""


class Subject:
    """A process that answers lines with lines. It is started when asked, and again after BATCH
    questions or its death."""

    def __init__(self, command: list[str], folder: Path) -> None:
        self.command = command
        self.errors = folder / "stderr"
        self.asked = 0
        self.process: subprocess.Popen[bytes] | None = None
        self.complaints: list[str] = []  # of UBSan about our own sources

    def ask(self, question: str) -> str:
        """The answer. Raises Died."""
        if self.asked == BATCH:
            self.close()
        if self.process is None:
            self.asked = 0
            with open(self.errors, "wb") as errors:
                self.process = subprocess.Popen(
                    self.command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    env=os.environ | ENVIRONMENT,
                )
        self.asked += 1
        assert self.process.stdin and self.process.stdout
        try:
            self.process.stdin.write(question.encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass
        answer = b""
        for _ in range(TICKS + 40 * (self.asked == 1)):  # the first one waits for imports
            if select.select([self.process.stdout], [], [], TICK)[0]:
                piece = os.read(self.process.stdout.fileno(), 1 << 16)
                answer += piece
                if not piece or answer.endswith(b"\n"):
                    break
        if answer.endswith(b"\n"):
            return answer.decode()
        hung = self.process.poll() is None and not self.process.stdout.closed and answer == b""
        try:
            status = self.process.wait(1)
            hung = False
        except subprocess.TimeoutExpired:
            status = 0
        self.close(kill=True)
        said = self.errors.read_text(errors="replace").strip()[-1500:]
        raise Died(f"no answer in {TICK * TICKS:g} s" if hung else f"exit {status}: {said}")

    def close(self, kill: bool = False) -> None:
        if self.process is not None:
            if kill:
                self.process.kill()
            self.process.communicate()
            for line in self.errors.read_text(errors="replace").splitlines():
                if ": runtime error: " in line and any(folder in line for folder in OURS):
                    self.complaints.append(line)
        self.process = None


@dataclass
class Tally:
    """What came of the cases of one kind."""

    cases: int = 0
    passed: int = 0
    valid: int = 0
    sanitized: int = 0
    memory: int = 0
    slowest: float = 0.0
    failures: list[tuple[str, Case, str]] = field(default_factory=list)

    def words(self) -> str:
        share = self.passed / max(1, self.cases)
        return (
            f"{self.cases} cases, {share:.0%} past the header, {self.valid} valid, "
            f"{self.cases - self.valid - len(self.failures)} refused, "
            f"{len(self.failures)} failed; {self.sanitized} also under sanitizers; "
            f"at most {self.memory >> 20} MiB and {self.slowest:.2f} s of CPU"
        )


class Fuzzer:
    """Runs cases in processes of their own; as a context manager it keeps its files in `folder`.

    `program` is tests/native/use_file built under sanitizers; GGUF files go through it, too.
    """

    def __init__(self, folder: Path, program: str | None = None) -> None:
        self.folder = folder
        self.seeds = folder / "seeds"
        make_seeds(self.seeds)
        self.worker = Subject([*WORKER, str(self.seeds), str(folder)], folder)
        own = folder / "sanitized"
        own.mkdir()
        self.sanitized = Subject([program], own) if program else None

    def __enter__(self) -> Fuzzer:
        return self

    def __exit__(self, *error: object) -> None:
        self.worker.close()
        if self.sanitized:
            self.sanitized.close()

    def run(self, case: Case) -> dict[str, Any]:
        """The worker's answer; `failure` is set also when a process died or hung."""
        try:
            answer: dict[str, Any] = json.loads(self.worker.ask(json.dumps(case)))
        except Died as death:
            subprocess.run(["rm", "-rf", str(self.folder / "work")], check=True)
            answer = {"passed": False, "refusal": None, "memory": 0, "seconds": 0.0}
            answer["failure"] = str(death)
        if self.sanitized and case["kind"] == "gguf":
            path = self.sanitized.errors.parent / "model.gguf"
            write_case(case, self.seeds, path)
            try:
                self.sanitized.ask(str(path))
            except Died as death:
                answer["failure"] = f"under sanitizers: {death}"
        return answer

    def run_all(self, cases: Iterable[tuple[str, Case]]) -> Tally:
        tally = Tally()
        for name, case in cases:
            answer = self.run(case)
            tally.cases += 1
            tally.passed += answer["passed"]
            tally.valid += answer["refusal"] is None and "failure" not in answer
            tally.sanitized += self.sanitized is not None and case["kind"] == "gguf"
            tally.memory = max(tally.memory, answer["memory"])
            tally.slowest = max(tally.slowest, answer["seconds"])
            if "failure" in answer:
                tally.failures.append((name, case, answer["failure"]))
        return tally

    def smallest(self, case: Case) -> Case:
        """The case with as few of its edits as still fail."""
        edits = list(case["edits"])
        for edit in list(edits):
            fewer = [e for e in edits if e is not edit]
            if fewer and "failure" in self.run({**case, "edits": fewer}):
                edits = fewer
        return {**case, "edits": edits}


def drawn(kind: str, seed: int, numbers: Iterable[int], seeds: Path) -> Iterator[tuple[str, Case]]:
    for number in numbers:
        yield f"{kind}:{seed}:{number}", draw_case(kind, seed, number, seeds)


def kept() -> list[tuple[str, Case]]:
    """The cases that once failed."""
    lines = FAILED.read_text().splitlines()
    return [(f"failed.jsonl:{i}", json.loads(line)) for i, line in enumerate(lines, start=1)]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--kind", choices=KINDS, help="only this kind")
    parser.add_argument("--cases", type=int, default=200, help="how many of each kind")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    parser.add_argument("--case", metavar="KIND:SEED:NUMBER", help="repeat one case and show it")
    parser.add_argument("--sanitized", metavar="PROGRAM", help="use_file of `make sanitize`")
    options = parser.parse_args()
    failed = False
    with tempfile.TemporaryDirectory() as folder, Fuzzer(Path(folder), options.sanitized) as fuzzer:
        if options.case:
            kind, seed, number = options.case.split(":")
            case = draw_case(kind, int(seed), int(number), fuzzer.seeds)
            print(json.dumps(case))
            print(json.dumps(fuzzer.run(case), indent=2))
            return 0
        print(f"seed {options.seed}", flush=True)
        for kind in [options.kind] if options.kind else KINDS:
            cases = drawn(kind, options.seed, range(options.cases), fuzzer.seeds)
            tally = fuzzer.run_all(cases)
            print(f"{kind}: {tally.words()}", flush=True)
            for name, case, failure in tally.failures:
                print(f"\n{name}: {failure}\n{json.dumps(fuzzer.smallest(case))}", flush=True)
            too_shallow = tally.passed < SHARE * tally.cases
            if too_shallow:
                print(f"{kind}: fewer than {SHARE:.0%} got past the header")
            failed = failed or too_shallow or bool(tally.failures)
    complaints = fuzzer.sanitized.complaints if fuzzer.sanitized else []
    print(*complaints, sep="\n", end="\n" if complaints else "")
    return 1 if failed or complaints else 0
