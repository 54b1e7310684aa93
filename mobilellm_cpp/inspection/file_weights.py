"""The weights of a GGUF file against those of a checkpoint: every one within its type's rounding.

A file that says mobilellm.exact was made by `--type exact`, which rounds nothing but takes lattices
over: there a weight in a block may move by what the choice of a step costs (quant/lattice.py).
Rounding that heeds how strong the columns of inputs are (imatrix, calibration) may move a weight
that hardly counts far: such a file says so, and there the rows of blocks are held to their errors.
Where an adapter is merged into the checkpoint's weights, the float32 sums of that are allowed for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..convert import keys
from ..convert.reference import Reference, StoredWeights, fake_quantized
from ..convert.tensor import Tensor
from ..engine.gguf_file import GGUFFile, TensorInfo, block_schedule
from ..quant.bounds import FLOATS, bound
from ..quant.rounding import dequantize
from .merged_weights import MergedWeights

if TYPE_CHECKING:
    import torch  # the reference imports it, with a sentence where it is missing

Floats = npt.NDArray[np.float32]

CHUNK = 1 << 19  # weights that are compared at a time

# Which pairs of a head's dimensions an architecture's RoPE turns: neighbours, or the two halves.
NEIGHBOURS = ("llama", "mobilellm", "granite_swa")
HALVES = ("qwen3",)

# Constants that stock architectures need where the checkpoint has no weight.
CONSTANTS: dict[str, Callable[[Floats], Any]] = {
    "attn_q_norm.weight": lambda values: values == 1,
    "attn_k_norm.weight": lambda values: values == 1,
    "attn_sinks.weight": lambda values: values < -1e9,  # out of reach
}

FILE_PARTS = {
    "embedding": "token_embd",
    "final_norm": "output_norm",
    "head": "output",
    "attention_norm": "attn_norm",
    "q": "attn_q",
    "k": "attn_k",
    "v": "attn_v",
    "o": "attn_output",
    "ffn_norm": "ffn_norm",
    "gate": "ffn_gate",
    "up": "ffn_up",
    "down": "ffn_down",
}


@dataclass(frozen=True)
class TensorCheck:
    """One tensor of the file against the checkpoint's. `share` is the largest error as a share of
    what rounding to `type` allows there, None where it allows none; `outside` counts the weights
    (for types whose rounding is not known the rows) that are beyond it."""

    name: str
    type: str
    max_error: float
    share: float | None
    outside: int


class FileWeights:
    """The file's weights in the checkpoint's order, as the reference takes them.

    Blocks are numbered as in the checkpoint; a file may hold a block once for each execution.
    With `round_inputs` the inputs of multiplications are rounded as ggml rounds them.
    """

    def __init__(self, path: str, file: GGUFFile, reference: Reference) -> None:
        self.path = path
        self.arch = str(file.get("general.architecture"))
        self.reference = reference
        self.round_inputs = False
        self.exact = file.get(keys.EXACT) is True
        self.weighted = bool(file.get(keys.IMATRIX_ENTRIES))
        self.problems: list[str] = []  # why these weights cannot be compared
        self.infos = {tensor.name: tensor for tensor in file.tensors()}
        hyper = reference.hyper
        stored = file.get(f"{self.arch}.block_count")
        self.executed = block_schedule(file)
        self.blocks = list(range(hyper.blocks))  # the checkpoint's block that each of the file's is
        plain = file.get(f"{self.arch}.block_schedule") is None
        if plain and stored == len(hyper.schedule):  # a block for each layer
            self.blocks = self.executed = list(hyper.schedule)
        elif stored != hyper.blocks:
            self.problems.append(f"the file holds {stored} blocks, the checkpoint {hyper.blocks}")
        self.copies = {
            block: [copy for copy, of in enumerate(self.blocks) if of == block]
            for block in range(hyper.blocks)
        }
        if self.arch not in NEIGHBOURS + HALVES:
            self.problems.append(f"how the architecture {self.arch} orders q and k is not known")
        self.reordered = hyper.interleaved != (self.arch in NEIGHBOURS)

    def matrix(self, part: str, block: int | None) -> Floats:
        info = self._info(part, block)
        values = self._read(info, part, 0, info.n_elements // info.shape[-1])
        return values.reshape(info.shape)

    def rows(self, part: str, first: int, last: int) -> Floats:
        return self._read(self._info(part, None), part, first, last)

    def input(self, x: torch.Tensor, part: str, block: int | None) -> torch.Tensor:
        return round_input(x, self._info(part, block).type) if self.round_inputs else x

    def pairs(self) -> Iterator[tuple[str, str, Tensor]]:
        """The part, the name in the file and the checkpoint's tensor of all there is to compare;
        what the other side does not have becomes a problem."""
        left = dict(self.infos)
        for (part, block), tensor in self.reference.parts.items():
            for copy in [None] if block is None else self.copies[block]:
                name = self._name(part, copy)
                info = self.infos.get(name)
                left.pop(name, None)
                if info is None:
                    self.problems.append(f"the file has no {name}")
                elif info.shape != tensor.shape:
                    self.problems.append(
                        f"{name} has shape {info.shape}, the checkpoint's {tensor.shape}"
                    )
                else:
                    yield part, name, tensor
        if self.reference.tied and "output.weight" in left:
            del left["output.weight"]
            yield "head", "output.weight", self.reference.parts["embedding", None]
        for name, info in left.items():
            neutral = CONSTANTS.get(name.split(".", 2)[-1])
            if neutral is None:
                self.problems.append(f"the checkpoint has no {name}")
            elif not neutral(self._read(info, "", 0, 1)).all():
                self.problems.append(f"{name} does not hold what leaves attention as it is")

    def check(self, part: str, name: str, tensor: Tensor, stored: StoredWeights) -> TensorCheck:
        """All weights of one tensor against the checkpoint's, a few rows at a time."""
        info = self.infos[name]
        rows = info.n_elements // info.shape[-1]
        unit = self.reference.hyper.head_dim if part in ("q", "k") else 1
        step = max(1, CHUNK // (unit * info.shape[-1])) * unit
        largest, share, outside, forbidden = 0.0, 0.0, 0, False
        for first in range(0, rows, step):
            last = min(first + step, rows)
            ours = self._read(info, part, first, last)
            whole = (0, len(tensor.bits)) if len(tensor.shape) == 1 else (first, last)
            scale = self.reference.scales.get(tensor.name)
            if scale is not None and self.exact and info.type == "q4_0":
                theirs = fake_quantized(tensor, scale, first, last)
            else:
                theirs = stored.read(tensor, *whole).reshape(ours.shape)
            with np.errstate(all="ignore"):  # what is no finite number is outside
                error = np.nan_to_num(np.abs(ours - theirs), nan=np.inf, posinf=np.inf)
                largest = max(largest, float(error.max()))
                by_row = self.weighted and info.type not in FLOATS
                allowed = None if by_row else bound(info.type, theirs, self.exact)
                if allowed is None:  # a row's error on the whole
                    bits = 8 * info.n_bytes / info.n_elements
                    error = np.sqrt(np.square(error).mean(1))
                    allowed = 2 ** (2 + by_row - bits) * np.sqrt(np.square(theirs).mean(1))
                elif (slack := _slack(info.type, stored, tensor, first, last)) is not None:
                    allowed = allowed + slack
                outside += int(np.count_nonzero(~(error <= allowed)))
                forbidden |= bool((error[allowed == 0] != 0).any())
                shares = np.divide(error, allowed, out=np.zeros_like(error), where=allowed > 0)
                share = max(share, float(shares.max()))
        return TensorCheck(name, info.type, largest, None if forbidden else share, outside)

    def _name(self, part: str, copy: int | None) -> str:
        """The file's name of a part, `copy` being the block of the file."""
        if part == "head" and "output.weight" not in self.infos:
            part = "embedding"  # tied
        return ("" if copy is None else f"blk.{copy}.") + f"{FILE_PARTS[part]}.weight"

    def _info(self, part: str, block: int | None) -> TensorInfo:
        return self.infos[self._name(part, None if block is None else self.copies[block][0])]

    def _read(self, info: TensorInfo, part: str, first: int, last: int) -> Floats:
        """Rows first..last, whole heads of q and k, in the checkpoint's order."""
        row_bytes = info.n_bytes // (info.n_elements // info.shape[-1])
        data = np.fromfile(
            self.path, np.uint8, (last - first) * row_bytes, offset=info.start + first * row_bytes
        )
        values = dequantize(data, info.type_id, info.shape[-1])
        if part not in ("q", "k") or not self.reordered:
            return values
        half = self.reference.hyper.head_dim // 2
        pair = (half, 2) if self.arch in NEIGHBOURS else (2, half)
        heads = values.reshape(-1, *pair, info.shape[-1])
        return np.ascontiguousarray(heads.swapaxes(1, 2)).reshape(values.shape)


def _slack(
    kind: str, stored: StoredWeights, tensor: Tensor, first: int, last: int
) -> Floats | None:
    """How much further rounded weights may lie from those of `stored` since they were rounded from
    sums in float32. To floats a sum brings its own error, twice where it is rounded afterwards; in
    a block it may also move the scale, by the largest error among its weights."""
    slack = stored.slack(tensor, first, last) if isinstance(stored, MergedWeights) else None
    if slack is None or kind == "f32":
        return slack
    return 2 * slack if kind in FLOATS else 4 * slack.max(1, keepdims=True)


def round_input(x: torch.Tensor, kind: str) -> torch.Tensor:
    """x [tokens, columns] as it goes into ggml's multiplication with weights of type `kind`.

    Quantized weights meet int8 numbers with a scale for 32 (K-quants: 256), F16 and BF16 ones
    their own kind; two bits of F16 are left to processors that sum in F16 as well. F32 is not
    rounded: a 2^-17th stands for the order of its sums.
    """
    import torch

    if kind == "f32":
        return ((x.contiguous().view(torch.int32) + 32) & ~63).view(torch.float32)
    if kind == "bf16":
        return x.bfloat16().float()
    if kind == "f16":
        return ((x.half().view(torch.int16) + 2) & ~3).view(torch.float16).float()
    blocks = x.view(len(x), -1, 256 if kind.endswith("_K") else 32)
    scale = blocks.abs().amax(-1, keepdim=True) / 127
    numbers = (blocks / scale.clamp(min=1e-30)).round()
    return (numbers * scale.half().float()).view(x.shape)
