"""mobilellm doctor: what this installation is and does on this machine."""

import dataclasses
from typing import Annotated

import typer

from ..saying import complain
from .common import counted, print_json, printable, size_text


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show what runs here: processor, kernels, threads, memory.

    Exit code 1 where something is wrong; the reason is on stderr.
    """
    from ..errors import ModelError
    from ..inspection.doctor import examine

    found = examine()
    if as_json:
        print_json(dataclasses.asdict(found))
    else:
        measured = ", ".join(f"{n} up to {size}" for size, n in found.threads_measured.items())
        cache = f"{counted(found.cache_files, 'model')}, {size_text(found.cache_size)}"
        rows = {
            "version": f"mobilellm-cpp {found.version}, Python {found.python}",
            "system": found.system,
            "processor": found.cpu,
            "features": ", ".join(found.features) or "none that are used",
            "kernels": found.kernels or "turned off (MOBILELLM_KERNELS=0)",
            "library": f"{found.library}, with llama-cpp-python {found.llama_cpp_python}",
            "neighbours": found.neighbour or "no llama_cpp",
            "threads": f"{found.threads}: {found.threads_reason}",
            "": f"measured to decode fastest: {measured}" if measured else "none measured yet",
            "memory": f"{size_text(found.memory_free)} free of {size_text(found.memory)}",
            "cache": f"{found.cache}, {found.cache_trouble or cache}",
            "disk": f"{size_text(found.disk_free)} free there",
            "conversations": found.conversations,
        }
        width = max(map(len, rows))
        for name, text in rows.items():
            print(f"{name:{width}}  {printable(text)}")
    for trouble in found.troubles:
        complain(ModelError(trouble))
    if found.troubles:
        raise typer.Exit(1)
