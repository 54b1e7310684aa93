"""Checkpoints of the MobileLLM family become GGUF files."""

from .checkpoint import Checkpoint, open_checkpoint
from .conversion import ConversionReport, convert_checkpoint

__all__ = ["Checkpoint", "ConversionReport", "convert_checkpoint", "open_checkpoint"]
