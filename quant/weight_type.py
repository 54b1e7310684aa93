"""What people write for the type of the weights; apart from types.py, whose imports take time."""

from typing import Literal

WeightType = Literal["f32", "f16", "bf16", "q8_0", "q4_0", "exact"]
