"""`perplexity` against llama.cpp's llama-perplexity, which is also the judge of the divergences of
`compare`; wrong input is refused with a sentence."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoints import make_checkpoint
from mobilellm_cpp.convert import convert_checkpoint
from mobilellm_cpp.quant.calibration_text import builtin_text
from stock_tools import number, stock_perplexity

from mobilellm_cpp import ModelError
from mobilellm_cpp.inspection.comparison import compare_models, plot
from mobilellm_cpp.inspection.perplexity import perplexity

CONTEXT, CHUNKS = 64, 8


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The demo model written out for stock llama.cpp in three types, and a text."""
    folder = tmp_path_factory.mktemp("perplexity")
    demo = Path(sys.modules["mobilellm_cpp"].__file__).parent / "demo"
    found = {}
    for kind in ("f16", "q8_0", "q4_0"):
        found[kind] = folder / f"{kind}.gguf"
        convert_checkpoint(demo, found[kind], type=kind, portable=True)
    found["text"] = folder / "text.txt"
    lines = (Path(__file__).parents[2] / "training" / "heldout.jsonl").read_text().splitlines()
    said = [message["content"] for line in lines for message in json.loads(line)["messages"]]
    found["text"].write_text("\n".join(said))  # what the model knows
    return found


def test_perplexity(files: dict[str, Path], stock_lib: Path) -> None:
    command = [sys.executable, "-m", "mobilellm_cpp", "perplexity", files["q8_0"], files["text"]]
    command += ["--ctx", CONTEXT, "--chunks", CHUNKS, "-t", 1, "--json"]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=True)
    ours = json.loads(done.stdout)
    theirs = stock_perplexity(stock_lib, files["q8_0"], files["text"], CONTEXT, CHUNKS)
    found = number(r"PPL = ([\d.]+)", theirs)
    assert ours["perplexity"] == pytest.approx(found, rel=0.005)
    assert ours["error"] == pytest.approx(number(r"PPL = [\d.]+ \+/- ([\d.]+)", theirs), rel=0.01)
    assert ours["chunks"] == CHUNKS and ours["tokens"] == CHUNKS * (CONTEXT // 2 - 1)


def test_divergence(files: dict[str, Path], stock_lib: Path, tmp_path: Path) -> None:
    text = files["text"].read_text()
    found = compare_models(
        [files["f16"], files["q8_0"], files["q4_0"]],
        text,
        n_ctx=CONTEXT,
        chunks=CHUNKS,
        n_threads=1,
        repeat=1,
    )
    same, fine, coarse = found.files
    assert same.kl_mean == 0 and same.top_1 == 1
    assert fine.kl_mean < coarse.kl_mean and fine.size < same.size
    assert all(file.decode and file.prefill for file in found.files)
    base = tmp_path / "base"
    base_options = (CONTEXT, CHUNKS, "--kl-divergence-base", base)
    stock_perplexity(stock_lib, files["f16"], files["text"], *base_options)
    theirs = stock_perplexity(
        stock_lib, files["q4_0"], files["text"], *base_options, "--kl-divergence"
    )
    assert coarse.kl_mean == pytest.approx(number(r"Mean\s+KLD:\s+([\d.]+)", theirs), rel=0.05)
    assert coarse.kl_99 == pytest.approx(number(r"99.0%\s+KLD:\s+([\d.]+)", theirs), rel=0.1)
    top = number(r"Same top p:\s+([\d.]+)", theirs) / 100
    assert coarse.top_1 == pytest.approx(top, abs=0.02)


def test_refused(files: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="two chunks of 64 are needed"):
        perplexity(files["q4_0"], "Once upon a time", n_ctx=64)
    make_checkpoint(tmp_path / "m", vocab=512)
    convert_checkpoint(tmp_path / "m", tmp_path / "other.gguf")
    with pytest.raises(ModelError, match="only files of the same vocabulary"):
        compare_models([files["f16"], tmp_path / "other.gguf"], builtin_text()[:2000], n_ctx=64)
    with pytest.raises(ModelError, match="context of 1024 tokens only"):
        compare_models([files["f16"], files["q8_0"]], builtin_text(), n_ctx=2000)


def test_plot(files: dict[str, Path], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    found = compare_models(
        [files["f16"], files["q4_0"]], builtin_text()[:2000], n_ctx=64, chunks=2, repeat=0
    )
    plot(found, tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
