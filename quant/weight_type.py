"""What people write for types of weights and of the KV cache; types.py takes time to import."""

from typing import Literal, get_args

WeightType = Literal["f32", "f16", "bf16", "q8_0", "q4_0", "exact"]
# What a file may be made in: a recipe of `mobilellm quantize` (quant/budget.py), too.
Recipe = Literal["tiny", "small", "balanced", "best"]
FileType = Literal[WeightType, Recipe]
RECIPE_NAMES = get_args(Recipe)
# Where nobody chose: of the command line and MobileLLM.from_checkpoint.
DEFAULT_TYPE: FileType = "balanced"
DEFAULT_COST = "6 bits a weight, about 0.03 nats from the original's predictions"
# Of a KV cache: without a word q8_0 where blocks are shared, else f16 (engine/gguf_file.py).
CacheType = Literal["f32", "f16", "q8_0", "q4_0"]
