"""Plain Llama files equal those of llama.cpp's own converter, byte for byte."""

from __future__ import annotations

from pathlib import Path

import pytest
from gguf import GGUFReader
from mobilellm_cpp.convert import convert_checkpoint
from peer import assert_same_tensors

NAMES = ("tied-bf16", "untied", "odd-rows-v1", "Padded-Vocab")
LABELS = {f"general.{k}" for k in ("size_label", "basename", "version", "finetune")}


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16", "q8_0"])
@pytest.mark.parametrize("name", NAMES)
def test_same_file(
    name: str,
    kind: str,
    upstream: dict[tuple[str, str], tuple[Path, Path]],
    tmp_path: Path,
) -> None:
    folder, theirs_path = upstream[name, kind]
    report = convert_checkpoint(folder, tmp_path / "ours.gguf", type=kind)
    ours, theirs = GGUFReader(report.path), GGUFReader(theirs_path)

    own, other = metadata(ours), metadata(theirs)
    assert {key: own[key] for key in own if key in other} == {
        key: other[key] for key in other if key in own
    }
    assert set(other) - set(own) <= LABELS

    assert_same_tensors(ours, theirs)
    assert report.n_params == sum(int(tensor.n_elements) for tensor in theirs.tensors)


def metadata(reader: GGUFReader) -> dict[str, tuple[object, object]]:
    """Key to value types and value."""
    fields = reader.fields.values()
    return {f.name: (f.types, f.contents()) for f in fields if not f.name.startswith("GGUF.")}
