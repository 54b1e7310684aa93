"""Carries out the cases that come in as JSON lines and answers each with a JSON line.

    worker.py SEEDS WORK        SEEDS is what make_seeds wrote, WORK an empty folder

What must never happen is the answer's `failure`: an error that is none of ours or no sentence, a
file written elsewhere or left behind, a conversion whose file does not load, too much memory. That
the process dies or does not answer is for the one who asked to see.
"""

from __future__ import annotations

import functools
import json
import os
import resource
import shutil
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch  # noqa: F401  # before anybody watches: its CUDA build runs ldconfig when imported

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # where `fuzz` is

from fuzz.cases import Case, write_case  # noqa: E402
from fuzz.seeds import ADAPTERS, MERGED, STATE_TOKENS, VERIFIED  # noqa: E402
from mobilellm_cpp.convert import (  # noqa: E402
    convert_adapter,
    convert_checkpoint,
    open_checkpoint,
)
from mobilellm_cpp.convert.adapter import ADAPTER_WEIGHTS, CONFIG  # noqa: E402
from mobilellm_cpp.convert.config import read_json  # noqa: E402
from mobilellm_cpp.convert.safetensors_file import read_safetensors  # noqa: E402
from mobilellm_cpp.convert.torch_file import read_torch  # noqa: E402

from mobilellm_cpp import CheckpointError, MobileLLM, MobileLLMError, ModelError  # noqa: E402
from mobilellm_cpp.engine.gguf_file import open_gguf  # noqa: E402
from mobilellm_cpp.engine.states import restore_state  # noqa: E402
from mobilellm_cpp.inspection.description import describe  # noqa: E402
from mobilellm_cpp.inspection.verification import verify  # noqa: E402

MEMORY = 2 << 30
# Audit events of Python.
STARTING = {"subprocess.Popen", "socket.connect"}
STARTING |= {f"os.{name}" for name in ("system", "exec", "fork", "posix_spawn")}
CHANGING = ("remove", "rename", "mkdir", "rmdir", "symlink", "link", "truncate")


class Failure(Exception):
    """What must not happen, in words."""


class Watch:
    """Sees through Python's audit hooks what a call does to files and processes."""

    def __init__(self) -> None:
        self.allowed: Path | None = None  # the folder that may be written to, while watching
        self.seen: list[str] = []
        sys.addaudithook(self.hook)

    def hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.allowed is None:
            return
        if event in STARTING:
            self.seen.append(f"{event} {arguments}")
        elif event.removeprefix("os.") in CHANGING or self.opens_to_write(event, arguments):
            for path in arguments[: 2 if event in ("os.rename", "os.link") else 1]:
                self.look(event, path)

    @staticmethod
    def opens_to_write(event: str, arguments: tuple[Any, ...]) -> bool:
        writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
        return event == "open" and bool(arguments[2] & writing)

    def look(self, event: str, path: Any) -> None:
        if isinstance(path, (str, bytes, os.PathLike)):
            full = os.path.realpath(os.fsdecode(path))
            if not full.startswith(f"{self.allowed}/") and full != "/dev/null":
                self.seen.append(f"{event} {full}")


def check_sentence(error: MobileLLMError) -> str:
    """The message of an error, fit to be shown to a person."""
    message = str(error)
    if not message.strip() or not message.isprintable() or len(message) > 1000:
        raise Failure(f"no sentence: {message[:2000]!r}")
    if "bad_alloc" in message or "allocate" in message:
        raise Failure(f"more memory was asked for than there is: {message}")
    return message


def use_file(path: Path) -> str | None:
    """Use a GGUF file in every way; the first refusal, None where there is none."""
    refusals = []

    def attempt(call: Callable[[], Any]) -> Any:
        try:
            return call()
        except ModelError as error:
            refusals.append(check_sentence(error))

    attempt(lambda: describe(path))
    llm = attempt(lambda: MobileLLM(path, n_ctx=64, n_threads=1))
    if llm is None:
        return refusals[-1]
    for text in ("hello", "\u00e9\t\U0001f600 <s>"):
        attempt(lambda text=text: list(llm.stream(text, max_tokens=2, temperature=0.0)))
    attempt(lambda: llm.chat([{"role": "user", "content": "hi"}], max_tokens=2, seed=1))
    attempt(lambda: llm.embeddings(["hello"]))
    attempt(lambda: llm.logits([1] * 40))
    llm.close()
    return refusals[0] if refusals else None


def is_gguf(path: Path) -> bool:
    """Whether the parser of files is content."""
    try:
        with open_gguf(path):
            return True
    except ModelError:
        return False


def check_folders(source: Path, before: list[str], out: Path, refusal: str | None) -> None:
    """The input is as it was; in the output's folder is the output, or nothing after a refusal."""
    if sorted(os.listdir(source)) != before:
        raise Failure(f"the input's folder holds {sorted(os.listdir(source))}")
    left = os.listdir(out.parent)
    if left != ([] if refusal else [out.name]):
        raise Failure(f"left in the output's folder: {left}")


def compute(path: Path, lora: Path | None = None) -> None:
    """What was converted computes numbers, or overflows."""
    with MobileLLM(path, n_ctx=64, n_threads=1) as llm:
        if lora is not None:
            llm.set_lora([(lora, 1.0)])
        try:
            llm.logits([1, 5, 7])
        except ModelError as error:
            if "not numbers" not in str(error):  # weights may be large
                raise


def gguf_case(case: Case, path: Path, out: Path) -> tuple[bool, str | None]:
    """Whether the parser of the file was passed, and the refusal."""
    passed = is_gguf(path)
    return passed, use_file(path)


def checkpoint_case(case: Case, folder: Path, out: Path) -> tuple[bool, str | None]:
    """Whether config and the headers of all weight files were read, and the refusal."""
    before = sorted(os.listdir(folder))
    try:
        open_checkpoint(folder).tensors()
        passed = True
    except CheckpointError:
        passed = False
    try:
        convert_checkpoint(
            folder,
            out,
            type=case["type"],
            schedule=case.get("schedule"),
            settings=case.get("settings"),
            portable=case.get("portable", False),
        )
        refusal = None
    except CheckpointError as error:
        refusal = check_sentence(error)
    check_folders(folder, before, out, refusal)
    if refusal is None:
        describe(out)
        compute(out)
    return passed, refusal


def verify_case(seeds: Path, case: Case, path: Path, out: Path) -> tuple[bool, str | None]:
    """Whether the parser of the file was passed, and the first thing that `verify` says against
    it. What is harmless must have nothing against it, and all else something."""
    adapter = None
    if case["input"] in MERGED:
        name = MERGED[case["input"]][0]
        adapter, source = seeds / "adapter" / name, ADAPTERS[name][2]
    else:
        source, _ = VERIFIED[case["input"]]
    passed, refusal = False, None
    try:
        with open_gguf(path):
            passed = True
        base = seeds / "checkpoint" / source
        failures = verify(path, base, adapter=adapter, n_threads=1).failures
        refusal = failures[0] if failures else None
    except (CheckpointError, ModelError) as error:
        refusal = check_sentence(error)
    if case["harmless"] and refusal is not None:
        raise Failure(f"a right file does not pass: {refusal}")
    if not case["harmless"] and refusal is None:
        raise Failure("a wrong file passes")
    return passed, refusal


def adapter_case(seeds: Path, case: Case, folder: Path, out: Path) -> tuple[bool, str | None]:
    """Whether config and header could be parsed, and the refusal. What is written is used."""
    before = sorted(os.listdir(folder))
    _, file, checkpoint = ADAPTERS[case["input"]]
    base = seeds / "checkpoint" / checkpoint
    try:
        files = [folder / name for name in (CONFIG, *ADAPTER_WEIGHTS)]
        config, weights = [path for path in files if path.is_file()][:2]  # reading a pipe waits
        read_json(config)
        passed = bool((read_torch if weights.suffix == ".bin" else read_safetensors)(weights))
    except (CheckpointError, ValueError):
        passed = False
    try:
        if case["merge"]:
            convert_checkpoint(base, out, type=case["type"], adapter=folder)
        else:
            convert_adapter(folder, out, base=base, type=case["type"])
        refusal = None
    except CheckpointError as error:
        refusal = check_sentence(error)
    check_folders(folder, before, out, refusal)
    if refusal is None and case["merge"]:
        compute(out)
    elif refusal is None:
        compute(seeds / "gguf" / file, lora=out)
    return passed, refusal


def lora_case(seeds: Path, case: Case, path: Path, out: Path) -> tuple[bool, str | None]:
    """Whether the parser of the adapter file was passed, and the refusal."""
    passed = is_gguf(path)
    _, base, _ = ADAPTERS[case["input"]]
    refusal = None
    with MobileLLM(seeds / "gguf" / base, n_ctx=64, n_threads=1) as llm:
        try:
            llm.set_lora([(path, 1.0)])
            llm.logits([1, 5, 7])
        except ModelError as error:
            refusal = check_sentence(error)
        llm.set_lora([])
        llm.logits([1, 5, 7])
    return passed, refusal


def state_case(seeds: Path, case: Case, path: Path, out: Path) -> tuple[bool, str | None]:
    """Whether the state has the length of a sound one, and the refusal. Whatever comes of it, the
    model computes afterwards what it did before."""
    data = path.read_bytes()
    refusal = None
    with MobileLLM(seeds / "gguf" / case["input"], n_ctx=64, n_threads=1) as llm:
        want = llm.logits([1, 5, 7])
        llm.eval(STATE_TOKENS)
        state = llm.save_state()
        passed = len(data) == len(state.llama_state)
        state.llama_state, state.llama_state_size = data, len(data)
        llm.load_state(state)  # what does not fit is computed again
        llm.eval([7])
        try:
            restore_state(llm.ctx, data, 0)
        except ModelError as error:
            refusal = check_sentence(error)
        if not np.array_equal(llm.logits([1, 5, 7]), want):
            raise Failure("a state changes what others compute")
    return passed, refusal


def carry_out(
    run: Callable[[Case, Path, Path], tuple[bool, str | None]],  # from the input to the output
    case: Case,
    seeds: Path,
    work: Path,
    watch: Watch,
) -> dict[str, Any]:
    """The answer for a case."""
    for name in ("in", "out", "tmp", "cwd"):
        (work / name).mkdir(parents=True)
    for name in ("outside", "in/outside"):  # what links in a case point to
        (work / name).write_bytes(b"outside")
    source = work / "in" / "model"
    write_case(case, seeds, source)
    there = sorted(os.listdir(work))
    os.chdir(work / "cwd")
    answer: dict[str, Any] = {"passed": False, "refusal": None}
    start = time.process_time()
    watch.allowed, watch.seen = (work / "out").resolve(), []
    try:
        answer["passed"], answer["refusal"] = run(case, source, work / "out" / "model.gguf")
    except Failure as error:
        answer["failure"] = str(error)
    except MobileLLMError as error:
        answer["failure"] = f"refused by the engine, not by the converter: {error}"
    except BaseException as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        answer["failure"] = f"{type(error).__name__} ({where.filename}:{where.lineno}): {error}"
    watch.allowed = None
    answer["seconds"] = time.process_time() - start
    problems = [f"did {what}" for what in watch.seen]
    for name in ("tmp", "cwd"):
        problems += [f"left {name}/{entry}" for entry in os.listdir(work / name)]
    problems += [f"left {entry}" for entry in sorted(os.listdir(work)) if entry not in there]
    if (work / "outside").read_bytes() + (work / "in" / "outside").read_bytes() != b"outside" * 2:
        problems.append("wrote to a file that a link points to")
    answer["memory"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    if answer["memory"] > MEMORY:
        problems.append(f"took {answer['memory'] >> 20} MiB of memory")
    if problems:
        answer.setdefault("failure", "; ".join(problems))
    os.chdir("/")
    shutil.rmtree(work)
    return answer


def main() -> None:
    seeds, work = Path(sys.argv[1]), Path(sys.argv[2]) / "work"
    os.environ["TMPDIR"] = str(work / "tmp")
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    # what would fill the machine's memory fails instead
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + 2 * MEMORY, resource.RLIM_INFINITY))
    watch = Watch()
    runners = {
        "checkpoint": checkpoint_case,
        "gguf": gguf_case,
        "verify": functools.partial(verify_case, seeds),
        "adapter": functools.partial(adapter_case, seeds),
        "lora": functools.partial(lora_case, seeds),
        "state": functools.partial(state_case, seeds),
    }
    for line in sys.stdin:
        case = json.loads(line)
        answer = carry_out(runners[case["kind"]], case, seeds, work, watch)
        print(json.dumps(answer), file=replies, flush=True)


if __name__ == "__main__":
    main()
