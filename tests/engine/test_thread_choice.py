"""The number of threads that nobody chose: measured once, kept, and overridden by a number."""

import json

import pytest
from checkpoints import make_checkpoint

from mobilellm_cpp import MobileLLM, convert_checkpoint
from mobilellm_cpp.engine import thread_choice
from mobilellm_cpp.engine.thread_choice import chosen_threads


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MOBILELLM_CACHE", str(tmp_path))
    monkeypatch.setattr(thread_choice, "default_threads", lambda: 6)
    monkeypatch.setattr(thread_choice, "_busy", lambda: False)
    return tmp_path / "threads.json"


def clock(times, asked):
    def seconds(n):
        asked.append(n)
        return times[n]

    return seconds


def test_the_fastest_is_taken_and_kept(cache):
    asked = []
    times = {1: 4.0, 2: 2.0, 4: 1.0, 6: 1.5}
    assert chosen_threads(1000, clock(times, asked)) == 4
    assert asked == [1, 2, 4, 6]
    assert chosen_threads(1023, clock(times, asked)) == 4 and len(asked) == 4  # of the same size
    assert chosen_threads(1024, clock({**times, 6: 0.5}, asked)) == 6 and len(asked) == 8
    (sizes,) = json.loads(cache.read_text()).values()
    assert sizes == {"10": 4, "11": 6}


def test_fewer_threads_that_are_as_fast_are_taken(cache):
    assert chosen_threads(1, clock({1: 2.0, 2: 1.01, 4: 1.0, 6: 1.0}, [])) == 2


def test_what_a_busy_machine_shows_is_not_kept(cache, monkeypatch):
    monkeypatch.setattr(thread_choice, "_busy", lambda: True)
    assert chosen_threads(1, clock({1: 1.0, 2: 2.0, 4: 2.0, 6: 2.0}, [])) == 1
    assert not cache.exists()


@pytest.mark.parametrize("text", ["", "[]", '{"a": 1}', "{"])
def test_a_spoiled_file_is_measured_anew(cache, text):
    cache.write_text(text)
    assert chosen_threads(1, clock({1: 1.0, 2: 2.0, 4: 2.0, 6: 2.0}, [])) == 1
    assert "1" in cache.read_text()


def test_a_model_takes_what_was_kept(cache, tmp_path, monkeypatch):
    make_checkpoint(tmp_path / "tiny")
    path = convert_checkpoint(tmp_path / "tiny", tmp_path / "tiny.gguf", type="q4_0").path
    with MobileLLM(path) as llm:
        chosen = llm.n_threads
        assert chosen in (1, 2, 4, 6)
        text = llm.chat([{"role": "user", "content": "hi"}], max_tokens=5, temperature=0)
    kept = json.loads(cache.read_text())
    (machine,) = kept
    bits = str(path.stat().st_size.bit_length())
    assert kept[machine] == {bits: chosen}
    cache.write_text(json.dumps({machine: {bits: 2}}))
    with MobileLLM(path) as llm:
        assert llm.n_threads == 2
        assert llm.chat([{"role": "user", "content": "hi"}], max_tokens=5, temperature=0) == text
    with MobileLLM(path, n_threads=3) as llm:
        assert llm.n_threads == 3
