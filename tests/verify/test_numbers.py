"""Numbers that are not finite fail, and exact files are held to what exact means."""

import json

import numpy as np
import pytest
import typer
from checkpoints import make_checkpoint, random_tensor, tensor_shapes
from gguf import GGMLQuantizationType, GGUFReader, dequantize, quantize
from gguf_edit import rewrite
from lattices import pareto

from mobilellm_cpp import convert_checkpoint, verify
from mobilellm_cpp.cli.common import print_json
from mobilellm_cpp.cli.verify import verify as verify_command
from mobilellm_cpp.inspection.verification import NOISE_FACTOR, compare_graph

SHAPE = {"layers": 3, "hidden": 128, "ffn": 192, "heads": 4, "kv_heads": 2}
SHAPES = tensor_shapes(3, 128, 128, 64, 192, 512, True)


def large(folder, factor):
    """A checkpoint whose second block makes activations that are larger by `factor`."""
    names = [f"model.layers.1.mlp.{name}_proj.weight" for name in ("up", "gate")]
    tensors = {n: random_tensor(n, SHAPES[n], 0) * np.float32(factor**0.5) for n in names}
    return make_checkpoint(folder, dtype="f32", tensors=tensors, **SHAPE)


def parsed(text):
    """JSON as the standard has it: without the words that Python adds."""

    def refuse(word):
        raise AssertionError(word)

    return json.loads(text, parse_constant=refuse)


@pytest.mark.parametrize("kind", ["f16", "q8_0", "q4_0"])
def test_activations_that_overflow_when_they_are_rounded(kind, tmp_path, capsys):
    """As f16, or as the f16 scale of a block, they are infinite."""
    for factor, right in ((1e2, True), (1e8, False)):
        checkpoint = large(tmp_path / f"{factor:g}", factor)
        path = convert_checkpoint(checkpoint, tmp_path / "m.gguf", type=kind).path
        found = verify(path, checkpoint, n_threads=1)
        assert found.ok is right, found.failures
    assert any("not finite numbers" in text or "no logits" in text for text in found.failures)
    with pytest.raises(typer.Exit):
        verify_command(str(path), str(checkpoint), as_json=True, threads=1)
    answer = parsed(capsys.readouterr().out)
    assert answer["ok"] is False and answer["failures"] == found.failures
    assert answer["graph"] is None or answer["graph"]["noise"] is None


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["blk.1.ffn_up.weight", "blk.1.ffn_norm.weight"])
def test_a_weight_that_is_no_number_is_named(bad, name, tmp_path):
    checkpoint = make_checkpoint(tmp_path / "c", dtype="f32", **SHAPE)
    path = convert_checkpoint(checkpoint, tmp_path / "m.gguf", type="f32").path
    (tensor,) = [t for t in GGUFReader(path).tensors if t.name == name]
    data = np.array(tensor.data)
    data.flat[5] = bad
    wrong = rewrite(path, tmp_path / "w.gguf", None, {name: data})
    found = verify(wrong, checkpoint, n_threads=1)
    assert any(text.startswith(f"{name} is not the checkpoint's: 1") for text in found.failures)
    assert [t.max_error for t in found.tensors if t.outside] == [np.inf]


def test_what_is_not_finite_is_no_agreement():
    rng = np.random.default_rng(0)
    exact = rng.standard_normal((64, 50)).astype(np.float32)
    near = exact + np.float32(0.01) * rng.standard_normal((64, 50)).astype(np.float32)
    assert compare_graph(exact, near, near).ratio <= NOISE_FACTOR
    for bad in (np.nan, np.inf, -np.inf):
        for place in range(3):
            logits = [exact.copy(), near.copy(), near.copy()]
            logits[place][40, 3] = bad
            assert not compare_graph(*logits).ratio <= NOISE_FACTOR or place == 1
    zeros = np.zeros_like(exact)
    assert compare_graph(zeros, zeros, zeros).ratio == 0
    assert not compare_graph(zeros, zeros, near).ratio <= NOISE_FACTOR


def test_json_has_no_words_of_pythons(capsys):
    print_json({"a": [1.5, float("nan")], "b": {"c": (float("inf"), -float("inf"), None, "NaN")}})
    assert parsed(capsys.readouterr().out) == {
        "a": [1.5, None],
        "b": {"c": [None, None, None, "NaN"]},
    }


def lattice(folder, bits=2, **options):
    """Projections on ParetoQ's lattice; an embedding that only float32 holds."""
    tensors = {n: pareto(random_tensor(n, SHAPES[n], 0), bits) for n in SHAPES if "_proj" in n}
    return make_checkpoint(folder, dtype="f32", tensors=tensors, **SHAPE, **options)


def tensor_of(path, name):
    (tensor,) = [tensor for tensor in GGUFReader(path).tensors if tensor.name == name]
    return np.array(tensor.data), tensor.tensor_type


@pytest.mark.parametrize("options", [{}, {"sharing": True}, {"portable": True}])
def test_exact_files_say_so(options, tmp_path):
    portable = options.pop("portable", False)
    checkpoint = lattice(tmp_path / "c", **options)
    for kind in ("exact", "q4_0"):
        path = tmp_path / f"{kind}.gguf"
        convert_checkpoint(checkpoint, path, type=kind, portable=portable)
        field = GGUFReader(path).fields.get("mobilellm.exact")
        assert (field is not None and field.contents() is True) is (kind == "exact")
        found = verify(path, checkpoint, n_threads=1)
        assert found.ok, found.failures


def test_exact_files_are_held_to_what_exact_means(tmp_path):
    """Errors that rounding to Q4_0 or F16 would excuse."""
    checkpoint = lattice(tmp_path / "c")
    path = convert_checkpoint(checkpoint, tmp_path / "m.gguf", type="exact").path
    name = "blk.1.ffn_down.weight"
    data, kind = tensor_of(path, name)
    assert kind == GGMLQuantizationType.Q4_0
    scaled = data.copy().reshape(-1, 18)
    scaled[:, :2] = (scaled[:, :2].copy().view(np.float16) * np.float16(1.02)).view(np.uint8)
    weights = dequantize(data, kind)
    rounded = quantize(weights, GGMLQuantizationType.Q4_0)
    embedding, _ = tensor_of(path, "token_embd.weight")
    assert embedding.dtype == np.float32
    for wrong in (
        {name: (scaled.reshape(data.shape), kind)},
        {name: (rounded, kind)},
        {"token_embd.weight": embedding.astype(np.float16)},
    ):
        (at,) = wrong
        file = rewrite(path, tmp_path / "w.gguf", None, wrong)
        (failure,) = verify(file, checkpoint, n_threads=1).failures
        assert failure.startswith(f"{at} is not the checkpoint's")
        file = rewrite(path, tmp_path / "w.gguf", {"mobilellm.exact": None}, wrong)
        assert verify(file, checkpoint, n_threads=1).ok
