"""What differs between two GGUF files: metadata, tensor types and every weight."""

import dataclasses
import os
from typing import Any

import numpy as np
import numpy.typing as npt

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
    path_a, path_b = os.fspath(a), os.fspath(b)
    with open_gguf(path_a) as file_a, open_gguf(path_b) as file_b:
        metadata = _metadata(file_a, file_b)
        infos_a = {tensor.name: tensor for tensor in file_a.tensors()}
        infos_b = {tensor.name: tensor for tensor in file_b.tensors()}
    found, alike = [], 0
    for name in infos_a | infos_b:
        x, y = infos_a.get(name), infos_b.get(name)
        largest, mean = None, None
        if x and y and x.shape == y.shape:
            largest, mean = _compare(path_a, x, path_b, y)
            if largest == 0 and x.type == y.type:
                alike += 1
                continue
        found.append(
            TensorDifference(
                name=name,
                type_a=x.type if x else "",
                type_b=y.type if y else "",
                shape_a=list(x.shape) if x else [],
                shape_b=list(y.shape) if y else [],
                largest=largest,
                mean=mean,
            )
        )
    found.sort(key=lambda tensor: -np.inf if tensor.largest is None else -tensor.largest)
    return Difference(path_a, path_b, metadata, found, alike)


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


def _compare(
    path_a: str, a: TensorInfo, path_b: str, b: TensorInfo
) -> tuple[float | None, float | None]:
    """The largest and the mean difference of two tensors of one shape, a few rows at a time."""
    columns = a.shape[-1]
    rows = a.n_elements // max(1, columns)
    step = max(1, CHUNK // max(1, columns))
    largest, total = 0.0, 0.0
    for first in range(0, rows, step):
        last = min(first + step, rows)
        raw_a, raw_b = _rows(path_a, a, first, last), _rows(path_b, b, first, last)
        if a.type == b.type and np.array_equal(raw_a, raw_b):
            continue
        try:
            x, y = dequantize(raw_a, a.type_id, columns), dequantize(raw_b, b.type_id, columns)
        except MobileLLMError:  # whole numbers, or a type without weights
            return None, None
        with np.errstate(invalid="ignore", over="ignore"):
            error = np.abs(x - y)
        error[(x != x) & (y != y)] = 0
        error[np.isnan(error)] = np.inf
        largest = max(largest, float(error.max()))
        total += float(error.sum(dtype=np.float64))
    return largest, total / max(1, a.n_elements)


def _rows(path: str, tensor: TensorInfo, first: int, last: int) -> npt.NDArray[np.uint8]:
    """The bytes of rows first..last."""
    row_bytes = tensor.n_bytes // (tensor.n_elements // tensor.shape[-1])
    n, start = (last - first) * row_bytes, tensor.start + first * row_bytes
    data = np.fromfile(path, np.uint8, n, offset=start)
    if data.size != n:
        raise ModelError(f"{path}: {tensor.name} ends too early")
    return data
