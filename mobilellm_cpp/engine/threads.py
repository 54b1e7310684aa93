"""How many threads a model gets unless told: what this process may use, and gains by using."""

import math
import os
from collections.abc import Iterator
from pathlib import Path

# Where systems mount version 2 alone, and beside version 1.
_UNIFIED: tuple[str, ...] = ("/sys/fs/cgroup", "/sys/fs/cgroup/unified")


def default_threads() -> int:
    """The physical cores that this process may use, or fewer, where a cgroup grants less time."""
    return limits()[0]


def limits() -> tuple[int, str]:
    """default_threads, and why so many."""
    cores, quotas = _physical_cores(), list(_quotas())
    granted = min((max(1, math.ceil(quota)) for quota in quotas), default=cores)
    if granted < cores:
        return granted, f"a cgroup grants the time of {min(quotas):g} processors"
    there = os.cpu_count() or cores
    of = f" of {there} logical processors" if there != cores else ""
    return cores, f"{cores} physical cores{of} that this process may use"


def _physical_cores() -> int:
    """The cores of the process's affinity; hyper-threads count once where the system tells."""
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    cores = set()
    for cpu in os.sched_getaffinity(0):
        topology = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        cores.add(_read(topology) or str(cpu))
    return len(cores)


def _quotas() -> Iterator[float]:
    """The CPUs' worth of time that each cgroup above this process grants (Linux)."""
    for line in _read(Path("/proc/self/cgroup")).splitlines():
        _, controllers, own = (line.split(":", 2) + ["", ""])[:3]
        if not controllers:  # version 2
            mounts = _UNIFIED
        elif "cpu" in controllers.split(","):
            mounts = tuple(f"/sys/fs/cgroup/{name}" for name in ("cpu", controllers))
        else:
            continue
        # A container may see the host's path here, and its own group as the root of the mount.
        parts = [part for part in own.split("/") if part not in ("", "..")]
        for mount in mounts:
            for depth in range(len(parts) + 1):
                yield from _quota(Path(mount, *parts[:depth]))


def _quota(group: Path) -> Iterator[float]:
    """The quota that a cgroup's folder states, of either version."""
    words = _read(group / "cpu.max").split()  # "50000 100000", "max 100000"
    if not words:
        words = [_read(group / f"cpu.cfs_{name}_us") for name in ("quota", "period")]
    try:
        quota, period = (int(word) for word in words)
    except ValueError:
        return
    if quota > 0 and period > 0:  # -1: none
        yield quota / period


def _read(path: Path) -> str:
    """A file of the system as text; empty where there is none."""
    try:
        return path.read_text().strip()
    except (OSError, UnicodeError):
        return ""
