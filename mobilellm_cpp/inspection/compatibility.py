"""What llama.cpp does with a file: which of its versions run it."""

from collections.abc import Iterable

# When llama.cpp learned an architecture or a type of tensors, and by which pull request. What is
# not listed of the types is older than GGUF.
ARCHITECTURES = {
    "llama": ("August 2023", 2398),
    "qwen3": ("April 2025", 12828),
    "granite_swa": ("July 2026", 25505),
}
TYPES = {
    "bf16": ("May 2024", 6412),
    "q1_0": ("April 2026", 21273),
    "q2_0": ("June 2026", 24448),
}


def compatibility(architecture: str, types: Iterable[str], what: str = "file") -> str:
    """A sentence about which llama.cpp runs a file of this architecture and these tensor types."""
    if architecture == "mobilellm":
        return (
            "refused by stock llama.cpp (unknown model architecture); mobilellm-cpp runs it, and "
            f"convert --portable makes a {what} for others"
        )
    if architecture not in ARCHITECTURES:
        return f"architecture {architecture}, of which mobilellm-cpp knows nothing"
    needs = {f"architecture {architecture}": ARCHITECTURES[architecture]}
    needs |= {f"type {name}": TYPES[name] for name in types if name in TYPES}
    # pull requests are numbered as they come
    name, (month, number) = max(needs.items(), key=lambda need: need[1][1])
    return f"runs in llama.cpp since {month} ({name}, pull request {number})"
