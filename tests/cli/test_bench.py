"""mobilellm bench: figures of tiny models, and how they are put together."""

import json

import pytest
from checkpoints import make_checkpoint
from gguf import GGUFReader
from typer.testing import CliRunner

from mobilellm_cpp import ModelError, convert_checkpoint
from mobilellm_cpp.cli import app
from mobilellm_cpp.inspection import benchmark


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    make_checkpoint(folder / "a", sharing=True)
    make_checkpoint(folder / "b", tied=False, max_position_embeddings=256)
    for name in "ab":
        convert_checkpoint(folder / name, folder / f"{name}.gguf", type="q8_0")
    return folder


@pytest.fixture(autouse=True)
def little_memory(monkeypatch):
    monkeypatch.setattr(benchmark, "READ", 1 << 22)


def bench(*arguments):
    return CliRunner().invoke(app, ["bench", *map(str, arguments)])


def test_json(folder):
    done = bench(folder / "a.gguf", "--json", "-t", 1, "--repeat", 2)
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert "prefill 64" in done.stderr
    (model,) = report["models"]
    assert model["path"].endswith("a.gguf") and model["context"] == 2048
    # every tensor is read: the head is tied, and a block that runs twice is counted once
    tensors = GGUFReader(folder / "a.gguf").tensors
    assert model["bytes_per_token"] == sum(int(tensor.n_bytes) for tensor in tensors)
    per_token = 4 * 2 * 16 * 2 * 2  # layers, KV heads, width, K and V
    assert model["kv_bytes"] == [0, 512 * per_token, 1536 * per_token]
    assert 64 <= model["prompt_tokens"] < 70
    assert 0.1 < model["first_token_seconds"]["median"] < 60
    assert 20 << 20 < model["peak_memory"] < 2 << 30
    (limit,) = report["limits"]
    assert limit["threads"] == 1 and 1e8 < limit["bandwidth"] < 1e12
    assert 0 < limit["head_share"][0] < 1
    names = [benchmark.row_name(row["phase"], row["tokens"]) for row in report["rows"]]
    assert names[:3] == ["prefill 64", "prefill 256", "prefill 1024"]
    assert names[3:] == ["decode at 0", "decode at 512", "decode at 1536"]
    for row in report["rows"]:
        (rate,) = row["rates"]
        assert 0 < rate["low"] <= rate["median"] <= rate["high"]
        assert row["ratio"] is None
        if row["phase"] == "decode":
            read = model["bytes_per_token"] + row["tokens"] * per_token
            share = rate["median"] * read / limit["bandwidth"]
            assert row["of_limit"] == [pytest.approx(share)]
    assert report["skipped"] == []


def test_two_models_in_turn(folder, monkeypatch):
    """A B A B; the ratio is that of the pairs, not of the medians."""
    rates = {"a": iter([10, 30, 90] * 6), "b": iter([10, 10, 10] * 6)}
    calls = []

    def rate(self, phase, tokens, threads):
        name = self.path[-6]
        calls.append(name)
        return next(rates[name])

    monkeypatch.setattr(benchmark.Runner, "rate", rate)
    monkeypatch.setattr(benchmark, "_first_token", lambda *_: (1.0, 1))
    report = benchmark.benchmark([folder / "a.gguf", folder / "b.gguf"], [1], repeat=3)
    first = report.rows[0]
    assert (first.phase, first.tokens) == ("prefill", 64) and calls[:6] == list("ababab")
    assert first.rates[0].median == 30 and first.rates[1].median == 10
    assert first.ratio == benchmark.Spread(3, 1, 9)


def test_a_context_that_is_too_short(folder):
    done = bench(folder / "a.gguf", "--vs", folder / "b.gguf", "-t", 1, "--repeat", 1)
    assert done.exit_code == 0, done.output
    for row in ("prefill 1024", "decode at 512", "decode at 1536"):
        assert f"b.gguf: {row} is left out, the context is 256 tokens" in done.stderr
    table = [line.split() for line in done.stdout.splitlines()]
    (line,) = [words for words in table if words[1:3] == ["prefill", "1024"]]
    assert line[-2:] == ["-", "-"] and float(line[3]) > 0
    (line,) = [words for words in table if words[1:3] == ["prefill", "256"]]
    assert "-" not in line


def test_an_embedding_beside_a_head_is_not_read(folder, monkeypatch):
    monkeypatch.setattr(benchmark, "_first_token", lambda *_: (1.0, 1))
    report = benchmark.benchmark([folder / "b.gguf"], [1], repeat=1)
    tensors = {t.name: int(t.n_bytes) for t in GGUFReader(folder / "b.gguf").tensors}
    assert "output.weight" in tensors
    assert report.models[0].bytes_per_token == sum(tensors.values()) - tensors["token_embd.weight"]
    assert [benchmark.row_name(row.phase, row.tokens) for row in report.rows] == [
        "prefill 64",
        "prefill 256",
        "decode at 0",
    ]


def test_nonsense_gets_a_sentence(folder):
    assert bench(folder / "a.gguf", "-t", 0).exit_code == 2
    for threads, repeat, sentence in [
        ([], 1, "threads are"),
        ([0], 1, "each must be 1 to 512"),
        ([1], 0, "repeat is 0"),
    ]:
        with pytest.raises(ModelError, match=sentence):
            benchmark.benchmark([folder / "a.gguf"], threads, repeat=repeat)
    with pytest.raises(ModelError, match="no such file"):
        benchmark.benchmark([folder / "nothing.gguf"], [1])


def test_a_new_process_that_fails_is_named(folder):
    with pytest.raises(ModelError, match=r"nothing.gguf: a new process failed: .*no such file"):
        benchmark._first_token(str(folder / "nothing.gguf"), "x", 1)
