"""A .bin file never runs code, and an old one is not even opened."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import make_checkpoint
from mobilellm_cpp.convert import convert_checkpoint

from mobilellm_cpp.errors import CheckpointError


class Evil:
    """Unpickling it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "m", container="bin") / "pytorch_model.bin"


def refusal(weights: Path, out: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        convert_checkpoint(weights.parent, out)
    message = str(caught.value)
    assert str(weights) in message and "\n" not in message and message.endswith(".")
    return message


def test_malicious_pickle(weights: Path, tmp_path: Path, untouched: Path) -> None:
    state = torch.load(weights)
    torch.save({**state, "evil": Evil(tmp_path / "ran")}, weights)
    assert "system" in refusal(weights, untouched)
    weights.write_bytes(pickle.dumps(Evil(tmp_path / "ran")))
    refusal(weights, untouched)
    assert not (tmp_path / "ran").exists()


def test_old_format(weights: Path, untouched: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = torch.load(weights)
    torch.save(state, weights, _use_new_zipfile_serialization=False)
    monkeypatch.setattr(torch, "load", lambda *args, **options: pytest.fail("torch opened it"))
    message = refusal(weights, untouched)
    assert "torch.save" in message and "zip" in message


def test_without_torch(weights: Path, untouched: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    assert "mobilellm-cpp[torch]" in refusal(weights, untouched)


def test_safetensors_need_no_torch(tmp_path: Path) -> None:
    """Importing the package takes neither torch nor the hub, converting BF16 no torch."""
    folder = make_checkpoint(tmp_path / "m", dtype="bf16")
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from mobilellm_cpp.convert import convert_checkpoint\n"
        "heavy = {'huggingface_hub', 'transformers'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        f"convert_checkpoint({str(folder)!r}, 'm.gguf', type='q4_0')"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    convert_checkpoint(folder, tmp_path / "here.gguf", type="q4_0")
    assert (tmp_path / "m.gguf").read_bytes() == (tmp_path / "here.gguf").read_bytes()


def test_truncated(weights: Path, untouched: Path) -> None:
    whole = weights.read_bytes()
    for size in (0, 4, len(whole) // 2, len(whole) - 1):
        weights.write_bytes(whole[:size])
        refusal(weights, untouched)


@pytest.mark.parametrize(
    "state", [[torch.zeros(2)], torch.zeros(2), {"model": {"a": torch.zeros(2)}}, {3: 4}]
)
def test_not_a_dict_of_tensors(state: Any, weights: Path, untouched: Path) -> None:
    torch.save(state, weights)
    refusal(weights, untouched)


def test_strides(weights: Path, tmp_path: Path) -> None:
    """Transposed and overlapping tensors convert as what they show."""
    state = torch.load(weights)
    plain = convert_checkpoint(weights.parent, tmp_path / "plain.gguf").path.read_bytes()
    state = {k: v.T.contiguous().T if v.ndim == 2 else v for k, v in state.items()}
    name = "model.layers.0.mlp.up_proj.weight"
    pad = torch.zeros(130, 70, dtype=torch.bfloat16)
    pad[1:129, 3:67] = state[name]
    state[name] = pad[1:129, 3:67]
    assert not state[name].is_contiguous()
    torch.save(state, weights)
    assert convert_checkpoint(weights.parent, tmp_path / "t.gguf").path.read_bytes() == plain


def test_sparse_tensor(weights: Path, untouched: Path) -> None:
    state = torch.load(weights)
    name = "model.layers.0.mlp.up_proj.weight"
    state[name] = torch.from_numpy(np.eye(128, 64, dtype=np.float32)).to_sparse()
    torch.save(state, weights)
    assert name in refusal(weights, untouched)


def rebuilt(weights: Path, pickled: bytes, compression: int = zipfile.ZIP_STORED) -> None:
    """The same archive with another pickle."""
    with zipfile.ZipFile(weights) as archive:
        files = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(weights, "w", compression) as archive:
        for name, content in files.items():
            archive.writestr(name, pickled if name.endswith("data.pkl") else content)


NESTED = b"".join(b"q%ch%c\x86" % (i, i) for i in range(60))  # a pair of the pair before
BOMBS = {
    "a key of 2^60 parts": (b"\x80\x02}K\x01\x85" + NESTED + b"K\x01s.", "refers to a tuple twice"),
    "terabytes in one call": (
        b"\x80\x02c__builtin__\nbytearray\n\x8a\x05" + (2**39).to_bytes(5, "little") + b"\x85R.",
        "it would call __builtin__.bytearray",
    ),
    "a tensor from nothing": (
        b"\x80\x02ctorch\nTensor\nJ\xff\xff\xff\x7f\x85R.",
        "it would call torch.Tensor",
    ),
    "a long pickle": (b"\x80\x02]" + b"]0" * 2_000_000 + b".", "describes its tensors in"),
    "no end": (b"\x80\x02}", "cannot be read"),
    "no pickle": (b"<html>", "cannot be read"),
}  # fmt: skip


@pytest.mark.parametrize("name", BOMBS)
def test_bombs(name: str, weights: Path, untouched: Path) -> None:
    pickled, sentence = BOMBS[name]
    rebuilt(weights, pickled)
    assert sentence in refusal(weights, untouched)


def test_compressed(weights: Path, untouched: Path) -> None:
    rebuilt(weights, b"\x80\x02}" + b"]0" * 50_000_000 + b".", zipfile.ZIP_DEFLATED)
    assert weights.stat().st_size < 1_000_000
    assert "is compressed" in refusal(weights, untouched)
