"""The metadata keys of a model, each named once: the converter writes them, checks.cpp accepts no
others in a `mobilellm` file, the fused step runs a model only where it knows all of its keys, and
`inspect` and `verify` read them. {arch} stands for the architecture's name.

A new key is a line here. Then write the C++ side anew, which holds the same list:

.venv/bin/python convert/keys.py > mobilellm_cpp/native/llama/keys.inc
"""

from __future__ import annotations

from gguf.constants import Keys

KNOWN: dict[str, tuple[bool, bool]] = {}  # key: in a mobilellm file, computed by the fused step


def _key(name: str, ours: bool = True, fused: bool = True) -> str:
    KNOWN[name] = (ours, fused)
    return name


BLOCK_COUNT = _key(Keys.LLM.BLOCK_COUNT)
CONTEXT_LENGTH = _key(Keys.LLM.CONTEXT_LENGTH)
EMBEDDING_LENGTH = _key(Keys.LLM.EMBEDDING_LENGTH)
FEED_FORWARD_LENGTH = _key(Keys.LLM.FEED_FORWARD_LENGTH)
HEAD_COUNT = _key(Keys.Attention.HEAD_COUNT)
HEAD_COUNT_KV = _key(Keys.Attention.HEAD_COUNT_KV)
KEY_LENGTH = _key(Keys.Attention.KEY_LENGTH)
VALUE_LENGTH = _key(Keys.Attention.VALUE_LENGTH)
NORM_EPSILON = _key(Keys.Attention.LAYERNORM_RMS_EPS)
ROPE_DIMENSIONS = _key(Keys.Rope.DIMENSION_COUNT)
ROPE_BASE = _key(Keys.Rope.FREQ_BASE)
VOCAB_SIZE = _key(Keys.LLM.VOCAB_SIZE)
SLIDING_WINDOW = _key(Keys.Attention.SLIDING_WINDOW)
SLIDING_PATTERN = _key(Keys.Attention.SLIDING_WINDOW_PATTERN)

# of this project, the third of upstream's granite_swa, too
BLOCK_SCHEDULE = _key("{arch}.block_schedule")  # the stored block of each executed layer
QK_NORM = _key("{arch}.attention.qk_norm")  # where RoPE is applied, without weights
ROPE_PATTERN = _key("{arch}.attention.rope_pattern")  # of stored blocks: 1 where it is applied

# of this project in files of any architecture, which stock llama.cpp passes over
EXACT = _key("mobilellm.exact")  # --type exact wrote it
SPACE_PREFIX = _key("mobilellm.tokenizer.space_prefix")  # see text_rules.py
ADDED_TOKENS = _key("mobilellm.tokenizer.added_tokens")
ADDED_TOKEN_FLAGS = _key("mobilellm.tokenizer.added_token_flags")

# llama-quantize's: for so many matrices rounding heeded how strong the columns of inputs are
IMATRIX_ENTRIES = "quantize.imatrix.entries_count"

# of other programs' Llamas
LOGIT_SCALE = _key(Keys.LLM.LOGIT_SCALE, ours=False, fused=False)
CAUSAL = _key(Keys.Attention.CAUSAL, ours=False)
_key(Keys.Attention.SCALE, ours=False)
_key(Keys.LLM.EXPERT_COUNT, ours=False)  # 0, or its matrices would be others
_key(Keys.LLM.EXPERT_USED_COUNT, ours=False)
_key(Keys.LLM.POOLING_TYPE, ours=False)
_key(Keys.Rope.SCALING_TYPE, ours=False)  # what it makes of a context is looked at there
_key(Keys.Rope.SCALING_FACTOR, ours=False)
_key("{arch}.rope.scale_linear", ours=False)  # the former name of the factor
_key(Keys.Rope.SCALING_ORIG_CTX_LEN, ours=False)
_key(Keys.Rope.SCALING_FINETUNED, ours=False)


def key(name: str, arch: str) -> str:
    """The key in a file of an architecture."""
    return name.format(arch=arch)


def native() -> str:
    """The list in C++."""
    lines = ["// made by convert/keys.py: key, in a mobilellm file, computed by the fused step"]
    for name, flags in sorted(KNOWN.items(), key=lambda item: item[0].partition(".")[2]):
        ours, fused = (str(flag).lower() for flag in flags)
        stem = name.partition(".")[2]
        lines.append(f'{{ "{stem}", {ours}, {fused} }},')
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(native(), end="")
