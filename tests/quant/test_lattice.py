"""Type exact: what ggml reads from the file is what the checkpoint holds, weight by weight."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import PUBLISHED, cast, make_checkpoint, make_pro, random_tensor, tensor_shapes
from dequantize import read_weights
from lattices import FLOOR, WIDTHS, as_floats, int4_groups, pareto
from mobilellm_cpp.convert import ConversionReport, convert_checkpoint
from mobilellm_cpp.quant.lattice import float_holders, holders, recognise

from mobilellm_cpp import CheckpointError
from mobilellm_cpp.engine.gguf_file import open_gguf

BOUND = float(np.float32(0.004))
MATRICES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
HEADS = {"heads": 4, "kv_heads": 2}
SMALL = {"layers": 1, "hidden": 128, "ffn": 256, **HEADS}
BLOCK = "model.layers.0."

Stored = dict[str, np.ndarray]
Make = Callable[..., tuple[ConversionReport, dict[str, tuple[str, np.ndarray]], Stored]]


@functools.cache
def matrices(layers: int, hidden: int, heads: int, kv_heads: int, ffn: int) -> Stored:
    """Random projections of a model, float32."""
    shapes = tensor_shapes(layers, hidden, hidden, hidden // heads * kv_heads, ffn, 512, True)
    return {n: random_tensor(n, s, 0) for n, s in shapes.items() if n.endswith("_proj.weight")}


@pytest.fixture
def convert(tmp_path: Path) -> Make:
    """Converts a checkpoint of given projections: the report, the file's weights with the rows of
    q and k in the checkpoint's order, and the projections as stored, under the file's names."""

    def convert(
        tensors: Stored, *, dtype: str = "bf16", **options: Any
    ) -> tuple[ConversionReport, dict[str, tuple[str, np.ndarray]], Stored]:
        options = {**SMALL, "architecture": "LlamaForCausalLM", **options}
        folder = make_checkpoint(tmp_path / "m", dtype=dtype, tensors=tensors, **options)
        report = convert_checkpoint(folder, tmp_path / "m.gguf", type="exact")
        written = read_weights(report.path)
        half = options["hidden"] // options["heads"] // 2
        for name, (kind, values) in written.items():
            if name.endswith(("attn_q.weight", "attn_k.weight")):
                pairs = values.reshape(-1, half, 2, values.shape[1])
                written[name] = kind, pairs.swapaxes(1, 2).reshape(values.shape)
        stored = {}
        for name, array in tensors.items():
            for part, short in MATRICES.items():
                if part in name:
                    block = name.split(".")[2]
                    stored[f"blk.{block}.{short}.weight"] = as_floats(cast(array, dtype), dtype)
        return report, written, stored

    return convert


def compare(
    report: ConversionReport, written: dict[str, tuple[str, np.ndarray]], stored: Stored
) -> tuple[int, float]:
    """How many weights differ and by how much at most, which is also what the report says."""
    different, deviation = 0, 0.0
    for name, values in stored.items():
        got = written[name][1]
        off = got != values
        if off.any():
            different += int(off.sum())
            relative = np.abs(got[off] - values[off]) / np.abs(values[off])
            deviation = max(deviation, float(relative.max()))
    assert report.lattice is not None
    assert report.lattice.n_different == different
    assert report.lattice.deviation == pytest.approx(deviation, rel=1e-4)
    return different, deviation


def types(written: dict[str, tuple[str, np.ndarray]]) -> set[str]:
    """The types of the projections."""
    return {kind for name, (kind, values) in written.items() if len(values) > 1 and "blk" in name}


@pytest.mark.parametrize("part", ["attention", "ffn"])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("shape", PUBLISHED)
def test_paretoq(shape: str, width: str, part: str, convert: Make) -> None:
    """Every published width and shape, stored as BF16: one block, the other part made small."""
    options = {key: PUBLISHED[shape][key] for key in ("hidden", "heads", "kv_heads", "ffn")}
    options |= {"layers": 1, **({"ffn": 128} if part == "attention" else {"hidden": 64, **HEADS})}
    tensors = {n: pareto(a, WIDTHS[width]) for n, a in matrices(**options).items()}
    report, written, stored = convert(tensors, **options)
    assert len(stored) == 7
    different, deviation = compare(report, written, stored)
    assert report.lattice is not None and not report.lattice.off_lattice
    assert report.lattice.n_weights == sum(a.size for a in stored.values())
    assert written["token_embd.weight"][0] == "bf16"
    if width in ("1", "1.58"):
        assert different == 0
    else:  # BF16 has taken odd multiples off the lattice
        assert 0 < different < 0.25 * report.lattice.n_weights and 0 < deviation <= BOUND
    for name, array in stored.items():
        expected = "q2_0" if width in ("1", "1.58") else "q4_0"
        if width == "1" and array.shape[1] % 128 == 0 and array.all():
            expected = "q1_0"
        assert written[name][0] == expected


@pytest.mark.parametrize("dtype", ["bf16", "f16", "f32"])
@pytest.mark.parametrize("width", WIDTHS)
def test_every_weight_is_kept_where_the_format_can(width: str, dtype: str, convert: Make) -> None:
    """Scales of five bits, whose multiples all fit the stored type."""
    rng = np.random.default_rng(0)
    tensors = {}
    for name, array in matrices(**SMALL).items():
        alpha = rng.integers(16, 32, (len(array), 1)) * np.exp2(rng.integers(-12, -6, (1, 1)))
        tensors[name] = pareto(array, WIDTHS[width], alpha.astype(np.float32))
    report, written, stored = convert(tensors, dtype=dtype)
    if width == "1.58":  # 2/3 alpha has all the bits of the stored type
        tensors = {
            n: cast(a * np.float32(1.5), "f16").astype(np.float32) for n, a in tensors.items()
        }
        report, written, stored = convert(tensors, dtype=dtype)
    assert compare(report, written, stored) == (0, 0)
    assert types(written) == {{"1": "q1_0", "1.58": "q2_0"}.get(width, "q4_0")}


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize(("dtype", "bound"), [("bf16", BOUND), ("f16", 2**-10), ("f32", 2**-11)])
def test_scales_of_float32(width: str, dtype: str, bound: float, convert: Make) -> None:
    """A scale that was never rounded: FP16 cannot hold it, which is counted."""
    rng = np.random.default_rng(1)
    tensors = {}
    for name, array in matrices(**SMALL).items():
        alpha = np.exp(rng.uniform(-6, -1, (len(array), 1))).astype(np.float32)
        tensors[name] = pareto(array, WIDTHS[width], alpha)
    report, written, stored = convert(tensors, dtype=dtype)
    assert report.lattice is not None and not report.lattice.off_lattice
    different, deviation = compare(report, written, stored)
    assert deviation <= bound
    assert (different == 0) == (width in ("1", "1.58") and dtype != "f32")


@pytest.mark.parametrize("dtype", ["bf16", "f16", "f32"])
@pytest.mark.parametrize("width", WIDTHS)
def test_scales_at_the_floor(width: str, dtype: str, convert: Make) -> None:
    """Rows that training has switched off: their step is subnormal in FP16. So are some above."""
    tensors = {}
    for name, array in matrices(**SMALL).items():
        alpha = np.full((len(array), 1), FLOOR)
        alpha[::3] = 1e-7
        alpha[1::3] = np.linspace(4e-5, 7e-5, len(alpha[1::3]), dtype=np.float32)[:, None]
        alpha = as_floats(cast(alpha, dtype), dtype)
        tensors[name] = pareto(array * alpha * np.float32(20), WIDTHS[width], alpha)
    report, written, stored = convert(tensors, dtype=dtype)
    assert report.lattice is not None and not report.lattice.off_lattice
    assert compare(report, written, stored)[1] <= BOUND
    assert all(values.any() for _, values in written.values())


def test_rows_that_show_less_than_their_tensor(convert: Make) -> None:
    """Zeros, negative zeros, ternary rows without zero, rows of a few levels: one type for all."""
    rng = np.random.default_rng(2)
    alpha = as_floats(cast(np.float32(0.0173) + np.zeros((256, 1), np.float32), "bf16"), "bf16")
    signs = rng.choice(np.float32([-1, 1]), (256, 128))
    tensors = dict(matrices(**SMALL))
    for name in tensors:
        tensors[name] = pareto(tensors[name], 3)

    one_bit = signs * alpha
    one_bit[7] = 0  # held by d = 0
    one_bit[9] = -0.0
    ternary = signs * alpha  # all rows but one look like one bit
    ternary[100, ::3] = 0
    few = np.clip(np.rint(rng.normal(0, 2, (128, 256))), -4, 3).astype(np.float32)
    few[0] = 0
    few[1] = 3
    few[2] = np.where(few[2] > 0, 3, -4)
    few[3] = np.where(few[3] > 0, 2, 0)
    few[4] = np.where(few[4] > 0, 3, -2)
    few[5, 1:] = 0
    one_zero = signs[:64] * alpha[:64]  # the sign of a zero weight is zero
    one_zero[63, 127] = 0
    tensors |= {
        BLOCK + "mlp.gate_proj.weight": one_bit,
        BLOCK + "mlp.up_proj.weight": ternary,
        BLOCK + "mlp.down_proj.weight": few * alpha[:128],
        BLOCK + "self_attn.v_proj.weight": one_zero,
    }
    report, written, stored = convert(tensors)
    assert compare(report, written, stored)[1] <= BOUND
    for name, kind in [("ffn_gate", "q1_0"), ("ffn_up", "q2_0"), ("ffn_down", "q4_0")]:
        assert written[f"blk.0.{name}.weight"][0] == kind
    assert written["blk.0.attn_v.weight"][0] == "q2_0"
    for name in ("ffn_gate", "ffn_up", "attn_v"):
        assert np.array_equal(written[f"blk.0.{name}.weight"][1], stored[f"blk.0.{name}.weight"])
    # rows of one magnitude, or of two that BF16 holds, are exact whatever their k was
    down = "blk.0.ffn_down.weight"
    for row in (0, 1, 3, 5):
        assert np.array_equal(written[down][1][row], stored[down][row])


@pytest.mark.parametrize("size", [32, 64, 128])
def test_int4_groups(size: int, convert: Make) -> None:
    tensors = {n: a.copy() for n, a in matrices(**SMALL).items()}
    for array in tensors.values():
        array[3] = 0  # scales of zero
        array[4, :size] = 0
    tensors = {n: int4_groups(a, size) for n, a in tensors.items()}
    report, written, stored = convert(tensors)
    different, deviation = compare(report, written, stored)
    assert report.lattice is not None
    assert 0 < different < 0.25 * report.lattice.n_weights and 0 < deviation <= BOUND
    assert types(written) == {"q4_0"}

    coarse = {n: int4_groups(a, size) for n, a in stored_scales(tensors, size).items()}
    report, written, stored = convert(coarse)
    assert compare(report, written, stored) == (0, 0)


def stored_scales(tensors: Stored, size: int) -> Stored:
    """The same codes with scales that are powers of two."""
    coarse = {}
    for name, array in tensors.items():
        groups = array.reshape(-1, size)
        largest = np.abs(groups).max(axis=1, keepdims=True)
        power = np.exp2(np.floor(np.log2(np.where(largest > 0, largest, 1))))
        coarse[name] = (
            (groups / np.where(largest > 0, largest, 1) * power * 7.5 / 8)
            .astype(np.float32)
            .reshape(array.shape)
        )
    return coarse


def test_codes_up_to_8_take_a_negative_scale(convert: Make) -> None:
    rng = np.random.default_rng(3)
    tensors = {}
    for name, array in matrices(**SMALL).items():
        codes = rng.integers(-7, 9, array.shape).astype(np.float32)
        codes[1] = rng.integers(-2, 2, array.shape[1])
        tensors[name] = codes * np.float32(0.0078125)
    report, written, stored = convert(tensors)
    assert compare(report, written, stored) == (0, 0) and types(written) == {"q4_0"}


@pytest.mark.parametrize(("hidden", "kind"), [(64, "q2_0"), (96, "q4_0")])
def test_rows_choose_the_largest_block_that_divides_them(
    hidden: int, kind: str, convert: Make
) -> None:
    options = {**SMALL, "hidden": hidden, "ffn": hidden}
    tensors = {n: pareto(a, 1) for n, a in matrices(**options).items()}
    report, written, stored = convert(tensors, **options)
    assert compare(report, written, stored) == (0, 0) and types(written) == {kind}


def off_by_one(array: np.ndarray) -> np.ndarray:
    array = array.copy()
    array[-1, -1] *= np.float32(1.02)
    return array


def two_levels(array: np.ndarray) -> np.ndarray:
    """Levels of float32 that no rounding has made: 1 and 2.006."""
    levels = np.float32([-2.0061234, -1.00012345, 1.00012345, 2.0061234])
    return levels[np.random.default_rng(4).integers(0, 4, array.shape)]


def test_pro(tmp_path: Path) -> None:
    """Its int4 checkpoint: groups of 32; the rows of q and k stay in their order."""
    tensors = {}
    for name, array in matrices(3, 128, 4, 2, 192).items():
        tensors[name.replace(".mlp.", ".feed_forward.")] = int4_groups(array)
    report = convert_checkpoint(
        make_pro(tmp_path / "m", tensors=tensors), tmp_path / "m.gguf", type="exact"
    )
    written = read_weights(report.path)
    stored = {
        f"blk.{name.split('.')[2]}.{MATRICES[part]}.weight": as_floats(cast(array, "bf16"), "bf16")
        for name, array in tensors.items()
        for part in [name.split(".", 3)[3].removesuffix(".weight").replace("feed_forward", "mlp")]
    }
    assert len(stored) == 21 and types(written) == {"q4_0"}
    assert 0 < compare(report, written, stored)[1] <= BOUND


@pytest.mark.parametrize(
    ("change", "dtype"),
    [
        (lambda array: random_tensor("x", array.shape, 9), "bf16"),
        (lambda array: random_tensor("x", array.shape, 9), "f16"),
        (lambda array: random_tensor("x", array.shape, 9), "f32"),
        (off_by_one, "bf16"),
        (lambda array: array * np.float32(1e7), "bf16"),  # no FP16 holds the scale
        (lambda array: array * np.float32(1e-9), "bf16"),
        (two_levels, "f32"),
        (lambda array: np.float32(np.arange(array.size).reshape(array.shape) % 17 - 8), "bf16"),
    ],
)
def test_no_tensor_is_forced(
    change: Callable[[np.ndarray], np.ndarray], dtype: str, convert: Make
) -> None:
    """A matrix on no lattice is written as it is, and named; the others keep theirs."""
    tensors = {n: pareto(a, 4) for n, a in matrices(**SMALL).items()}
    name = BLOCK + "mlp.up_proj.weight"
    tensors[name] = np.float32(change(tensors[name]))
    report, written, stored = convert(tensors, dtype=dtype)
    assert report.lattice is not None
    assert report.lattice.off_lattice == ("blk.0.ffn_up.weight",)
    assert any("blk.0.ffn_up.weight" in note for note in report.notes)
    kind, values = written["blk.0.ffn_up.weight"]
    assert kind in ("bf16", "f16", "f32")
    assert np.array_equal(values, stored["blk.0.ffn_up.weight"])
    assert compare(report, written, stored)[1] <= BOUND
    assert types(written) == {"q4_0", kind}


@pytest.mark.parametrize("dtype", ["bf16", "f16", "f32"])
def test_against_a_search_over_all_steps(dtype: str) -> None:
    """On lattices with any codes and scales the step is one that changes the fewest weights of all
    that FP16 has, and none is found only where there is none."""
    rng = np.random.default_rng(6)
    found = 0
    for _ in range(12):
        low, high = -rng.integers(0, 9, (40, 1)), rng.integers(1, 9, (40, 1))
        codes = np.rint(rng.uniform(low - 0.5, high + 0.5, (40, 96))).clip(low, high)
        values = cast(np.float32(codes * np.exp(rng.uniform(-10, 3, (40, 1)))), dtype)
        lattice = recognise(values.view(np.uint32 if dtype == "f32" else np.uint16), dtype.upper())
        for i, row in enumerate(as_floats(values, dtype)):
            fewest = fewest_changes(row)
            assert lattice.found[i] == (fewest is not None)
            assert fewest is None or lattice.changed[i] == fewest
            found += fewest is not None
    assert found > 460


def fewest_changes(row: np.ndarray) -> int | None:
    """The least number of weights that any FP16 step changes without leaving the bound."""
    steps = np.arange(1, 0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)[:, None]
    levels, counts = np.unique(np.abs(row[row != 0]), return_counts=True)
    steps = steps[(steps[:, 0] > levels[-1] / 8.1) & (steps[:, 0] < levels[-1] * 1.01)]
    codes = np.rint(levels / steps)
    held = (np.abs(codes * steps - levels) <= BOUND * levels).all(axis=1) & (codes <= 8).all(axis=1)
    changed = ((codes * steps != levels) * counts).sum(axis=1)[held]
    return int(changed.min()) if changed.size else None


@pytest.mark.parametrize("scale", [3e38, 65504, 1e-38, 1e-42, 1e-45])
def test_numbers_at_the_ends_of_the_range(scale: float) -> None:
    """No warnings, and only what FP16 can scale."""
    rng = np.random.default_rng(7)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for most in (1, 7, 1000):
            values = np.float32(rng.integers(-most, most + 1, (8, 64)) / most * scale)
            able = holders(values.view(np.uint32), "F32")
            assert bool(able) == (scale == 65504 and most < 1000)
            float_holders(values.view(np.uint32), "F32")


@pytest.mark.parametrize(
    ("dtype", "through", "kind"),
    [
        ("bf16", "bf16", "bf16"),
        ("f16", "f16", "f16"),
        ("f32", "bf16", "bf16"),
        ("f32", "f16", "f16"),
        ("f32", "f32", "f32"),
    ],
)
def test_embedding_and_head_stay_floats(dtype: str, through: str, kind: str, convert: Make) -> None:
    """In the shortest float type that is exact, even where they are on a lattice."""
    rng = np.random.default_rng(5)
    embedding = rng.standard_normal((512, 128), dtype=np.float32)
    tensors = {n: pareto(a, 0) for n, a in matrices(**SMALL).items()}
    tensors["model.embed_tokens.weight"] = as_floats(cast(embedding, through), through)
    tensors["lm_head.weight"] = pareto(embedding[::-1], 1)
    report, written, _ = convert(tensors, dtype=dtype, tied=False)
    assert written["token_embd.weight"][0] == kind
    assert np.array_equal(written["token_embd.weight"][1], tensors["model.embed_tokens.weight"])
    assert written["output.weight"][0] in ("bf16", "f16")
    stored_head = as_floats(cast(tensors["lm_head.weight"], dtype), dtype)
    assert np.array_equal(written["output.weight"][1], stored_head)
    assert report.lattice is not None and not report.lattice.off_lattice


@pytest.mark.parametrize("container", ["bin", "sharded"])
def test_containers_and_layer_sharing(container: str, convert: Make) -> None:
    options = {**SMALL, "layers": 2}
    tensors = {n: pareto(a, 0) for n, a in matrices(**options).items()}
    report, written, stored = convert(
        tensors, **options, container=container, architecture="MobileLLMForCausalLM", sharing=True
    )
    assert report.schedule == (0, 0, 1, 1) and len(stored) == 14
    assert compare(report, written, stored) == (0, 0) and types(written) == {"q2_0"}


def test_file_type(convert: Make) -> None:
    """That of the type which holds the most weights, as llama.cpp numbers them."""
    for bits, file_type in [(1, 40), (0, 41), (3, 2)]:
        report, _, _ = convert({n: pareto(a, bits) for n, a in matrices(**SMALL).items()})
        with open_gguf(report.path) as file:
            assert file.get("general.file_type") == file_type


def test_refused_where_nothing_is_on_a_lattice(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "m", **SMALL)
    with pytest.raises(CheckpointError, match="no matrix is on a lattice.*use type f16"):
        convert_checkpoint(folder, tmp_path / "m.gguf", type="exact")
    assert not (tmp_path / "m.gguf").exists()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["model.embed_tokens.weight", BLOCK + "mlp.down_proj.weight"])
def test_no_number_is_refused(name: str, value: float, tmp_path: Path) -> None:
    tensors = {n: pareto(a, 0) for n, a in matrices(**SMALL).items()}
    tensors.setdefault(name, random_tensor(name, (512, 128), 0))
    tensors[name] = tensors[name].copy()
    tensors[name][77, 5] = value
    folder = make_checkpoint(tmp_path / "m", tensors=tensors, **SMALL)
    with pytest.raises(CheckpointError, match=rf"{name} holds -?(nan|inf) at \[77, 5\]"):
        convert_checkpoint(folder, tmp_path / "m.gguf", type="exact")


def test_progress(tmp_path: Path) -> None:
    """Once through the search, once through the writing."""
    tensors = {n: pareto(a, 0) for n, a in matrices(**SMALL).items()}
    folder = make_checkpoint(tmp_path / "m", tensors=tensors, **SMALL)
    calls: list[tuple[int, int, str]] = []
    convert_checkpoint(
        folder, tmp_path / "m.gguf", type="exact", progress=lambda *call: calls.append(call)
    )
    totals = [*dict.fromkeys(total for _, total, _ in calls)]
    assert len(totals) == 2
    for total in totals:
        done = [done for done, of, _ in calls if of == total]
        assert done == sorted(done) and done[-1] == total
