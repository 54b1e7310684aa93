"""A LoRA adapter in PEFT's folder layout: for each module it adapts, b @ a times a scale.

Only what adds b @ a to a matrix is understood. Everything else that PEFT can put into such a folder
changes the computation in another way, and is refused by the name of its field or tensor.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mobilellm_cpp.errors import CheckpointError

from .config import Config
from .safetensors_file import read_safetensors
from .tensor import BITS, Tensor, plain_name, shown
from .torch_file import read_torch
from .weight_files import WEIGHTS, check_whole

CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")

# Fields that say how an adapter was trained, or what is read here by name.
READ = {
    *("peft_type", "task_type", "base_model_name_or_path", "revision", "peft_version"),
    *("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "init_lora_weights"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("auto_mapping", "inference_mode", "lora_dropout", "megatron_core", "qalora_group_size"),
    *("loftq_config", "eva_config", "runtime_config", "ensure_weight_tying", "bias"),
}
# Ways to begin the training that leave the base's weights alone.
NEUTRAL_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")

PART = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])\.weight")


@dataclass(frozen=True)
class LowRank:
    """What an adapter adds to a matrix: scale * b @ a, a being (rank, columns) and b (rows, rank);
    alpha is `scale` times the rank for plain LoRA."""

    a: Tensor
    b: Tensor
    scale: float


class Adapter:
    """An adapter's folder; `name` is what people call it, `base` what adapter_config.json calls the
    checkpoint it belongs to, "" where it does not say, and `revision` which one of it."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder = folder
        self.name = name
        for path in (folder / file for file in (CONFIG, *ADAPTER_WEIGHTS)):
            if path.exists() and not path.is_file():
                raise CheckpointError(f"{path} is not an ordinary file.")
        self.config = Config(folder / CONFIG)
        self._refuse_other_kinds()
        self.alpha = self.config.number("lora_alpha", 1e6, default=8)
        self._rank = self.config.integer("r", 1 << 16, default=8)
        self._rslora = self.config.flag("use_rslora")
        self._ranks = self._pattern("rank_pattern")
        self._alphas = self._pattern("alpha_pattern")
        base = self.config.get("base_model_name_or_path")
        self.base = base if isinstance(base, str) else ""
        self.revision = self.config.get("revision") or None
        if not isinstance(self.revision, str | None):
            raise self.config.refusal("revision", "must be a string", self.revision)
        found = [folder / file for file in ADAPTER_WEIGHTS if (folder / file).exists()]
        if not found:
            raise CheckpointError(
                f"{folder} has no weights: {' and '.join(ADAPTER_WEIGHTS)} are missing."
            )
        self.weights = found[0]

    @property
    def files(self) -> list[Path]:
        """All files that a conversion reads."""
        return [self.config.path, self.weights]

    def parts(self) -> dict[str, LowRank]:
        """What is added to the matrix of each module, by the module's name in the base."""
        check_whole(self.weights)
        read = read_torch if self.weights.suffix == ".bin" else read_safetensors
        sides: dict[str, dict[str, Tensor]] = {}
        for tensor in read(self.weights).values():
            match = PART.fullmatch(plain_name(tensor.name))
            if tensor.name.endswith(".base_layer.weight"):  # PEFT's copy of an adapted head
                continue
            if match is None:
                raise CheckpointError(f"{tensor} {_what_it_is(tensor.name)}.")
            if tensor.dtype not in BITS:
                raise CheckpointError(f"{tensor} is {tensor.dtype}: it must be F32, F16 or BF16.")
            module = sides.setdefault(match["module"], {})
            if match["side"] in module:
                raise CheckpointError(f"{tensor} is there twice.")
            module[match["side"]] = tensor
        if not sides:
            raise CheckpointError(f"{self.weights} holds no tensors.")
        return {module: self._low_rank(module, parts) for module, parts in sides.items()}

    def _low_rank(self, module: str, sides: Mapping[str, Tensor]) -> LowRank:
        for side, other in ("AB", "BA"):
            if side not in sides:
                raise CheckpointError(f"{sides[other]} has no lora_{side}.weight beside it.")
        a, b = sides["A"], sides["B"]
        rank = int(self._match(self._ranks, module) or self._rank)
        if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != rank or b.shape[1] != rank:
            raise CheckpointError(
                f"{a} and its lora_B have shapes {list(a.shape)} and {list(b.shape)}, and "
                f"{CONFIG} makes their rank {rank}."
            )
        alpha = self._match(self._alphas, module) or self.alpha
        return LowRank(a, b, alpha / (math.sqrt(rank) if self._rslora else rank))

    def _match(self, pattern: Mapping[str, float], module: str) -> float | None:
        """The value of the first key that matches the end of a module's name (PEFT's
        get_pattern_key)."""
        for key, value in pattern.items():
            if re.match(rf"(.*\.)?({key})$", module):
                return value
        return None

    def _pattern(self, field: str) -> dict[str, float]:
        """rank_pattern or alpha_pattern: numbers by regular expressions for names of modules."""
        pattern = self.config.get(field) or {}
        if not isinstance(pattern, dict):
            raise self.config.refusal(field, "must be an object of numbers", pattern)
        for key, value in pattern.items():
            whole = field == "rank_pattern"
            high = 1 << 16 if whole else 1e6
            self.config.check_number(field, value, high)
            if whole and not isinstance(value, int):
                raise self.config.refusal(field, "must hold whole numbers", value)
            _check_expression(self.config, field, key)
        return pattern

    def _refuse_other_kinds(self) -> None:
        """Refuse whatever the folder may hold beside b @ a."""
        config = self.config
        if config.get("peft_type") != "LORA":
            raise config.refusal("peft_type", "must be LORA", config.get("peft_type"))
        if config.get("use_dora"):
            raise CheckpointError(
                f"{config.path}: use_dora is set, and DoRA scales whole columns of the merged "
                "matrix: merge it with peft's merge_and_unload() and convert the result."
            )
        start = config.get("init_lora_weights")
        if not any(start is neutral for neutral in NEUTRAL_STARTS) and start not in NEUTRAL_STARTS:
            raise config.refusal(
                "init_lora_weights",
                "must be true: any other start changes the base too (save_pretrained with "
                "path_initial_model_for_weight_conversion makes a plain LoRA of it)",
                start,
            )
        if config.get("bias", "none") != "none":
            raise config.refusal(
                "bias", "must be none, for the graph has no biases", config.get("bias")
            )
        if modules := config.get("modules_to_save"):
            raise config.refusal(
                "modules_to_save",
                "must be absent: an adapter file cannot hold whole matrices (merge them)",
                modules,
            )
        for field, value in config.fields.items():
            if field not in READ and value not in (None, False, 0, [], {}, ""):
                raise config.refusal(shown(field), "must be absent or false", value)


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds a PEFT adapter and no whole model."""
    return (folder / CONFIG).exists() and not any((folder / name).exists() for name in WEIGHTS)


def _check_expression(config: Config, field: str, expression: str) -> None:
    """Refuse an expression that is none, or could take for ever on the name of a module."""
    choices = 40.0 ** sum(expression.count(c) for c in "*+?{") * 2.0 ** expression.count("|")
    nested = re.search(r"\(\?|\)[*+?{]", expression)
    if len(expression) > 200 or choices > 1e6 or nested:
        raise config.refusal(
            field, "must hold plainer expressions for names of modules", expression
        )
    try:
        re.compile(rf"(.*\.)?({expression})$")
    except (re.error, OverflowError, RecursionError) as error:
        raise config.refusal(
            field, f"must hold regular expressions ({error})", expression
        ) from None


def _what_it_is(name: str) -> str:
    """Why a tensor beside lora_A.weight and lora_B.weight is refused."""
    if "lora_magnitude_vector" in name:
        return "is a part of DoRA, which no adapter file can hold"
    if "lora_embedding" in name:
        return "adapts the embedding, which the graph does not"
    if ".lora_" in name:
        return "is a part of LoRA that no adapter file can hold"
    return "is a whole weight (modules_to_save), and an adapter file holds low-rank pairs only"
