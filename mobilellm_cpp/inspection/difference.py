"""What differs between two GGUF files: metadata, tensor types and every weight."""

import dataclasses
import os
from contextlib import ExitStack
from typing import Any

import numpy as np

from ..engine.gguf_file import GGUFFile, TensorInfo, open_gguf
from ..errors import MobileLLMError, ModelError
from ..quant.rounding import dequantize

CHUNK = 1 << 20  # weights that are compared at a time
ABSENT = "absent"


@dataclasses.dataclass(frozen=True)
class KeyDifference:
    """A metadata key, and what each file has there, in words."""

    key: str
    a: str
    b: str


@dataclasses.dataclass(frozen=True)
class TensorDifference:
    """A tensor that is not the same in both: types and shapes (rows first), "" and [] where a file
    does not have it, and the largest and the mean |Δ| of its weights, None where they cannot be
    compared."""

    name: str
    type_a: str
    type_b: str
    shape_a: list[int]
    shape_b: list[int]
    largest: float | None
    mean: float | None


@dataclasses.dataclass(frozen=True)
class Difference:
    """What differs between two files; `tensors` are in the order of the largest difference, and
    `alike` counts those that are the same in both."""

    a: str
    b: str
    metadata: list[KeyDifference]
    tensors: list[TensorDifference]
    alike: int


def compare(a: str | os.PathLike[str], b: str | os.PathLike[str]) -> Difference:
    """Compares two files, model or adapter, weight by weight. Raises ModelError where one cannot
    be read."""
    paths = [os.fspath(a), os.fspath(b)]
    with ExitStack() as stack:
        files = [stack.enter_context(open_gguf(path)) for path in paths]
        metadata = _metadata(*files)
        infos = [{tensor.name: tensor for tensor in file.tensors()} for file in files]
    found, alike = [], 0
    for name in infos[0] | infos[1]:
        pair = [info.get(name) for info in infos]
        largest, mean = None, None
        if pair[0] and pair[1] and pair[0].shape == pair[1].shape:
            largest, mean = _compare(paths, pair[0], pair[1])
            if largest == 0 and pair[0].type == pair[1].type:
                alike += 1
                continue
        types = [tensor.type if tensor else "" for tensor in pair]
        shapes = [list(tensor.shape) if tensor else [] for tensor in pair]
        found.append(TensorDifference(name, *types, *shapes, largest, mean))
    found.sort(key=lambda tensor: -np.inf if tensor.largest is None else -tensor.largest)
    return Difference(*paths, metadata, found, alike)


def _metadata(a: GGUFFile, b: GGUFFile) -> list[KeyDifference]:
    differences = []
    for key in dict.fromkeys([*a.keys, *b.keys]):
        left, right = a.get(key), b.get(key)
        texts = a.strings(key), b.strings(key)
        if any(texts):  # of a list of strings get gives the length alone
            if texts[0] != texts[1]:
                differences.append(KeyDifference(key, *_lists(*texts)))
        elif isinstance(left, list) and isinstance(right, list) and len(left) == len(right):
            if left != right:
                differences.append(KeyDifference(key, *_lists(left, right)))
        elif left != right and not (left != left and right != right):  # NaNs are alike
            differences.append(KeyDifference(key, _shown(left), _shown(right)))
    return differences


def _lists(a: list[Any], b: list[Any]) -> tuple[str, str]:
    """The first place at which two lists differ, and how many items do."""
    if len(a) != len(b):
        return f"{len(a)} items" if a else ABSENT, f"{len(b)} items" if b else ABSENT
    places = [i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y]
    first = places[0]
    if len(a) <= 8 and not isinstance(a[0], str):
        return str(a), str(b)
    more = f" ({len(places)} of {len(a)} differ)"
    return f"[{first}] {_shown(a[first])}", f"[{first}] {_shown(b[first])}{more}"


def _shown(value: Any) -> str:
    if value is None:
        return ABSENT
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _compare(paths: list[str], a: TensorInfo, b: TensorInfo) -> tuple[float | None, float | None]:
    """The largest and the mean difference of two tensors of one shape, a few rows at a time."""
    columns = a.shape[-1]
    rows = a.n_elements // max(1, columns)
    step = max(1, CHUNK // max(1, columns))
    largest, total = 0.0, 0.0
    for first in range(0, rows, step):
        n = min(step, rows - first)
        data = []
        for path, tensor in zip(paths, (a, b), strict=True):
            row_bytes = tensor.n_bytes // rows
            start = tensor.start + first * row_bytes
            data.append(np.fromfile(path, np.uint8, n * row_bytes, offset=start))
            if data[-1].size != n * row_bytes:
                raise ModelError(f"{path}: {tensor.name} ends before its time")
        if a.type == b.type and np.array_equal(*data):
            continue
        try:
            x = dequantize(data[0], a.type_id, columns)
            y = dequantize(data[1], b.type_id, columns)
        except MobileLLMError:  # whole numbers, or a type without weights
            return None, None
        with np.errstate(invalid="ignore", over="ignore"):
            error = np.abs(x - y)
        error[(x != x) & (y != y)] = 0
        error[np.isnan(error)] = np.inf
        largest = max(largest, float(error.max()))
        total += float(error.sum(dtype=np.float64))
    return largest, total / max(1, a.n_elements)
