"""What a caller may hand to a model: every argument is checked before anything is done with it.

Pure functions that give the values back as plain Python, or raise ModelError with one sentence
that names the argument. llama-cpp-python passes most of them on to C unseen.
"""

import math
import operator
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ..errors import ModelError
from ..quant.weight_type import CacheType
from .sampling_types import SETTINGS, Setting

Check = Callable[[str, Any], Any]  # name and value to the value as plain Python

MAX_TOKENS = 1 << 28  # of a context or a batch
MAX_THREADS = 512  # of ggml
MAX_SEED = 2**32 - 1
GREEDY_BELOW = 1e-4  # a lower temperature can only overflow

# Types of KV caches that llama.cpp's CPU kernels read and write, by their numbers in ggml.
CACHE_TYPES = {
    0: "GGML_TYPE_F32",
    1: "GGML_TYPE_F16",
    30: "GGML_TYPE_BF16",
    8: "GGML_TYPE_Q8_0",
    2: "GGML_TYPE_Q4_0",
    3: "GGML_TYPE_Q4_1",
    6: "GGML_TYPE_Q5_0",
    7: "GGML_TYPE_Q5_1",
    20: "GGML_TYPE_IQ4_NL",
}
FLOAT_CACHES = (0, 1, 30)
CACHE_NAMES: dict[CacheType, int] = {"f32": 0, "f16": 1, "q8_0": 8, "q4_0": 2}  # of cache_type


def shown(value: Any) -> str:
    """A value as a message shows it: short, whatever it is."""
    if isinstance(value, int) and value.bit_length() > 128:
        return f"a number of {value.bit_length()} bits"
    try:
        text = repr(value)
    except Exception:  # a stranger's class
        text = f"a {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:77]}..."


def _whole(low: int, high: int) -> Check:
    def check(name: str, value: Any) -> int:
        try:
            if isinstance(value, bool):
                raise TypeError
            number = operator.index(value)
        except TypeError:
            raise ModelError(f"{name} is {shown(value)}, not a whole number") from None
        if not low <= number <= high:
            raise ModelError(f"{name} is {shown(number)}, outside {low} to {high}")
        return number

    return check


def _number(low: float, high: float) -> Check:
    def check(name: str, value: Any) -> float:
        try:
            if isinstance(value, (bool, str, bytes)):
                raise TypeError
            number = float(value)
        except (TypeError, ValueError):
            raise ModelError(f"{name} is {shown(value)}, not a number") from None
        except OverflowError:
            number = math.inf
        if not low <= number <= high:  # nor is NaN
            raise ModelError(f"{name} is {shown(value)}, outside {low:g} to {high:g}")
        return number

    return check


def _flag(name: str, value: Any) -> bool:
    known = isinstance(value, (bool, np.bool_)) or (isinstance(value, int) and value in (0, 1))
    if not known:
        raise ModelError(f"{name} is {shown(value)}, neither True nor False")
    return bool(value)


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise ModelError(f"{name} is {shown(value)}, not a text")
    return value


def _path(name: str, value: Any) -> str:
    try:
        path = os.fsdecode(value)
    except TypeError:
        raise ModelError(f"{name} is {shown(value)}, not a path") from None
    if "\0" in path:
        raise ModelError(f"{name} is {shown(value)}, and a path cannot contain a zero byte")
    return path


def _file(name: str, value: Any) -> str:
    path = _path(name, value)
    if not os.path.isfile(path):
        raise ModelError(f"{path}: no such file")
    return path


def _callable(name: str, value: Any) -> Any:
    if not callable(value):
        raise ModelError(f"{name} is {shown(value)}, which cannot be called")
    return value


def _callables(name: str, value: Any) -> Any:
    if isinstance(value, (list, tuple)):  # llama_cpp's lists of processors are such, too
        for item in value:
            _callable(f"an item of {name}", item)
        return value
    return _callable(name, value)


def _with(method: str) -> Check:
    def check(name: str, value: Any) -> Any:
        if not hasattr(value, method):
            raise ModelError(f"{name} is {shown(value)}, which has no {method}")
        return value

    return check


def _choice(names: Mapping[int, str], what: str) -> Check:
    def check(name: str, value: Any) -> int:
        choices = ", ".join(f"{text} ({number})" for number, text in names.items())
        if isinstance(value, bool) or not hasattr(value, "__index__"):
            raise ModelError(f"{name} is {shown(value)}, not the number of {what}: {choices}")
        if operator.index(value) not in names:
            raise ModelError(f"{name} is {shown(value)}, not one of the {what}s {choices}")
        return operator.index(value)

    return check


def _name_of(names: Mapping[Any, Any]) -> Check:
    def check(name: str, value: Any) -> str:
        if not isinstance(value, str) or value not in names:
            raise ModelError(f"{name} is {shown(value)}, not one of {', '.join(names)}")
        return value

    return check


def _optional(check: Check) -> Check:
    return lambda name, value: None if value is None else check(name, value)


def _numa(name: str, value: Any) -> bool | int:
    return value if isinstance(value, bool) else int(_whole(0, 4)(name, value))


def _split(name: str, value: Any) -> list[float]:
    if not isinstance(value, (list, tuple)) or not 0 < len(value) <= 16:
        raise ModelError(f"{name} is {shown(value)}, not a list of 1 to 16 shares")
    return [_number(0, 1e9)(f"an item of {name}", item) for item in value]


def _overrides(name: str, value: Any) -> dict[str, bool | int | float | str]:
    """Upstream keeps keys and texts in 128 bytes, of which the last must stay zero."""
    if not isinstance(value, dict):
        raise ModelError(f"{name} is {shown(value)}, not a dict")
    for key, item in value.items():
        entry = f"{name}[{shown(key)}]"
        if not isinstance(key, str) or not _fits(key) or not key:
            raise ModelError(f"{entry}: a key is a text of 1 to 127 bytes")
        if isinstance(item, str):
            if not _fits(item):
                raise ModelError(f"{entry} is longer than 127 bytes, or holds a zero byte")
        elif isinstance(item, float):
            _number(-3.4e38, 3.4e38)(entry, item)
        elif isinstance(item, int):
            _whole(-(2**63), 2**63 - 1)(entry, int(item))
        else:
            raise ModelError(f"{entry} is {shown(item)}, neither bool, int, float nor text")
    return value


def _fits(text: str) -> bool:
    return "\0" not in text and len(text.encode("utf-8", "surrogatepass")) < 128


_CONSTRUCTOR: dict[str, Check] = {
    "model_path": _path,
    "n_ctx": _whole(0, MAX_TOKENS),
    "n_threads": _optional(_whole(0, MAX_THREADS)),
    "n_threads_batch": _optional(_whole(0, MAX_THREADS)),
    "n_batch": _whole(1, MAX_TOKENS),
    "n_ubatch": _whole(1, MAX_TOKENS),
    "n_gpu_layers": _whole(-1, 2**31 - 1),
    "main_gpu": _whole(0, 255),
    "split_mode": _choice({0: "none", 1: "layer", 2: "row"}, "split mode"),
    "tensor_split": _optional(_split),
    "vocab_only": _flag,
    "use_mmap": _flag,
    "use_mlock": _flag,
    "kv_overrides": _optional(_overrides),
    "seed": _optional(_whole(-1, MAX_SEED)),
    "rope_scaling_type": _optional(
        _choice(
            {-1: "as the file says", 0: "none", 1: "linear", 2: "YaRN", 3: "LongRoPE"},
            "RoPE scaling type",
        )
    ),
    "pooling_type": _choice(
        {-1: "as the file says", 0: "none", 1: "mean", 2: "first", 3: "last", 4: "rank"},
        "pooling type",
    ),
    "attention_type": _choice(
        {-1: "as the file says", 0: "causal", 1: "not causal"}, "attention type"
    ),
    "rope_freq_base": _number(0, 1e30),
    "rope_freq_scale": _number(0, 1e30),
    "yarn_ext_factor": _number(-1e6, 1e6),
    "yarn_attn_factor": _number(-1e6, 1e6),
    "yarn_beta_fast": _number(-1e6, 1e6),
    "yarn_beta_slow": _number(-1e6, 1e6),
    "yarn_orig_ctx": _whole(0, MAX_TOKENS),
    "logits_all": _flag,
    "embedding": _flag,
    "offload_kqv": _flag,
    "flash_attn": _optional(_flag),
    "op_offload": _optional(_flag),
    "swa_full": _optional(_flag),
    "no_perf": _flag,
    "last_n_tokens_size": _whole(0, 1 << 20),
    "lora_base": _optional(_file),
    "lora_scale": _number(-1e6, 1e6),
    "lora_path": _optional(_file),
    "numa": _numa,
    "chat_format": _optional(_text),
    "chat_handler": _optional(_callable),
    "draft_model": _optional(_callable),
    "tokenizer": _optional(_with("tokenize")),
    "cache_type": _optional(_name_of(CACHE_NAMES)),
    "type_k": _optional(_choice(CACHE_TYPES, "cache type")),
    "type_v": _optional(_choice(CACHE_TYPES, "cache type")),
    "spm_infill": _flag,
    "verbose": _flag,
}


def _setting(setting: Setting) -> Check:
    if setting.kind is float:
        return _number(setting.least, setting.most)
    return _whole(int(setting.least), int(setting.most))


# llama_cpp.Llama's meanings of -1: all tokens (max_tokens, top_k), any seed
_SAMPLING: dict[str, Check] = {
    **{name: _setting(setting) for name, setting in SETTINGS.items()},
    "max_tokens": _optional(_whole(-1, int(SETTINGS["max_tokens"].most))),
    "temp": _setting(SETTINGS["temperature"]),
    "top_k": _whole(-1, int(SETTINGS["top_k"].most)),
    "tfs_z": _number(-1e6, 1e6),  # which llama.cpp has no more
    "mirostat_mode": _choice({0: "off", 1: "Mirostat", 2: "Mirostat 2"}, "Mirostat mode"),
    "penalize_nl": _flag,
    "seed": _optional(_whole(-1, MAX_SEED)),
    "logprobs": _optional(_whole(0, MAX_TOKENS)),
    "top_logprobs": _optional(_whole(0, MAX_TOKENS)),
    "logits_processor": _optional(_callables),
    "stopping_criteria": _optional(_callables),
    "grammar": _optional(_with("_grammar")),
}


def _checked(checks: Mapping[str, Check], values: Mapping[str, Any], owner: str) -> dict[str, Any]:
    for name in values:
        if name not in checks:
            import difflib

            near = difflib.get_close_matches(str(name), checks, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ModelError(f"{owner} has no argument {name}{hint}")
    return {name: checks[name](name, value) for name, value in values.items()}


def check_constructor(**values: Any) -> dict[str, Any]:
    """The arguments of MobileLLM, those of llama_cpp.Llama among them. Raises ModelError for an
    unknown name, naming the nearest one, and for a value that is of the wrong kind, out of range,
    or does not go with another."""
    checked = _checked(_CONSTRUCTOR, values, "MobileLLM")
    if (name := checked.pop("cache_type", None)) is not None:
        if checked.get("type_k") is not None or checked.get("type_v") is not None:
            raise ModelError("cache_type sets type_k and type_v: give it or them, not both")
        checked["type_k"] = checked["type_v"] = CACHE_NAMES[name]
    types = [checked.get(name) for name in ("type_k", "type_v")]
    whole = [kind for kind in types if kind is not None and kind not in FLOAT_CACHES]
    flash = checked.get("flash_attn")
    if whole and (flash is False or (flash is None and 0 in types)):
        partner = "with flash_attn off" if flash is False else f"beside one of {CACHE_TYPES[0]}"
        raise ModelError(
            f"a KV cache of type {CACHE_TYPES[whole[0]]} cannot be used {partner}: "
            f"quantized caches need flash attention"
        )
    return checked


def check_sampling(*, n_vocab: int | None = None, **values: Any) -> dict[str, Any]:
    """The arguments of stream, create_completion and sample that say how tokens are chosen. A
    temperature too low to divide by is 0, greedy. Raises ModelError as check_constructor does, and
    for logit_bias where an id is outside a vocabulary of n_vocab."""
    bias = _optional(_bias(n_vocab or MAX_TOKENS))
    checked = _checked({**_SAMPLING, "logit_bias": bias}, values, "sampling")
    for name in ("temperature", "temp"):
        if 0 < checked.get(name, 0) < GREEDY_BELOW:
            checked[name] = 0.0
    return checked


def _bias(n_vocab: int) -> Check:
    def check(name: str, value: Any) -> dict[int, float]:
        if not isinstance(value, Mapping):
            raise ModelError(f"{name} is {shown(value)}, not a dict of token ids to numbers")
        checked = {}
        for key, bias in value.items():
            if isinstance(key, str) and key.isdecimal() and len(key) < 12:
                key = int(key)  # as JSON has it
            token = _whole(0, n_vocab - 1)(f"a token of {name}", key)
            checked[token] = _number(-math.inf, 1e6)(f"{name}[{token}]", bias)
        return checked

    return check


def check_stop(stop: Any) -> tuple[str, ...]:
    """The texts at which an answer ends: one text, a sequence of texts, or None for none. Raises
    ModelError for others, and for an empty text, which would end every answer at once."""
    texts = () if stop is None else (stop,) if isinstance(stop, str) else stop
    if not isinstance(texts, Sequence) or isinstance(texts, (bytes, bytearray)):
        raise ModelError(f"stop is {shown(stop)}, not a text or a list of texts")
    for text in texts:
        if not isinstance(text, str):
            raise ModelError(f"stop holds {shown(text)}, which is not a text")
        if not text:
            raise ModelError("stop holds an empty text, which would end every answer at once")
    return tuple(texts)
