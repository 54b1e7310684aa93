"""Files of type exact run: the logits of the same weights as floats, up to the rounding of
activations to 8 bits, which the float file does not have; portable ones run on stock llama.cpp."""

from pathlib import Path

import numpy as np
import pytest
from checkpoints import make_checkpoint, random_tensor, tensor_shapes
from lattices import WIDTHS, int4_groups, pareto
from peer import greedy

from mobilellm_cpp import MobileLLM, convert_checkpoint
from mobilellm_cpp.engine import library

# Rows of 192 do not divide by 128; those of 256 do.
WIDE = {"layers": 2, "hidden": 256, "heads": 4, "kv_heads": 2, "ffn": 512}
NARROW = {"layers": 2, "hidden": 192, "heads": 3, "kv_heads": 1, "ffn": 320}
BOUND = 0.08  # of the largest logit; twice the largest measured


def quantize(array: np.ndarray, width: str) -> np.ndarray:
    return int4_groups(array) if width == "int4" else pareto(array, WIDTHS[width])


def checkpoint(folder: Path, width: str, options: dict[str, int], sharing: bool) -> Path:
    hidden, heads = options["hidden"], options["heads"]
    kv_rows = hidden // heads * options["kv_heads"]
    shapes = tensor_shapes(2, hidden, hidden, kv_rows, options["ffn"], 512, True)
    tensors = {
        name: quantize(random_tensor(name, size, 0), width)
        for name, size in shapes.items()
        if name.endswith("_proj.weight")
    }
    return make_checkpoint(folder, tensors=tensors, sharing=sharing, **options)


@pytest.mark.parametrize(
    ("width", "shape", "sharing"),
    [
        *((width, shape, False) for width in WIDTHS for shape in ("wide", "narrow")),
        ("1", "wide", True),
        ("1.58", "narrow", True),
        ("int4", "narrow", False),
    ],
)
def test_logits(width: str, shape: str, sharing: bool, tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "m", width, WIDE if shape == "wide" else NARROW, sharing)
    tokens = np.random.default_rng(0).integers(3, 512, 48).tolist()

    def logits(kind: str) -> np.ndarray:
        path = convert_checkpoint(folder, tmp_path / f"{kind}.gguf", type=kind).path
        return MobileLLM(path, n_ctx=64, n_threads=1).logits(tokens)

    exact, floats = logits("exact"), logits("f32")
    assert 0 < np.abs(exact - floats).max() <= BOUND * np.abs(floats).max()


@pytest.mark.parametrize(("width", "options"), [("1", WIDE), ("1.58", NARROW), ("4", NARROW)])
def test_portable(
    width: str,
    options: dict[str, int],
    tmp_path: Path,
    stock_lib: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Stock llama.cpp says the same from the file with blocks written out twice."""
    monkeypatch.setenv("MOBILELLM_KERNELS", "0")
    folder = checkpoint(tmp_path / "m", width, options, sharing=True)
    own = convert_checkpoint(folder, tmp_path / "own.gguf", type="exact")
    portable = convert_checkpoint(folder, tmp_path / "p.gguf", type="exact", portable=True)
    assert (own.architecture, portable.architecture) == ("mobilellm", "llama")
    assert portable.lattice.n_weights == 2 * own.lattice.n_weights
    prompts = [[1, 5, 9, 30], [1, 400, 3]]
    assert greedy(stock_lib, portable.path, prompts) == greedy(
        library.FOLDER, portable.path, prompts
    )
