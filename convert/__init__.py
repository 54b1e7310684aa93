"""Checkpoints of the MobileLLM family, and LoRA adapters for them, become GGUF files."""

from .adapter import Adapter
from .adapter_conversion import AdapterReport, convert_adapter
from .checkpoint import Checkpoint, open_checkpoint, open_source
from .conversion import ConversionReport, convert_checkpoint

__all__ = [
    "Adapter",
    "AdapterReport",
    "Checkpoint",
    "ConversionReport",
    "convert_adapter",
    "convert_checkpoint",
    "open_checkpoint",
    "open_source",
]
