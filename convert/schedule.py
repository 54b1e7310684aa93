"""The order in which the stored blocks of a model are executed."""

from __future__ import annotations

from collections.abc import Sequence

from mobilellm_cpp.errors import CheckpointError

MAX_LAYERS = 512  # llama.cpp's limit on executed layers


def parse_schedule(schedule: str | Sequence[int], blocks: int) -> tuple[int, ...]:
    """The stored block of each executed layer, from a name, a list in a string, or numbers.

    Names: immediate (each block twice in a row), repeat-all-over (all, then all again), reverse
    (all, then all backwards). Every one of the `blocks` must be executed at least once.
    """
    order = range(blocks)
    named = {
        "immediate": [i for i in order for _ in range(2)],
        "repeat-all-over": [*order, *order],
        "reverse": [*order, *reversed(order)],
    }
    if isinstance(schedule, str):
        try:
            layers = named.get(schedule) or [int(i) for i in schedule.split(",") if schedule]
        except ValueError:
            raise CheckpointError(
                f"schedule must be {', '.join(named)} or block numbers such as 0,0,1,1, "
                f"not {schedule[:60]!r}."
            ) from None
    else:
        layers = list(schedule)
    for block in layers:
        if isinstance(block, bool) or not isinstance(block, int) or not 0 <= block < blocks:
            raise CheckpointError(
                f"schedule names block {block!r}, but the checkpoint has blocks 0 to {blocks - 1}."
            )
    if not layers:
        raise CheckpointError("schedule is empty: it must name a block for each executed layer.")
    if len(layers) > MAX_LAYERS:
        raise CheckpointError(
            f"schedule executes {len(layers)} layers, and llama.cpp takes at most {MAX_LAYERS}."
        )
    if unused := sorted(set(order) - set(layers)):
        raise CheckpointError(f"schedule never executes block {unused[0]}, which would be stored.")
    return tuple(layers)
