"""What `mobilellm inspect` tells: differences between files, a picture of the schedule, which
llama.cpp runs a file. gguf's reader and its dequantization are the judges of differences."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from checkpoints import make_checkpoint, make_pro, make_r1, random_tensor
from gguf import GGUFReader
from gguf.quants import dequantize
from mobilellm_cpp.convert import convert_checkpoint

from mobilellm_cpp import ModelError
from mobilellm_cpp.inspection.compatibility import ARCHITECTURES, TYPES, compatibility
from mobilellm_cpp.inspection.description import describe
from mobilellm_cpp.inspection.difference import compare
from mobilellm_cpp.inspection.picture import draw

UP = "model.layers.1.mlp.up_proj.weight"


def inspect(*arguments: object) -> str:
    command = [sys.executable, "-m", "mobilellm_cpp", "inspect", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def values(path: Path) -> dict[str, np.ndarray]:
    return {t.name: dequantize(t.data, t.tensor_type) for t in GGUFReader(path).tensors}


def test_differences(tmp_path: Path) -> None:
    a, b = tmp_path / "a.gguf", tmp_path / "b.gguf"
    changed = random_tensor(UP, (128, 64), 0)
    changed[3, 5] += 0.25
    convert_checkpoint(make_checkpoint(tmp_path / "m", dtype="f32"), a, type="f32")
    other = make_checkpoint(tmp_path / "other", dtype="f32", tensors={UP: changed}, sharing=True)
    convert_checkpoint(other, b, type="q8_0", schedule="reverse")

    same = compare(a, a)
    assert same.metadata == [] and same.tensors == [] and same.alike == 20
    assert inspect(a, a).splitlines()[-1] == "the files have the same contents"

    found = compare(a, b)
    ours = {tensor.name: tensor for tensor in found.tensors}
    theirs, others = values(a), values(b)
    vectors = [name for name in theirs if name.endswith("norm.weight")]
    assert set(ours) == set(theirs) - set(vectors) and found.alike == len(vectors)
    for name, tensor in ours.items():
        error = np.abs(theirs[name] - others[name])
        assert tensor.largest == pytest.approx(error.max(), rel=1e-6)
        assert tensor.mean == pytest.approx(error.mean(dtype=np.float64), rel=1e-6)
        assert (tensor.type_a, tensor.type_b) == ("f32", "q8_0")
    assert found.tensors[0].name == "blk.1.ffn_up.weight"  # the largest first
    keys = {key.key: (key.a, key.b) for key in found.metadata}
    assert keys["general.name"] == ("M", "Other")
    assert keys["general.architecture"] == ("llama", "mobilellm")
    assert keys["mobilellm.block_schedule"] == ("absent", "[0, 1, 1, 0]")
    words = inspect(a, b)
    assert "general.architecture" in words and "llama | mobilellm" in words
    assert f"{len(vectors)} of 20 tensors are the same in both" in words


def test_differences_of_lists_and_shapes(tmp_path: Path) -> None:
    a, b = tmp_path / "a.gguf", tmp_path / "b.gguf"
    convert_checkpoint(make_checkpoint(tmp_path / "a"), a)
    other = make_checkpoint(tmp_path / "b", ffn=96, tied=False)
    settings = '{"added_tokens_decoder": {"300": {"content": "<new>", "special": true}}}'
    (other / "tokenizer_config.json").write_text(settings)
    convert_checkpoint(other, b)
    found = compare(a, b)
    keys = {key.key: (key.a, key.b) for key in found.metadata}
    assert keys["tokenizer.ggml.tokens"][1] == "[300] <new> (1 of 512 differ)"
    assert keys["tokenizer.ggml.token_type"][0] == "[300] 1"
    ours = {tensor.name: tensor for tensor in found.tensors}
    up = ours["blk.0.ffn_up.weight"]
    assert (up.shape_a, up.shape_b, up.largest) == ([128, 64], [96, 64], None)
    assert (ours["output.weight"].type_a, ours["output.weight"].type_b) == ("", "f16")
    words = inspect(a, b)
    assert "f16 [128, 64] | f16 [96, 64]" in words and "absent | f16" in words
    with pytest.raises(ModelError, match="nothing.gguf: no such file"):
        compare(a, tmp_path / "nothing.gguf")


def test_numbers_that_are_none_differ(tmp_path: Path) -> None:
    a, b = tmp_path / "a.gguf", tmp_path / "b.gguf"
    convert_checkpoint(make_checkpoint(tmp_path / "m", dtype="f32"), a, type="f32")
    content = bytearray(a.read_bytes())
    content[-4:] = np.float32(np.nan).tobytes()
    b.write_bytes(content)
    assert compare(a, b).tensors[0].largest == np.inf
    assert compare(b, b).tensors == []


PICTURES = {
    "base": ([0, 1, 2], ["block 2 │  ■", "block 1 │ ■", "block 0 │■", "  layer  0"]),
    "immediate": ([0, 0, 1, 1], ["block 1 │  ■■", "block 0 │■■", "  layer  0"]),
    "reverse": ([0, 1, 1, 0], ["block 1 │ ■■", "block 0 │■  ■", "  layer  0"]),
    "many": (
        [block for block in range(12) for _ in range(2)],
        [
            "blocks 10-11 │                    ■■■■",
            "  blocks 8-9 │                ■■■■",
            "  blocks 6-7 │            ■■■■",
            "  blocks 4-5 │        ■■■■",
            "  blocks 2-3 │    ■■■■",
            "  blocks 0-1 │■■■■",
            "       layer  0         10        20",
        ],
    ),
}


@pytest.mark.parametrize("name", PICTURES)
def test_pictures(name: str) -> None:
    schedule, lines = PICTURES[name]
    assert draw(schedule, ["■"] * len(schedule)) == lines


def test_a_picture_fits_its_width() -> None:
    lines = draw(list(range(512)), ["■", "□"] * 256, width=60)
    assert len(lines) == 8 + 2 and max(map(len, lines)) <= 60
    assert lines[-1].strip() == "■ full attention, □ a window"


def test_what_llama_cpp_does(tmp_path: Path) -> None:
    def says(folder: Path, **options: object) -> str:
        return describe(convert_checkpoint(folder, tmp_path / "m.gguf", **options).path).llama_cpp

    base = make_checkpoint(tmp_path / "base", sharing=True)
    assert says(base).startswith("refused by stock llama.cpp (unknown model architecture)")
    expected = "runs in llama.cpp since August 2023 (architecture llama, pull request 2398)"
    assert says(base, portable=True) == expected
    expected = "runs in llama.cpp since May 2024 (type bf16, pull request 6412)"
    assert says(base, portable=True, type="bf16") == expected
    r1 = make_r1(tmp_path / "r1")
    assert "since April 2025 (architecture qwen3, pull" in says(r1, portable=True)
    pro = make_pro(tmp_path / "pro", qk_norm=False)
    assert "since July 2026 (architecture granite_swa, pull" in says(pro, portable=True)
    assert "type q2_0" in compatibility("llama", ["f32", "q2_0", "bf16"])
    assert "knows nothing" in compatibility("rwkv", [])


def test_stock_knows_what_it_is_said_to_run(llama_cpp_source: Path) -> None:
    names = (llama_cpp_source / "src" / "llama-arch.cpp").read_text()
    types = (llama_cpp_source / "ggml" / "src" / "ggml.c").read_text()
    assert all(
        f'"{name.replace("granite_swa", "granite-swa")}"' in names or f'"{name}"' in names
        for name in ARCHITECTURES
    )
    assert all(f'"{name}"' in types for name in TYPES)
    assert '"mobilellm"' not in names


def test_inspect_shows_layers(tmp_path: Path) -> None:
    pro = make_pro(tmp_path / "pro", sliding=[0, 1, 1], rope=[1, 1, 0])
    convert_checkpoint(pro, tmp_path / "m.gguf")
    about = describe(tmp_path / "m.gguf")
    assert about.layer_slides == [False, True, True]
    assert about.layer_has_rope == [True, True, False]
    words = inspect(tmp_path / "m.gguf")
    assert "block 2 │  ◇" in words and "block 1 │ □" in words and "block 0 │■" in words
    assert "■ full attention, □ a window, ◇ a window without RoPE" in words
