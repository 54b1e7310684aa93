"""Draws edits of a LoRA adapter (checkpoint_edits.py); most leave files that can be parsed."""

from __future__ import annotations

import random
from typing import Any

from fuzz import strange
from fuzz.checkpoint_draw import byte_edit, file_edit, further, tree_edit, weights_edit
from fuzz.checkpoint_edits import Edit, Files

CONFIG = "adapter_config.json"

# Fields that change what an adapter means where they appear.
FURTHER_FIELDS: dict[str, Any] = {
    "use_dora": True,
    "use_rslora": False,
    "bias": "all",
    "fan_in_fan_out": True,
    "modules_to_save": ["lm_head"],
    "layer_replication": [[0, 2]],
    "init_lora_weights": "pissa",
    "alora_invocation_tokens": [3],
    "target_parameters": ["x"],
    "rank_pattern": {"q_proj": 4},
    "alpha_pattern": {"q_proj": 4},
    "lora_alpha": 16,
    "r": 4,
}
# Expressions, most of which would take for ever or are none.
EXPRESSIONS = [
    "(a+)+$",
    "(.*.*)*x",
    ".*" * 20,
    "(.|.)" * 40,
    "(?x:(o+) +)",
    "(",
    "[",
    "\\",
    "a{9999999}",
]
EXPRESSIONS += [
    "",
    "$",
    "^",
    "q_proj|k_proj",
    r"model\.layers\.\d+\..*",
    "(?P<a>q)(?P=a)",
    "\0",
    "x" * 300,
]


def draw(rng: random.Random, seed: Files) -> list[Edit]:
    """A few edits for the seed."""
    makers = [config_edit] * 6 + [pattern_edit] * 3 + [weights_edit] * 6 + [file_edit, byte_edit]
    edits: list[Edit] = []
    while not edits or rng.random() < 0.35:
        edits += rng.choice(makers)(rng, seed)
    return edits


def config_edit(rng: random.Random, files: Files) -> list[Edit]:
    if rng.random() < 0.5:
        return further(rng, CONFIG, FURTHER_FIELDS)
    return tree_edit(rng, files, CONFIG)


def pattern_edit(rng: random.Random, files: Files) -> list[Edit]:
    """Other keys of a pattern."""
    field = rng.choice(["rank_pattern", "alpha_pattern"])
    key = rng.choice([*EXPRESSIONS, strange.text(rng, "q_proj")])
    return [["json", CONFIG, [field], {key: strange.json_value(rng, 4)}]]
