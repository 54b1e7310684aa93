"""A checkpoint's weights with an adapter merged into them: what a file of `convert --merge` holds.

Rows are read when they are asked for, and w + scaling * B @ A is summed in float64. PEFT's scaling
is read from adapter_config.json here, since the converter's own is what is to be checked.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from ..convert.adapter import CONFIG, Adapter
from ..convert.reference import Floats, Reference, StoredWeights, read_rows
from ..convert.tensor import Tensor, plain_name
from ..errors import CheckpointError

Doubles = npt.NDArray[np.float64]
Pair = tuple[Tensor, Tensor, float]  # A, B and PEFT's scaling

CHUNK = 1 << 18  # weights that are summed at a time
UNIT = 2.0**-24  # how far rounding to float32 moves a number, as a share of it


class MergedWeights(StoredWeights):
    """The weights of `reference` with `adapter` merged. Raises CheckpointError for an adapter of
    what is no matrix of the base, or of another shape."""

    def __init__(self, reference: Reference, adapter: Adapter) -> None:
        super().__init__(reference.parts)
        self._added: dict[str, Pair] = {}  # by the tensor's name
        adapted = scaled_pairs(adapter)
        for (part, _), tensor in reference.parts.items():
            module = plain_name(tensor.name).removesuffix(".weight")
            if part != "embedding" and module in adapted:
                a, b, _ = self._added[tensor.name] = adapted.pop(module)
                if (b.shape[0], a.shape[1]) != tensor.shape:
                    raise CheckpointError(f"{a} and its lora_B do not fit {tensor}.")
        for a, _, _ in adapted.values():
            raise CheckpointError(f"{a} adapts something that is not a matrix of the base.")

    def read(self, tensor: Tensor, first: int, last: int) -> Floats:
        rows = super().read(tensor, first, last)
        for part, products, _ in self._sums(tensor, first, rows):
            part += products
        return rows

    def slack(self, tensor: Tensor, first: int, last: int) -> Floats | None:
        """How far the float32 sums of a converter may lie from those of `read`: for each of the
        rank + 3 roundings of a product or a part of the sum a unit of all products' magnitudes, and
        one of the sum itself on either side. None where nothing is added."""
        if tensor.name not in self._added:
            return None
        rank = self._added[tensor.name][0].shape[0]
        rows = super().read(tensor, first, last)
        for part, products, magnitudes in self._sums(tensor, first, rows):
            part[:] = UNIT * ((rank + 3) * magnitudes + 2 * np.abs(part + products))
        return rows

    def _sums(
        self, tensor: Tensor, first: int, rows: Floats
    ) -> Iterator[tuple[Floats, Doubles, Doubles]]:
        """Parts of `rows`, the tensor's rows from `first` on, with what is added to each weight and
        the sum of the magnitudes of its products."""
        if tensor.name not in self._added:
            return
        a, b, scaling = self._added[tensor.name]
        right = read_rows(a, 0, a.shape[0]).astype(float)
        step = max(1, CHUNK // rows.shape[1])
        for start in range(0, len(rows), step):
            part = rows[start : start + step]
            left = scaling * read_rows(b, first + start, first + start + len(part)).astype(float)
            yield part, left @ right, np.abs(left) @ np.abs(right)


def scaled_pairs(adapter: Adapter) -> dict[str, Pair]:
    """What PEFT adds to the matrix of each module, by the module's name in the base."""
    config = json.loads((adapter.folder / CONFIG).read_text())

    def setting(module: str, pattern: str, field: str) -> float:
        for key, value in (config.get(pattern) or {}).items():
            if re.match(rf"(.*\.)?({key})$", module):
                return float(value)
        return float(config.get(field) or 8)

    found = {}
    for module, part in adapter.parts().items():
        rank = setting(module, "rank_pattern", "r")
        divisor = math.sqrt(rank) if config.get("use_rslora") else rank
        found[module] = part.a, part.b, setting(module, "alpha_pattern", "lora_alpha") / divisor
    return found
