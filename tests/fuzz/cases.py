"""A case: a sound input by name, the edits that spoil it, and how it is used.

A case is drawn from its kind, a seed and a number, and is plain JSON, so that it can be kept in
failed.jsonl whatever becomes of the drawing.
"""

from __future__ import annotations

import functools
import random
from pathlib import Path
from typing import Any

from fuzz import (
    adapter_draw,
    checkpoint_draw,
    checkpoint_edits,
    gguf_draw,
    gguf_edits,
    state_draw,
    strange,
    verify_draw,
)
from fuzz.seeds import ADAPTERS, CHECKPOINTS, FILES, MERGED, STATES, VERIFIED
from mobilellm_cpp.quant.types import EXACT, OUTPUT_TYPES

Case = dict[str, Any]
KINDS = ("checkpoint", "adapter", "gguf", "verify", "lora", "state")

SCHEDULES = ["immediate", "repeat-all-over", "reverse", "0,0,1,1", "1,0", "0", "2", "", "x", "0,-1"]


@functools.cache
def seed_input(kind: str, seeds: Path, name: str) -> Any:
    """The files of a checkpoint or an adapter, or the bytes of a file."""
    if kind in ("checkpoint", "adapter"):
        return checkpoint_edits.read(seeds / kind / name)
    return (seeds / (kind if kind in ("lora", "state") else "gguf") / name).read_bytes()


def draw_case(kind: str, seed: int, number: int, seeds: Path) -> Case:
    """Case `number` of a run; `seeds` is the folder that make_seeds wrote."""
    rng = random.Random(f"{kind}:{seed}:{number}")
    if kind == "checkpoint":
        name = rng.choice(list(CHECKPOINTS))
        exact = rng.random() < (0.6 if name.startswith("lattice") else 0.02)
        case: Case = {"type": EXACT if exact else rng.choice(list(OUTPUT_TYPES))}
        if rng.random() < 0.15:
            case["portable"] = True
        if rng.random() < 0.15:
            case["schedule"] = rng.choice(SCHEDULES)
        if rng.random() < 0.1:
            field, value = rng.choice(list(checkpoint_draw.FURTHER_FIELDS.items()))
            case["settings"] = {field: strange.json_value(rng, value)}
        case["edits"] = checkpoint_draw.draw(rng, seed_input(kind, seeds, name))
    elif kind == "verify":
        name = rng.choice([*VERIFIED, *MERGED])
        edits, harmless = verify_draw.draw(rng, seed_input(kind, seeds, name))
        case = {"edits": edits, "harmless": harmless}
    elif kind == "adapter":
        name = rng.choice(list(ADAPTERS))
        case = {"type": rng.choice(["f32", "f16", "bf16"]), "merge": rng.random() < 0.4}
        case["edits"] = adapter_draw.draw(rng, seed_input(kind, seeds, name))
    elif kind == "lora":
        name = rng.choice(list(ADAPTERS))
        case = {"edits": gguf_draw.draw(rng, seed_input(kind, seeds, name))}
    elif kind == "state":
        name = rng.choice(STATES)
        case = {"edits": state_draw.draw(rng, seed_input(kind, seeds, name))}
    else:
        name = rng.choice(list(FILES))
        case = {"edits": gguf_draw.draw(rng, seed_input(kind, seeds, name))}
    return {"kind": kind, "input": name, **case}


def write_case(case: Case, seeds: Path, target: Path) -> None:
    """The input of the case: the folder or file `target`."""
    source = seed_input(case["kind"], seeds, case["input"])
    if case["kind"] in ("checkpoint", "adapter"):
        checkpoint_edits.write(source, case["edits"], target)
    elif case["kind"] == "state":
        target.write_bytes(state_draw.apply(source, case["edits"]))
    else:
        target.write_bytes(gguf_edits.apply(source, case["edits"]))
