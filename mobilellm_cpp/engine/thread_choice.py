"""How many threads decode fastest: measured once for a machine and a size of model, and kept.

Memory that two threads read as fast as four, a second socket, slow cores beside quick ones: no
count of cores tells. Sizes are told apart by powers of two, machines by their processor and by how
many threads may run. `threads.json` in the cache folder keeps what was found on a machine that was
not busy with other things; whoever removes it has it measured again.
"""

import json
import os
import platform
from collections.abc import Callable
from pathlib import Path

from ..cache import _write, cache_folder
from .threads import default_threads

ENOUGH = 1.03  # so much slower than the fastest is as good, with fewer threads


def machine() -> str:
    """What the choice depends on beside the model."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    kernels = os.environ.get("MOBILELLM_KERNELS", "all")
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name}, {default_threads()} threads, kernels {kernels}"


def kept() -> dict[str, dict[str, int]]:
    """What was measured: for each machine the threads by the bits of a model's size."""
    try:
        found = json.loads((cache_folder() / "threads.json").read_text())
    except (OSError, ValueError):
        return {}
    return {
        str(name): {str(k): n for k, n in sizes.items() if isinstance(n, int) and n > 0}
        for name, sizes in (found.items() if isinstance(found, dict) else ())
        if isinstance(sizes, dict)
    }


def chosen_threads(size: int, seconds: Callable[[int], float]) -> int:
    """The threads for a model of `size` bytes, at most default_threads(). seconds(n) measures a
    decoded token with n threads; it is called where nothing was kept."""
    most = default_threads()
    candidates = sorted({n for n in (1, 2, 4, most) if n <= most})
    if len(candidates) == 1:
        return most
    found, here, bits = kept(), machine(), str(size.bit_length())
    known = found.get(here, {}).get(bits)
    if known is not None and known <= most:
        return known
    times = {n: seconds(n) for n in candidates}
    best = min(n for n in candidates if times[n] <= ENOUGH * min(times.values()))
    if not _busy():
        found.setdefault(here, {})[bits] = best
        _write(cache_folder() / "threads.json", json.dumps(found, indent=1) + "\n")
    return best


def _busy() -> bool:
    """Whether other programs want a good part of the machine, as far as the system tells."""
    return hasattr(os, "getloadavg") and os.getloadavg()[0] > (os.cpu_count() or 1) / 2
