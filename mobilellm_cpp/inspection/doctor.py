"""What this installation is and does on this machine: `mobilellm doctor`."""

import ctypes
import json
import os
import platform
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from .. import __version__
from ..cache import cache_folder
from ..chat.storage import folder as chat_folder
from ..engine.library import FOLDER, lib, llama_cpp, reason
from ..engine.memory import machine_memory
from ..engine.thread_choice import kept, machine
from ..engine.threads import limits

lib.mobilellm_kernels_text.argtypes = []
lib.mobilellm_kernels_text.restype = ctypes.c_char_p

# Tried in a process of its own: what a program gets that imports llama_cpp and nothing of ours.
NEIGHBOUR = """
import json, llama_cpp
library = llama_cpp.llama_cpp
print(json.dumps([llama_cpp.__version__, str(library._base_path), library._lib._name]))
"""


@dataclass(frozen=True)
class Doctor:
    """What was found. Sizes are in bytes; features are those that the library was built for and
    the processor has."""

    version: str
    python: str
    system: str
    cpu: str
    features: list[str]
    kernels: str  # of ours, "" where they are turned off
    library: str
    llama_cpp_python: str
    threads: int
    threads_reason: str
    threads_measured: dict[str, int]  # up to which size of a model, how many decode fastest
    cache: str
    cache_files: int
    cache_size: int
    cache_trouble: str
    conversations: str
    disk_free: int
    memory: int
    memory_free: int
    neighbour: str
    troubles: list[str]


def examine() -> Doctor:
    """Looks at everything; what is wrong stands in troubles, a sentence each."""
    cache = cache_folder()
    files = list(cache.glob("*.gguf")) if _readable(cache) else []
    trouble = _trouble(cache)
    memory = machine_memory()
    limit, limited_by = limits()
    neighbour, wrong = _neighbour()
    info = llama_cpp.llama_print_system_info().decode()
    kernels = lib.mobilellm_kernels_text()
    troubles = [wrong] if wrong else []
    if kernels is None:
        troubles.append(reason())
    if trouble:
        troubles.append(f"the cache folder {cache} cannot be used: {trouble}")
    if kernels == b"scalar":
        troubles.append("this processor has no kernels of ours: llama.cpp's own are used")
    return Doctor(
        version=__version__,
        python=f"{platform.python_version()}, {sys.executable}",
        system=f"{platform.system()} {platform.release()}, {platform.machine()}",
        cpu=machine().split(", ")[0],
        features=[name for name, _, on in (p.partition(" = ") for p in _parts(info)) if on == "1"],
        kernels="none" if kernels is None else kernels.decode(),
        library=str(FOLDER),
        llama_cpp_python=llama_cpp.__version__,
        threads=limit,
        threads_reason=limited_by,
        threads_measured={
            _up_to(int(bits)): n
            for bits, n in sorted(kept().get(machine(), {}).items(), key=lambda item: int(item[0]))
            if bits.isdecimal()
        },
        cache=str(cache),
        cache_files=len(files),
        cache_size=sum(_size(path) for path in files),
        cache_trouble=trouble,
        conversations=str(chat_folder()),
        disk_free=_disk(cache),
        memory=memory.get("MemTotal", 0),
        memory_free=memory.get("MemAvailable", 0),
        neighbour=neighbour,
        troubles=troubles,
    )


def _parts(info: str) -> list[str]:
    """The features in llama.cpp's "CPU : AVX2 = 1 | F16C = 1 | "."""
    return [part.rpartition(":")[2].strip() for part in info.split("|")]


def _up_to(bits: int) -> str:
    size = 1 << bits
    return f"{size / 2**30:g} GiB" if size >= 2**30 else f"{size / 2**20:g} MiB"


def _readable(folder: Path) -> bool:
    try:
        return folder.is_dir()
    except OSError:
        return False


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _trouble(folder: Path) -> str:
    """Why a folder cannot be written to; "" where it can, or could be made."""
    if str(folder).startswith("~"):
        return "this user has no home folder"
    for place in (folder, *folder.parents):
        try:
            if place.is_dir():
                return "" if os.access(place, os.W_OK) else f"{place} cannot be written to"
            if place.exists():
                return f"{place} is a file"
        except OSError as error:
            return f"{place}: {error.strerror}"
    return "no such folder"


def _disk(folder: Path) -> int:
    for place in (folder, *folder.parents):
        try:
            return shutil.disk_usage(place).free
        except OSError:
            continue
    return 0


def _neighbour() -> tuple[str, str]:
    """Which library a program gets that imports llama_cpp, and what is wrong with it."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", NEIGHBOUR],
            capture_output=True,
            text=True,
            timeout=60,
            cwd="/",
        )
        version, folder, name = json.loads(done.stdout)
    except (OSError, subprocess.SubprocessError):
        return "", "import llama_cpp could not be tried"
    except ValueError:
        last = (done.stderr.strip().splitlines() or ["no reason"])[-1]
        return "", f"import llama_cpp fails: {last}"
    ours = os.path.realpath(folder) == os.path.realpath(FOLDER)
    where = "ours" if ours else folder
    return f"llama_cpp {version} loads {os.path.basename(name)} of {where}", ""
