"""`mobilellm quantize`: llama-quantize, llama-imatrix and a stock libllama are the judges."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import make_checkpoint
from gguf import GGUFReader
from mobilellm_cpp.convert import convert_checkpoint
from mobilellm_cpp.quant.budget import UNCALIBRATED, best_mix
from mobilellm_cpp.quant.calibration_text import builtin_text
from mobilellm_cpp.quant.types import Q3_K, Q4_0, Q8_0
from stock_tools import number, stock_perplexity
from typer.testing import CliRunner

from mobilellm_cpp import CheckpointError, MobileLLM, ModelError
from mobilellm_cpp.cli import app
from mobilellm_cpp.inspection.comparison import compare_models
from mobilellm_cpp.inspection.perplexity import perplexity
from mobilellm_cpp.quantization import imatrix, importance, run
from mobilellm_cpp.quantization.source import Source

torch.set_num_threads(1)  # threads that wait for each other starve on a busy machine

DEMO = Path(sys.modules["mobilellm_cpp"].__file__).parent / "demo"
HELDOUT = Path(__file__).parents[2] / "training" / "heldout.jsonl"


def quantize(*arguments: object) -> str:
    done = CliRunner().invoke(app, ["quantize", *map(str, arguments)])
    assert done.exit_code == 0, done.output + repr(done.exception)
    return done.output


def said(path: Path) -> str:
    lines = path.read_text().splitlines()
    return "\n".join(m["content"] for line in lines for m in json.loads(line)["messages"])


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model in F16, shared blocks and all."""
    path = tmp_path_factory.mktemp("demo") / "demo.gguf"
    convert_checkpoint(DEMO, path, type="f16")
    return path


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the demo model knows."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(said(HELDOUT.with_name("dev.jsonl")) + "\n" + said(HELDOUT))
    return path


@pytest.fixture(scope="module", params=[(256, 512), (64, 320)])
def deep(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random llama of 18 blocks, with rows that divide by 256 and with ones that do not."""
    hidden, ffn = request.param
    folder = tmp_path_factory.mktemp("deep")
    make_checkpoint(folder / "m", layers=18, hidden=hidden, ffn=ffn, heads=4, kv_heads=1)
    convert_checkpoint(folder / "m", folder / "m.gguf", type="f32")
    return folder / "m.gguf"


def tensors(path: Path) -> dict[str, tuple[str, bytes]]:
    return {t.name: (t.tensor_type.name, t.data.tobytes()) for t in GGUFReader(path).tensors}


TYPES = ["q8_0", "q4_0", "q4_1", "iq4_nl", "q3_k_s", "q3_k_m", "q3_k_l", "q4_k_s", "q4_k_m"]
TYPES += ["q5_k_s", "q5_k_m", "q6_k"]


@pytest.mark.parametrize("kind", TYPES)
def test_types_of_llama_quantize(deep: Path, stock_lib: Path, tmp_path: Path, kind: str) -> None:
    ours, theirs = tmp_path / "ours.gguf", tmp_path / "theirs.gguf"
    quantize(deep, ours, "--type", kind, "--no-calibration", "--no-report")
    command = [stock_lib / "llama-quantize", deep, theirs, kind.upper(), "1"]
    subprocess.run([*map(str, command)], check=True, capture_output=True)
    assert tensors(ours) == tensors(theirs)
    assert (
        GGUFReader(ours).fields["general.file_type"].parts[-1][0]
        == (GGUFReader(theirs).fields["general.file_type"].parts[-1][0])
    )


@pytest.mark.parametrize("tied", [True, False])
def test_type_of_the_head(stock_lib: Path, tmp_path: Path, tied: bool) -> None:
    plain, ours, theirs = (tmp_path / f"{name}.gguf" for name in ("plain", "ours", "theirs"))
    make_checkpoint(tmp_path / "m", tied=tied)
    convert_checkpoint(tmp_path / "m", plain, type="f16")
    quantize(plain, ours, "--type", "q8_0", "--head", "Q4_0", "--no-calibration", "--no-report")
    option = "--token-embedding-type" if tied else "--output-tensor-type"
    command = [stock_lib / "llama-quantize", option, "q4_0", plain, theirs, "Q8_0", "1"]
    subprocess.run([*map(str, command)], check=True, capture_output=True)
    assert tensors(ours) == tensors(theirs)


@pytest.mark.parametrize("tied", [True, False])
def test_type_of_the_head_in_conversion(stock_lib: Path, tmp_path: Path, tied: bool) -> None:
    source, plain, theirs = tmp_path / "m", tmp_path / "plain.gguf", tmp_path / "theirs.gguf"
    make_checkpoint(source, tied=tied, dtype="f32")
    convert_checkpoint(source, plain, type="f32")
    option = "--token-embedding-type" if tied else "--output-tensor-type"
    command = [stock_lib / "llama-quantize", option, "q5_0", plain, theirs, "Q8_0", "1"]
    subprocess.run([*map(str, command)], check=True, capture_output=True)
    ours = tmp_path / "ours.gguf"
    options = ["--type", "q8_0", "--head", "Q5_0", "--verify"]
    done = CliRunner().invoke(app, ["convert", str(source), "-o", str(ours), *options])
    assert done.exit_code == 0, done.output
    assert tensors(ours) == tensors(theirs)


def test_a_head_of_another_type_is_kept_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOBILELLM_CACHE", str(tmp_path / "cache"))
    make_checkpoint(tmp_path / "m")
    kinds = []
    for head in (None, "q4_0", None):
        with MobileLLM.from_checkpoint(tmp_path / "m", "q8_0", head=head, n_ctx=32) as llm:
            kinds.append(tensors(Path(llm.model_path))["token_embd.weight"][0])
    assert kinds == ["Q8_0", "Q4_0", "Q8_0"] and len(list((tmp_path / "cache").glob("*.gguf"))) == 2


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"type": "q4_0", "head": "../x"}, "../x is not a type for the head"),
        ({"type": "exact", "head": "q4_0"}, "exact keeps the head"),
        ({"type": "small", "head": "q4_0"}, "recipes choose the head's, too"),
    ],
)
def test_conversion_refuses_a_head(options: Any, says: str, tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "m")
    with pytest.raises(CheckpointError, match=re.escape(says)):
        MobileLLM.from_checkpoint(tmp_path / "m", **options)


def test_imatrix(demo: Path, text: Path, stock_lib: Path, tmp_path: Path) -> None:
    """Ours is llama-imatrix's on the same text, and both use the other's in the same way."""
    portable = tmp_path / "portable.gguf"  # a block for each layer: stock has no schedule
    convert_checkpoint(DEMO, portable, type="f16", portable=True)
    ours, theirs = tmp_path / "ours.imatrix.gguf", tmp_path / "theirs.gguf"
    tokens = run.text_tokens(Source(portable), text.read_text(), 24)
    command = [stock_lib / "llama-imatrix", "-m", portable, "-f", text, "-o", theirs, "-t", 1]
    command += ["-c", len(tokens[0]), "-b", len(tokens[0]), "--chunks", len(tokens), "--no-ppl"]
    subprocess.run([*map(str, command)], check=True, capture_output=True)
    quantize(
        portable, tmp_path / "q.gguf", "--type", "q4_0", "--no-calibration", "--no-report",
        "--calibration", text, "--save-imatrix", ours,
    )  # fmt: skip
    a = {t.name: t.data for t in GGUFReader(ours).tensors}
    b = {t.name: t.data for t in GGUFReader(theirs).tensors}
    assert set(a) == set(b)
    for name, values in a.items():
        assert values.ravel() == pytest.approx(b[name].ravel(), rel=0.03), name
    quantize(portable, tmp_path / "a.gguf", "--type", "q4_0", "--imatrix", ours, "--no-report")
    command = [stock_lib / "llama-quantize", "--imatrix", ours, portable, tmp_path / "b.gguf"]
    subprocess.run([*map(str, command), "Q4_0", "1"], check=True, capture_output=True)
    assert tensors(tmp_path / "a.gguf") == tensors(tmp_path / "b.gguf")


def test_calibrated(demo: Path, tmp_path: Path) -> None:
    """Interrupted, it goes on where it was; what was rounded before is not rounded again."""
    plain, ours = tmp_path / "plain.gguf", tmp_path / "ours.gguf"
    quantize(demo, plain, "--type", "q4_0", "--no-calibration", "--no-report")
    seen: list[str] = []

    def stop_in_the_middle(done: int, total: int, name: str) -> None:
        seen.append(name)
        if name == "blk.1.attn_q.weight":
            raise KeyboardInterrupt

    calibration = said(HELDOUT.with_name("dev.jsonl"))
    source = Source(demo)
    plan = run.make_plan(source, "q4_0")
    with pytest.raises(KeyboardInterrupt):
        run.quantize_file(source, ours, plan, text=calibration, progress=stop_in_the_middle)
    assert not ours.exists() and len(list(tmp_path.glob(".ours*"))) == 1
    (folder,) = tmp_path.glob(".ours*")
    kept = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert len(kept) == len(seen)
    run.quantize_file(
        source, ours, plan, text=calibration,
        progress=lambda *_: [kept.pop(p) == p.stat().st_mtime_ns or 1 / 0 for p in list(kept)],
    )  # fmt: skip
    assert not kept and not list(tmp_path.glob(".ours*"))
    one_key = os.path.getsize(ours) - os.path.getsize(plain)  # which says that it is calibrated
    assert 0 < one_key < 100

    found = compare_models([demo, plain, ours], said(HELDOUT), n_ctx=128, repeat=0)
    assert found.files[2].kl_mean < 0.7 * found.files[1].kl_mean


def test_tuned(tmp_path: Path) -> None:
    """Norms and scales of the blocks move, and only they; the file is nearer to the float one."""
    make_checkpoint(tmp_path / "m", layers=2, sharing=True)
    plain, calibrated, ours = (tmp_path / f"{name}.gguf" for name in ("f16", "0", "20"))
    convert_checkpoint(tmp_path / "m", plain, type="f16")
    for steps, out in ((0, calibrated), (20, ours)):
        quantize(plain, out, "--type", "q4_0", "--sequences", 8, "--tune", steps, "--no-report")
    before, after = tensors(calibrated), tensors(ours)
    moved = {name for name in before if before[name] != after[name]}
    assert {"blk.0.attn_norm.weight", "blk.0.ffn_norm.weight", "blk.0.ffn_up.weight"} <= moved
    assert not {"token_embd.weight", "output_norm.weight"} & moved
    found = compare_models([plain, calibrated, ours], builtin_text()[-6000:], n_ctx=128, repeat=0)
    assert found.files[2].kl_mean < found.files[1].kl_mean


def test_stock_reads_it(text: Path, tmp_path: Path, stock_lib: Path) -> None:
    """Calibrated files of all types: the perplexity that a stock libllama finds. Activations are
    rounded in another order there, which moves a small model's figure by some thousandths."""
    portable = tmp_path / "m.gguf"
    convert_checkpoint(DEMO, portable, type="f16", portable=True)
    for kind in ("best",):
        path = tmp_path / f"{kind}.gguf"
        quantize(portable, path, "--type", kind, "--sequences", 1, "--no-report")
        theirs = number(r"PPL = ([\d.]+)", stock_perplexity(stock_lib, path, text, 128, 8))
        ours = perplexity(path, text.read_text(), n_ctx=128, chunks=8, n_threads=1)
        assert ours.perplexity == pytest.approx(theirs, rel=0.01), kind


@pytest.mark.parametrize("recipe", UNCALIBRATED)
def test_recipes(demo: Path, recipe: str, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    said = quantize(demo, out, "--type", recipe, "--no-calibration", "--no-report")
    matrices = [t for t in GGUFReader(out).tensors if len(t.shape) == 2]
    bits = 8 * sum(t.n_bytes for t in matrices) / sum(t.n_elements for t in matrices)
    assert bits == pytest.approx(UNCALIBRATED[recipe], rel=0.02)
    assert f"{recipe}: " in said
    with MobileLLM(out, n_threads=1) as llm:
        assert np.isfinite(llm.logits([1, 2, 3])).all()


def test_targets(demo: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    said = quantize(demo, out, "--target-size", "1GB", "--no-calibration", "--no-report")
    assert "8.5" in said and ": this file cannot use more bits\n" in said
    quantize(demo, out, "--target-size", "1.4MB", "--no-calibration", "--no-report")
    assert 0.98 * 1.4e6 <= out.stat().st_size <= 1.4e6
    quantize(demo, out, "--target-bpw", 7, "--no-calibration", "--no-report")
    source = Source(out)
    bits = 8 * sum(t.n_bytes for t in source.tensors.values())
    assert bits / sum(t.n_elements for t in source.tensors.values()) == pytest.approx(7, rel=0.02)


def test_best_mix() -> None:
    """By hand: 100 weights each; the bits go where they save more."""
    costs = {"a": {Q3_K: 9.0, Q4_0: 5.0, Q8_0: 0.1}, "b": {Q3_K: 3.0, Q4_0: 2.0, Q8_0: 0.1}}
    sizes = {"a": 100, "b": 100}
    assert best_mix(costs, sizes, 687) == {"a": Q3_K, "b": Q3_K}
    assert best_mix(costs, sizes, 343.75 + 450) == {"a": Q4_0, "b": Q3_K}
    assert best_mix(costs, sizes, 343.75 + 850) == {"a": Q8_0, "b": Q3_K}
    assert best_mix(costs, sizes, 10_000) == {"a": Q8_0, "b": Q8_0}


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--type", "q9_9"], "q9_9 is not a type"),
        (["--type", "q4_0", "--head", "small"], "small is not a type for the head"),
        (["--target-size", "1kB"], "its metadata alone takes"),
        (["--target-bpw", "1.5"], "no mix of types has 1.50 bits"),
        (
            ["--type", "Q4_K_M", "--no-fallback", "--no-calibration"],
            "not a multiple of Q4_K's block",
        ),
        (["--type", "q4_0", "--calibration", "SHORT"], "the calibration text has"),
    ],
)
def test_refused(arguments: list[str], sentence: str, tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "m")
    convert_checkpoint(tmp_path / "m", tmp_path / "m.gguf")
    out = tmp_path / "out.gguf"
    (tmp_path / "short").write_text("Once upon a time")
    arguments = [str(tmp_path / "short") if word == "SHORT" else word for word in arguments]
    done = CliRunner().invoke(app, ["quantize", str(tmp_path / "m.gguf"), str(out), *arguments])
    assert isinstance(done.exception, ModelError) and sentence in str(done.exception)
    assert not out.exists()


def test_checkpoint(tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    said = quantize(DEMO, out, "--type", "q4_0", "--no-calibration", "--report")
    assert "KL" in said and "top-1" in said and out.exists()
    file = tmp_path / "no.gguf"
    file.write_bytes(b"GGUF")
    done = CliRunner().invoke(app, ["quantize", str(file), str(out)])
    assert isinstance(done.exception, ModelError)


def test_strength_of_columns(demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What llama.cpp's graph says of the inputs is what PyTorch finds, summed over executions."""
    monkeypatch.setattr(importance, "OUTPUTS", 1)
    source, text = Source(demo), builtin_text()
    found = importance.column_importance(source, text)
    assert set(found) == {name for name, info in source.tensors.items() if len(info.shape) == 2}
    with MobileLLM(demo, n_threads=1) as llm:
        tokens = llm.tokenize(text[: 8 * importance.TOKENS].encode())[: importance.TOKENS]
    sums, counts = imatrix.collect(source, [tokens])
    for name, squares in sums.items():
        executions = counts[name] / len(tokens)
        wanted = squares / counts[name] * executions
        wanted += 1e-3 * wanted.mean()
        np.testing.assert_allclose(found[name], wanted, rtol=0.05, atol=0.01 * wanted.mean())


def test_ctrl_c_while_inputs_are_measured(demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes up in a callback of llama.cpp, and is not lost there."""

    def interrupted(values: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(importance.np, "square", interrupted)
    with pytest.raises(KeyboardInterrupt):
        importance.column_importance(Source(demo), builtin_text())


def test_recipes_of_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """convert --type and from_checkpoint take recipes; an adapter file has none."""
    out = tmp_path / "out.gguf"
    arguments = ["convert", str(DEMO), "-o", str(out), "--type", "best"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output + repr(done.exception)
    assert "6.5" in done.output and [p.name for p in tmp_path.iterdir()] == ["out.gguf"]
    monkeypatch.setenv("MOBILELLM_CACHE", str(tmp_path / "cache"))
    with MobileLLM.from_checkpoint(DEMO, "best", n_threads=1) as llm:
        assert Path(llm.model_path).read_bytes() == out.read_bytes()
