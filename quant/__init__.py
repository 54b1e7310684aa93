"""Types of GGUF tensors, the choice of one for each tensor, and rounding to it."""
