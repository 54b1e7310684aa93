"""`mobilellm embed`: its files are numpy's, its JSON is OpenAI's, its table is the cosine."""

import io
import json
import subprocess
import sysconfig
from pathlib import Path

import numpy as np
import openai
import pytest

from mobilellm_cpp import MobileLLM, ModelError

MOBILELLM = str(Path(sysconfig.get_path("scripts")) / "mobilellm")
LINES = ["Marta bakes bread", "", "who bakes the bread?", "ünïcödé 日本", "a " * 60]
STDIN = "\n".join(LINES) + "\n"


def embed(model, *arguments, stdin=STDIN, code=0):
    done = subprocess.run(
        [MOBILELLM, "embed", str(model), *map(str, arguments)],
        input=stdin.encode(),
        capture_output=True,
        timeout=120,
    )
    assert done.returncode == code, done.stderr
    return done.stdout if code == 0 else done.stderr.decode()


def test_npy(model, llm, tmp_path):
    said = embed(model, "-o", tmp_path / "v.npy")
    vectors = np.load(tmp_path / "v.npy")
    assert said == b"" and vectors.dtype == np.float32
    assert np.array_equal(vectors, llm.embeddings(LINES))  # whatever is embedded beside them
    for line, vector in zip(LINES, vectors, strict=True):
        assert np.array_equal(llm.embeddings([line])[0], vector)
    assert np.array_equal(np.load(io.BytesIO(embed(model, "-o", "-"))), vectors)
    raw = np.load(io.BytesIO(embed(model, "-o", "-", "--raw", "--pooling", "last")))
    with MobileLLM(model, n_threads=1, pooling_type=3) as last:
        assert np.array_equal(raw, last.embeddings(LINES, normalize=False))
    assert [path.name for path in tmp_path.iterdir()] == ["v.npy"]


def test_files_are_texts_or_lines(model, llm, tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    (tmp_path / "b.txt").write_text("three")
    files = (tmp_path / "a.txt", tmp_path / "b.txt")
    whole = np.load(io.BytesIO(embed(model, *files, "-o", "-")))
    assert np.array_equal(whole, llm.embeddings(["one\ntwo\n", "three"]))
    lines = np.load(io.BytesIO(embed(model, *files, "--lines", "-o", "-")))
    assert np.array_equal(lines, llm.embeddings(["one", "two", "three"]))


def test_json_is_openais(model, llm):
    said = json.loads(embed(model, "--json"))
    answer = openai.types.CreateEmbeddingResponse.model_construct(**said)
    found = [openai.types.Embedding.model_validate(each) for each in answer.data]
    assert np.array_equal(
        np.array([each.embedding for each in found], np.float32), llm.embeddings(LINES)
    )


def test_the_table_is_the_cosine(model, llm):
    head, *rows = embed(model).decode().splitlines()
    found = np.array([row.split()[1 : 1 + len(LINES)] for row in rows], float)
    vectors = llm.embeddings(LINES, normalize=False)
    lengths = np.linalg.norm(vectors, axis=1)
    cosines = vectors @ vectors.T / np.outer(lengths, lengths)
    assert np.abs(found - cosines).max() < 0.0051 and head.split() == list("12345")
    assert rows[0].endswith("Marta bakes bread")


def test_wrong_input(model, llm, tmp_path):
    def sentence(*arguments, **keywords):
        said = embed(model, *arguments, code=1, **keywords)
        assert said.startswith("mobilellm: ") and said.count("\n") == 1
        return said

    assert "no text" in sentence(stdin="")
    assert "too large to read" in sentence(stdin="a\n" * 60)
    assert "none.txt: No such file" in sentence("none.txt")
    assert "line 2 has" in sentence("--ctx", 30, stdin="a\n" + "word " * 90)
    assert "--truncate" in sentence("--ctx", 30, stdin="a\n" + "word " * 90)
    assert f"{tmp_path}/none/v.npy: No such file" in sentence("-o", tmp_path / "none" / "v.npy")
    assert "choose one" in embed(model, "-o", "x", "--json", code=2)
    cut = np.load(
        io.BytesIO(embed(model, "--ctx", 30, "--truncate", "-o", "-", stdin="word " * 90))
    )
    assert cut.shape == (1, llm.n_embd())
    with pytest.raises(ModelError, match="text 1 has .* the context holds 1024"):
        llm.embeddings(["a", "word " * 2000])
