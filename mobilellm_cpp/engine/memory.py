"""Whether a model and its context fit into the memory that is free, before any of it is taken."""

import contextlib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ModelError
from ..quant.weight_type import CacheType

if TYPE_CHECKING:
    from .gguf_file import GGUFFile

OWN_CGROUP, CGROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
OTHER = 64 << 20  # bytes that Python, the vocabulary and a step of the model take besides
# bits a weight of the types that a user may quantize to instead
_BITS = {"q8_0": 8.5, "q4_0": 4.5}


def free_memory() -> int:
    """Bytes that this process may still take: free memory of the machine and swap space, within
    the limit of any cgroup above it."""
    sizes = machine_memory()
    found = sizes.get("MemAvailable", sizes.get("MemTotal", sys.maxsize)) + sizes.get("SwapFree", 0)
    own = ""
    with contextlib.suppress(OSError):
        lines = OWN_CGROUP.read_text().splitlines()
        own = next((line[3:] for line in lines if line.startswith("0::")), "")
    parts = [part for part in own.split("/") if part not in ("", "..")]
    for depth in range(len(parts) + 1):
        with contextlib.suppress(OSError, ValueError):
            limit = CGROUPS.joinpath(*parts[:depth], "memory.max").read_text()
            found = min(found, int(limit))  # "max" is none
    return found


def machine_memory() -> dict[str, int]:
    """Bytes by the names of /proc/meminfo; at least MemTotal where the system tells it."""
    sizes = {}
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            name, _, rest = line.partition(":")
            sizes[name] = int(rest.split()[0]) * 1024
    if not sizes and hasattr(os, "sysconf"):
        sizes["MemTotal"] = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return sizes


def check_memory(
    path: str, file: "GGUFFile", n_ctx: int, cache_type: CacheType, taken: int = 0
) -> None:
    """Raises ModelError where the weights, and a KV cache for n_ctx tokens, are more than is free.
    The error says how much is needed, and which context or type fits. Weights that are not packed
    stay in the file, from where the system reads them as it has room: they do not count. Bytes that
    the weights have `taken` already are free for them."""
    from .gguf_file import kv_bytes, packs_floats

    packs = os.environ.get("MOBILELLM_KERNELS") != "0"
    tensors = [
        each
        for each in file.tensors()
        if packs and (each.type.startswith(("q", "iq")) or packs_floats(each.name.encode()))
    ]
    weights = min(sum(tensor.n_bytes for tensor in tensors), os.path.getsize(path))

    def cache(n: int) -> int:
        return kv_bytes(file, n, cache_type=cache_type)

    free = free_memory() + taken
    try:
        needed = weights + cache(n_ctx) + OTHER
    except ModelError:  # the loader says it better
        return
    if needed <= free:
        return
    said = (
        f"{path}: {_mb(needed)} of memory are needed, {_mb(weights)} for weights and "
        f"{_mb(cache(n_ctx))} for a context of {n_ctx} tokens, but {_mb(free)} are free"
    )
    fits = n_ctx
    while fits > 256 and weights + cache(fits) + OTHER > free:
        fits //= 2
    if weights + cache(fits) + OTHER <= free:
        raise ModelError(f"{said}; a context of {fits} tokens fits")
    count = sum(tensor.n_elements for tensor in tensors)
    small = min(n_ctx, 512)
    for name, bits in _BITS.items():
        size = int(count * bits / 8)
        if size < weights and size + cache(small) + OTHER <= free:
            raise ModelError(
                f"{said}; as {name} the weights take {_mb(size)}, and a context of {small} tokens "
                f"fits beside them"
            )
    raise ModelError(f"{said}; neither a smaller context nor a smaller type of weights fits")


def _mb(size: int) -> str:
    return f"{size / 2**20:.0f} MB" if size < 10 << 30 else f"{size / 2**30:.0f} GB"
