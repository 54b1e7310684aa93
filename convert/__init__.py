"""Checkpoints of the MobileLLM family become GGUF files."""

from .conversion import ConversionReport, checkpoint_fingerprint, convert_checkpoint

__all__ = ["ConversionReport", "checkpoint_fingerprint", "convert_checkpoint"]
