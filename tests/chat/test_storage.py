"""Conversations on disk, and what a model thinks told from what it says."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from mobilellm_cpp.chat import talk
from mobilellm_cpp.chat.storage import ChatError, Store, kept, read
from mobilellm_cpp.chat.talk import Talk
from mobilellm_cpp.chat.thinking import Thinking


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    return tmp_path


def say(store, *texts):
    for i, text in enumerate(texts):
        store.add({"role": ("user", "assistant")[i % 2], "content": text})


def test_a_conversation_that_was_changed(home):
    store = Store.new()
    store.add({"model": "demo"}, {"role": "system", "content": "be kind"}, later=True)
    assert not store.path.exists()  # nothing was said yet
    say(store, "one", "1", "two", "2", "three")
    store.take_back()
    store.take_back()
    say(store, "again")
    saved = read(store.path)
    assert saved.model == "demo" and saved.system == "be kind" and saved.unanswered == "again"
    assert [turn["content"] for turn in saved.turns] == ["one", "1"]
    assert store.path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("cut", range(1, 30))
def test_a_file_that_ends_anywhere_is_read_and_gone_on_with(home, cut):
    store = Store.new()
    say(store, "hello", "hi", "wie geht's? äöü", "gut")
    data = store.path.read_bytes()
    store.path.write_bytes(data[:-cut])
    saved = read(store.path)
    assert [turn["content"] for turn in saved.turns][:2] == ["hello", "hi"]
    store = Store(store.path, len(saved.turns) + bool(saved.unanswered))
    if saved.unanswered:
        store.take_back()
    say(store, "more", "and more")
    assert [turn["content"] for turn in read(store.path).turns[-2:]] == ["more", "and more"]
    assert len(read(store.path).turns) == len(saved.turns) + 2


def test_files_that_are_no_conversations(home):
    for text in ("", "hello\n", "[1]\n", '{"role": "user"}\n', '{"keep": 3}\n', "\x00\xff"):
        (home / "f").write_text(text)
        with pytest.raises(ChatError, match="holds no conversation"):
            read(home / "f")
    with pytest.raises(ChatError, match="cannot be read"):
        read(home / "none")
    (home / "f").write_text(json.dumps({"role": "user", "content": "plain"}))
    assert read(home / "f").unanswered == "plain"


def resumed(*lines):
    mobilellm = Path(sys.executable).with_name("mobilellm")
    command = [mobilellm, "chat", "--resume", "--lines", "-n", "4", "-t", "1"]
    done = subprocess.run(command, input="\n".join(lines), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_a_conversation_that_another_chat_goes_on_with_is_copied(home):
    store = Store.new()
    store.add({"model": "demo"}, {"role": "system", "content": "be kind"}, later=True)
    say(store, "one", "1", "two")  # unanswered as yet
    before = store.path.read_bytes()
    assert "so this one goes on in a copy" in resumed("three")
    assert store.path.read_bytes() == before
    (other,) = (saved for saved in kept() if saved.path != store.path)
    assert other.system == "be kind" and other.model == "demo" and not other.unanswered
    assert [turn["content"] for turn in other.turns[:3]] == ["one", "1", "three"]

    store.release()
    other.path.unlink()
    assert "copy" not in resumed("four")
    (saved,) = kept()
    assert saved.path == store.path
    assert [turn["content"] for turn in saved.turns[:3]] == ["one", "1", "four"]


def test_where_nothing_can_be_written_the_reason_is_told(home):
    (home / "mobilellm-cpp").write_text("a file")
    store = Store.new()
    say(store, "hello", "hi")
    assert "chats" in store.trouble and not list(kept())


def test_a_disk_that_is_full_leaves_what_was_saved_before(home, monkeypatch):
    path = home / "saved.jsonl"
    saved = Talk.__new__(Talk)
    saved.model, saved.system = None, ""
    saved.conversation = SimpleNamespace(turns=[{"role": "user", "content": "hello"}])
    saved.save(path)
    before = path.read_text()

    def full(path, entries):
        path.write_text("{")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(talk, "write", full)
    with pytest.raises(ChatError, match="saved.jsonl: No space"):
        saved.save(path)
    assert list(home.iterdir()) == [path] and path.read_text() == before


@pytest.mark.parametrize(
    ("text", "thought", "said"),
    [
        ("<think>\nhm, <b>\n</think>\n\nYes. </think>", "hm, <b>\n", "Yes. </think>"),
        ("Yes <think> no", "", "Yes <think> no"),
        ("<thin air", "", "<thin air"),
        ("<think>for ever", "for ever", ""),
        ("\n <think></think>ok", "", "ok"),
        ("", "", ""),
    ],
)
def test_thoughts_are_told_from_answers_however_they_come(text, thought, said):
    for size in range(1, 12):
        thinking = Thinking()
        parts = [
            part
            for start in range(0, len(text), size)
            for part in thinking.feed(text[start : start + size])
        ]
        parts += thinking.finish()
        assert (thinking.thought, thinking.said) == (thought, said)
        assert "".join(t for thinks, t in parts if thinks) == thought
        assert "".join(t for thinks, t in parts if not thinks) == said


def test_a_template_may_open_the_thoughts():
    thinking = Thinking(True)
    list(thinking.feed("so ...</th"))
    list(thinking.feed("ink>Yes"))
    assert (thinking.thought, thinking.said) == ("so ...", "Yes")
