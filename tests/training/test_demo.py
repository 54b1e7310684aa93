"""The shipped model: what it is, what it was measured on, and that it answers."""

import json
import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from mobilellm_cpp import MobileLLM
from mobilellm_cpp.cache import DEMO, resolve
from mobilellm_cpp.engine.conversation import Conversation

TRAINING = Path(__file__).resolve().parents[2] / "training"
HELDOUT = [json.loads(line) for line in (TRAINING / "heldout.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("demo")
        patch.setenv("MOBILELLM_CACHE", str(folder))
        yield folder


def measured(*models):
    """Right answers of 50, by model file, as training/evaluate.py prints them."""
    command = [sys.executable, str(TRAINING / "evaluate.py"), "--json", *map(str, models)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return {row["model"]: row["right"] for row in json.loads(done.stdout)["results"]}


def test_the_checkpoint_is_small_shared_and_in_the_hubs_layout():
    assert sum(path.stat().st_size for path in DEMO.iterdir()) <= 8_000_000
    config = json.loads((DEMO / "config.json").read_text())
    assert config["architectures"] == ["MobileLLMForCausalLM"] and config["layer_sharing"] is True
    assert {"model.safetensors", "tokenizer.model"} <= {path.name for path in DEMO.iterdir()}


def test_the_held_out_wordings_are_far_from_all_training_wordings():
    assert len(HELDOUT) == 50
    assert len({json.dumps(item["messages"][-1]) for item in HELDOUT}) == 50
    assert sum(len(item["messages"]) > 1 for item in HELDOUT) >= 10
    done = subprocess.run(
        [sys.executable, str(TRAINING / "check_heldout.py")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_wording_that_is_too_near_breaks_the_check(tmp_path):
    """The check can fail: a held-out file with a training wording in it does not pass."""
    copy = tmp_path / "training"
    subprocess.run(["cp", "-r", str(TRAINING), str(copy)], check=True)
    item = {"intent": "baker.who", "messages": [{"role": "user", "content": "Who is the baker?"}]}
    lines = [json.dumps(item), *(copy / "heldout.jsonl").read_text().splitlines()[1:]]
    (copy / "heldout.jsonl").write_text("\n".join(lines) + "\n")
    done = subprocess.run(
        [sys.executable, str(copy / "check_heldout.py")], capture_output=True, text=True
    )
    assert done.returncode == 1, done.stdout + done.stderr


def test_it_answers_held_out_questions_in_every_type():
    files = [resolve(None, kind) for kind in ("f16", "q8_0", "q4_0")]
    right = measured(*files)
    assert min(right.values()) >= 40, right
    quoted = re.search(r"answer to (\d+) of 50 as F16", (TRAINING.parent / "README.md").read_text())
    # processors round differently, and an answer or two may hang on that
    assert quoted and abs(right[files[0].name] - int(quoted[1])) <= 2


def test_it_follows_a_conversation():
    talk = Conversation(MobileLLM(resolve(None), n_threads=1), temperature=0.0)
    assert "Marta Bell" in "".join(talk.answer("Who is the baker?"))
    assert "Mill Lane" in "".join(talk.answer("Where does she live?"))


def test_chat_without_a_model_is_the_demo(cache):
    command = [str(Path(sysconfig.get_path("scripts")) / "mobilellm"), "chat"]
    done = subprocess.run(
        command, input="Who is the baker?\n", capture_output=True, text=True, env=os.environ
    )
    assert done.returncode == 0 and "Marta Bell" in done.stdout and done.stderr == ""
