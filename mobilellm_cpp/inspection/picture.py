"""The blocks of a model and the order in which they run, drawn with characters.

blocks 4-5 │        ■■■■
blocks 2-3 │    ■■■■
blocks 0-1 │■■■■
     layer  0         10
"""

from collections.abc import Sequence

ROWS = 8  # at most: so many lines of a terminal are seen at a glance

# What a layer does: attention over all tokens or over a window, with RoPE or without.
MARKS = {(False, True): "■", (True, True): "□", (False, False): "◆", (True, False): "◇"}
WORDS = {
    "■": "full attention",
    "□": "a window",
    "◆": "full attention without RoPE",
    "◇": "a window without RoPE",
}


def draw(schedule: Sequence[int], marks: Sequence[str], width: int = 100) -> list[str]:
    """Lines of a picture: a column for each executed layer, a row for each stored block or for a
    few of them, block 0 at the bottom. `schedule` is the block of each layer, `marks` what stands
    for the layer. Where `width` characters do not do, a column is for several layers."""
    stored = max(schedule) + 1
    per_row = -(-stored // ROWS)
    rows = -(-stored // per_row)
    labels = []
    for row in range(rows):
        first, last = row * per_row, min(stored, (row + 1) * per_row) - 1
        labels.append(f"block {first}" if first == last else f"blocks {first}-{last}")
    edge = max(map(len, [*labels, "layer"]))
    per_column = max(1, -(-len(schedule) // max(10, width - edge - 2)))
    columns = -(-len(schedule) // per_column)
    cells = [[" "] * columns for _ in range(rows)]
    for layer, (block, mark) in enumerate(zip(schedule, marks, strict=True)):
        cells[block // per_row][layer // per_column] = mark
    lines = [f"{labels[row]:>{edge}} │{''.join(cells[row]).rstrip()}" for row in range(rows)]
    ticks = "".join(f"{at * per_column:<10}" for at in range(0, columns, 10))
    lines = [*lines[::-1], f"{'layer':>{edge}}  {ticks.rstrip()}"]
    if used := [f"{mark} {WORDS[mark]}" for mark in WORDS if mark in marks and set(marks) != {"■"}]:
        lines.append(f"{'':>{edge}}  {', '.join(used)}")
    return lines
