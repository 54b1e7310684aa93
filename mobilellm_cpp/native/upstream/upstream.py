"""Brings the pinned llama.cpp into a build: fetch, check, unpack, patch. Called by CMake and make.

    python upstream.py fetch                        the pristine source, whole, in the cache
    python upstream.py prepare DEST [--from DIR]    only what libllama needs, with patches/ in

fetch prints where the source lies. Both may run twice: what is already done is not done again. A
failure is one sentence on stderr and exit code 1. Needs only the standard library and pip (no git,
no patch program). The cache is $MOBILELLM_BUILD_CACHE, by default ~/.cache/mobilellm-cpp-build.
"""

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
PATCHES = sorted((HERE / "patches").glob("*.patch"))
# What CMake reads when only ggml and libllama are built.
NEEDED = ("CMakeLists.txt", "LICENSE", "cmake", "ggml", "include", "src", "vendor")


class UpstreamError(Exception):
    """A failure whose message tells the user what to do."""


def pin() -> tuple[str, str]:
    """(version, sha256) of the pinned sdist."""
    found = dict(re.findall(r'^(\w+) = "([^"]+)"', (HERE / "llama_cpp.toml").read_text(), re.M))
    return found["version"], found["sha256"]


def cache_dir() -> Path:
    """Where downloads and the stock build are kept between checkouts."""
    if own := os.environ.get("MOBILELLM_BUILD_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mobilellm-cpp-build"


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def download() -> Path:
    """The sdist in the cache, downloaded with pip (so mirrors and proxies work) and checked."""
    version, sha256 = pin()
    cache = cache_dir()
    sdist = cache / f"llama_cpp_python-{version}.tar.gz"
    if sdist.exists() and sha256_of(sdist) == sha256:
        return sdist
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as tmp:
        # With a hash pip checks the archive before it runs the build backend in it for metadata.
        wanted = Path(tmp) / "requirements.txt"
        wanted.write_text(f"llama-cpp-python=={version} --hash=sha256:{sha256}\n")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--no-binary", "llama-cpp-python", "--dest", tmp, "--requirement", str(wanted)]
        env = {**os.environ, "CMAKE_ARGS": "-DLLAMA_BUILD=OFF"}
        done = subprocess.run(command, capture_output=True, text=True, env=env)
        fetched = Path(tmp) / sdist.name
        if "DO NOT MATCH THE HASHES" in done.stderr:
            raise UpstreamError(
                f"the package index has a {sdist.name} whose sha256 is not {sha256}: "
                f"do not use it; try another index"
            )
        if done.returncode != 0 or not fetched.exists():
            reason = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
            raise UpstreamError(
                f"llama-cpp-python {version} could not be downloaded ({reason}): check the "
                f"network, or give an unpacked llama.cpp with CMAKE_ARGS=-DLLAMA_CPP_DIR=DIR"
            )
        os.replace(fetched, sdist)
    return sdist


def fetch() -> Path:
    """The folder with vendor/llama.cpp of the pinned sdist; it appears whole or not at all."""
    version, sha256 = pin()
    dest = cache_dir() / f"llama.cpp-{version}-{sha256[:12]}"
    if dest.exists():
        return dest
    sdist = download()
    with tempfile.TemporaryDirectory(dir=dest.parent) as tmp:
        with tarfile.open(sdist) as tar:
            if hasattr(tarfile, "data_filter"):
                tar.extractall(tmp, filter="data")
            else:
                tar.extractall(tmp)  # the sha256 is checked, so the paths are known
        (vendored,) = Path(tmp).glob("*/vendor/llama.cpp")
        try:
            os.replace(vendored, dest)
        except OSError:
            if not dest.exists():  # else another build was faster
                raise
    return dest


def _sections(patch: Path) -> list[str]:
    """The files of a unified diff, each from its +++ line on."""
    return re.split(r"^--- .*\n(?=\+\+\+ b/)", patch.read_text(), flags=re.M)[1:]


def apply_patches(tree: Path) -> None:
    """Applies the patches, unified diffs whose hunks are found by their text, to tree. A hunk that
    is already in is left alone; all hunks are found before any file is written, so a failure leaves
    the tree as it was."""
    texts: dict[Path, str] = {}
    for patch, section in [(p, section) for p in PATCHES for section in _sections(p)]:
        path = tree / section.split()[1].removeprefix("b/")
        text = texts.get(path) or (path.read_text(encoding="utf-8") if path.exists() else "")
        for hunk in re.split(r"^@@.*@@.*\n", section, flags=re.M)[1:]:
            lines = hunk.splitlines(keepends=True)
            old = "".join(line[1:] for line in lines if line[0] in " -")
            new = "".join(line[1:] for line in lines if line[0] in " +")
            if text.count(new) == 1:
                continue
            if text.count(old) != 1:
                raise UpstreamError(
                    f"{patch.name} does not fit {path}: this llama.cpp is not the pinned one; "
                    f"use the version in llama_cpp.toml, or regenerate the patch as "
                    f"docs/architecture.md describes"
                )
            text = text.replace(old, new)
        texts[path] = text
    for path, text in texts.items():
        if path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")


def _state(source: Path) -> str:
    """What tells a source folder from itself after a change: names, sizes and times."""
    files = sorted(p for name in NEEDED for p in [source / name, *(source / name).rglob("*")])
    stats = [(str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in files if p.is_file()]
    return hashlib.sha256(repr(stats).encode()).hexdigest()


def prepare(dest: Path, source: Path | None) -> None:
    """Puts a patched copy of the parts that libllama needs at dest. The source is never changed."""
    stamp = dest / ".prepared"
    state = _state(source) if source else pin()[1]
    wanted = f"{state}\n{hashlib.sha256(b''.join(p.read_bytes() for p in PATCHES)).hexdigest()}\n"
    if stamp.exists() and stamp.read_text() == wanted:
        return
    source = source or fetch()
    if missing := [name for name in NEEDED if not (source / name).exists()]:
        raise UpstreamError(f"{source} is no llama.cpp source folder: {missing[0]} is missing")
    shutil.rmtree(dest, ignore_errors=True)
    dest.mkdir(parents=True)
    for name in NEEDED:
        copy = shutil.copytree if (source / name).is_dir() else shutil.copy2
        copy(source / name, dest / name)
    apply_patches(dest)
    stamp.write_text(wanted)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    actions = parser.add_subparsers(dest="action", required=True)
    actions.add_parser("fetch")
    preparing = actions.add_parser("prepare")
    preparing.add_argument("dest", type=Path)
    preparing.add_argument("--from", dest="source", type=Path)
    args = parser.parse_args()
    try:
        if args.action == "fetch":
            print(fetch())
        else:
            prepare(args.dest, args.source)
    except (UpstreamError, OSError) as error:
        print(f"mobilellm-cpp: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
