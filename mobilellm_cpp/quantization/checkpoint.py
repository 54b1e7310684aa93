"""A checkpoint as a file of any type, recipes included: converted in its floats, then rounded."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

from ..convert import Checkpoint, convert_checkpoint
from ..convert.conversion import ConversionReport
from ..convert.gguf_file import OutputError, check_output
from ..errors import CheckpointError
from ..quant.budget import UNCALIBRATED
from ..quant.calibration_text import builtin_text
from ..quant.weight_type import FileType
from .importance import column_importance
from .run import Progress, best_plan, quantize_file
from .source import Source


def float_type(checkpoint: Checkpoint) -> str:
    """The float type that holds all of a checkpoint's weights."""
    kinds = {tensor.dtype for tensor in checkpoint.tensors().values()}
    return "f32" if "F32" in kinds else "bf16" if "BF16" in kinds else "f16"


def convert_to(
    checkpoint: Checkpoint,
    out: str | Path | None,
    type: FileType,
    *,
    head: str | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> ConversionReport:
    """convert_checkpoint, which takes the same `options`, where `type` may be a recipe. That one is
    not calibrated, which would take minutes: errors are weighted by how strong the columns of the
    inputs are, and bits are given by what kind a matrix is."""
    if type not in UNCALIBRATED:
        options["type"] = type
        return convert_checkpoint(checkpoint, out, head=head, progress=progress, **options)
    if head is not None:
        raise CheckpointError(
            "a type for the head goes with a type: recipes choose the head's, too"
        )
    path = Path(f"{checkpoint.name}-{type}.gguf" if out is None else out).expanduser()
    check_output(path, checkpoint.files)
    try:
        scratch = tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror}.") from error
    with scratch as folder:
        whole = Path(folder) / path.name
        merged = options.get("adapter") is not None  # sums that are rounded only once
        options["type"] = "f32" if merged else float_type(checkpoint)
        try:
            report = convert_checkpoint(checkpoint, whole, progress=progress, **options)
        except OutputError as error:
            raise OutputError(str(error).replace(str(whole), str(path))) from None
        source = Source(whole)
        plan = best_plan(source, type, UNCALIBRATED[type], None)
        imatrix = column_importance(source, builtin_text())
        made = quantize_file(source, path, plan, imatrix=imatrix, progress=progress)
    return dataclasses.replace(
        report,
        path=path,
        type=type,
        size_bytes=made.size,
        bits_per_weight=made.bits_per_weight,
    )
