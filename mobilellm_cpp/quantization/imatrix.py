"""Importance matrices in llama.cpp's format (tools/imatrix): mean squares of each matrix's inputs.

A GGUF file of general.type imatrix with two tensors a matrix: NAME.in_sum2, sums of squares of each
column's inputs, and NAME.counts, the number of rows summed. For a block that is executed several
times they are sums over all executions.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ..convert.gguf_file import GGUFFile, array_string, string, u32
from ..engine.gguf_file import open_gguf
from ..errors import ModelError
from ..quant.types import F32
from .source import Source

Floats = npt.NDArray[np.float32]
Progress = Callable[[int, int, str], None]

SUMS, COUNTS = ".in_sum2", ".counts"


def read_imatrix(path: str | os.PathLike[str], source: Source) -> dict[str, Floats]:
    """The mean squares [columns] of the matrices of `source`. Raises ModelError for a file that is
    no imatrix or one of another model."""
    with open_gguf(path) as file:
        if file.get("general.type") != "imatrix":
            raise ModelError(
                f"{os.fspath(path)} is not an importance matrix, according to its general.type"
            )
        infos = {info.name: info for info in file.tensors()}
    found: dict[str, Floats] = {}
    for name, info in infos.items():
        matrix = name.removesuffix(SUMS)
        if name == matrix or matrix not in source.tensors:
            continue
        counts = infos.get(matrix + COUNTS)
        columns = source.tensors[matrix].shape[-1]
        if counts is None or info.n_elements != columns:
            raise ModelError(
                f"{os.fspath(path)}: {matrix} has {info.n_elements} columns there and {columns} in "
                f"{source.path}: it belongs to another model"
            )
        sums = np.fromfile(path, "<f4", info.n_elements, offset=info.start)
        count = float(np.fromfile(path, "<f4", 1, offset=counts.start)[0])
        if count > 0 and np.isfinite(sums).all():
            found[matrix] = sums / np.float32(count)
    if not found:
        raise ModelError(f"{os.fspath(path)} has no matrix of {source.path}")
    return found


def write_imatrix(
    path: str | os.PathLike[str],
    sums: Mapping[str, Floats],
    counts: Mapping[str, int],
    dataset: str,
    chunks: int,
    chunk_size: int,
) -> None:
    """Writes sums of squares [columns] and the rows summed."""
    metadata = {
        "general.type": string("imatrix"),
        "imatrix.datasets": array_string([dataset.encode()]),
        "imatrix.chunk_count": u32(chunks),
        "imatrix.chunk_size": u32(chunk_size),
    }
    infos = []
    for name in sorted(sums):
        infos.append((name + SUMS, (1, len(sums[name])), F32))
        infos.append((name + COUNTS, (1, 1), F32))
    file = GGUFFile(Path(path), metadata, infos)
    with file:
        for name in sums:
            file.write(name + SUMS, 0, np.ascontiguousarray(sums[name], np.float32).data)
            count = np.array([counts[name]], np.float32)
            file.write(name + COUNTS, 0, count.data)


def collect(
    source: Source, tokens: list[list[int]], progress: Progress | None = None
) -> tuple[dict[str, Floats], dict[str, int]]:
    """Sums of squares of the inputs of all matrices of the blocks, and the tokens they are of, in
    the model as it is. Needs torch."""
    import torch

    from .network import MATRICES, Network

    network = Network(source)
    sums: dict[str, Floats] = {}
    counts: dict[str, int] = {}
    same_input = {"attn_q": ("attn_q", "attn_k", "attn_v"), "ffn_gate": ("ffn_gate", "ffn_up")}
    with torch.no_grad():
        embedding = torch.from_numpy(source.values("token_embd.weight"))
        x = embedding[torch.tensor(tokens)]
        for done, stored in enumerate(network.schedule, 1):

            def watch(part: str, rows: torch.Tensor, stored: int = stored) -> None:
                for each in same_input.get(part, (part,)):
                    name = f"blk.{stored}.{each}.weight"
                    squares = rows.square().sum(0).numpy()
                    sums[name] = sums.get(name, np.float32(0)) + squares
                    counts[name] = counts.get(name, 0) + len(rows)

            own = network.weights(stored)
            x = torch.cat([network.block(row[None], own, stored, watch) for row in x])
            if progress is not None:
                progress(done, len(network.schedule), f"block {stored}")
    assert len(sums) == len(MATRICES) * source.blocks
    return sums, counts
