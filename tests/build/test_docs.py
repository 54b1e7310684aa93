"""What the documents claim about files and commands."""

import re
from pathlib import Path

from checkpoints import make_checkpoint

from mobilellm_cpp import convert_checkpoint

ROOT = Path(__file__).resolve().parents[2]


def test_the_bytes_in_gguf_md_stand_in_a_converted_file(tmp_path):
    text = (ROOT / "docs" / "gguf.md").read_text()
    block = text.split("## Byte for byte")[1].split("```")[1]
    digits = [
        re.match(r"(?:[0-9a-f]{2} )+|(?:[0-9a-f]{2} ?)+", line) for line in block.splitlines()
    ]
    wanted = bytes.fromhex("".join(match[0] for match in digits if match))
    assert len(wanted) == 64
    make_checkpoint(tmp_path / "c", layers=2, sharing=True)
    convert_checkpoint(tmp_path / "c", tmp_path / "m.gguf")
    assert wanted in (tmp_path / "m.gguf").read_bytes()


def test_no_document_names_a_missing_file():
    for document in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for path in re.findall(r"\]\((?!http)([^)#]+)\)", document.read_text()):
            assert (document.parent / path).exists(), f"{document.name} links to {path}"
