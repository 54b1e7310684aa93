"""What the package logs, under its name."""

import logging

from mobilellm_cpp import MobileLLM
from mobilellm_cpp.cache import DEMO


def test_loading_and_converting_are_logged(tmp_path, monkeypatch, caplog, capfd):
    monkeypatch.setenv("MOBILELLM_CACHE", str(tmp_path))
    caplog.set_level(logging.INFO, logger="mobilellm_cpp")
    with MobileLLM.from_checkpoint(DEMO, "q8_0", n_threads=1, n_ctx=512) as llm:
        llm.use_prompt_cache(tmp_path / "prompts")
        prompt = list(range(3, 203))
        llm.batch([prompt], max_tokens=1)
        llm._prompts.wait()
        llm._sequences.change(lambda: None)  # as in a process that begins
        llm.batch([prompt], max_tokens=1)
    converted, loaded, kept = [record.getMessage() for record in caplog.records]
    assert f"{DEMO} is converted to {tmp_path}" in converted
    assert "loaded in" in loaded and "1 threads, 512 tokens" in loaded
    assert kept.startswith("a prompt of 200 tokens has 200 of ")
    assert {record.name.split(".")[0] for record in caplog.records} == {"mobilellm_cpp"}
    assert capfd.readouterr() == ("", "")  # nothing is printed beside
