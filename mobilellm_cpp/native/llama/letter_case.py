"""Writes letter_case.inc: the letters of categories Ll and of Lu and Lt as runs, from unicodedata.

python mobilellm_cpp/native/llama/letter_case.py > mobilellm_cpp/native/llama/letter_case.inc
"""

import sys
import unicodedata


def runs(letters: list[int]) -> list[tuple[int, int, int]]:
    """First, last and step (1 or 2: many alphabets alternate) of each run."""
    found = []
    at = 0
    while at < len(letters):
        ends = []
        for step in (1, 2):
            end = at
            while end + 1 < len(letters) and letters[end + 1] == letters[end] + step:
                end += 1
            ends.append((end, step))
        end, step = max(ends, key=lambda run: run[0])
        found.append((letters[at], letters[end], step))
        at = end + 1
    return found


print(f"// Unicode {unicodedata.unidata_version}, made by letter_case.py: first, last, step")
for name, categories in (("lower", ("Ll",)), ("upper", ("Lu", "Lt"))):
    letters = [c for c in range(sys.maxunicode + 1) if unicodedata.category(chr(c)) in categories]
    cells = [f"{{ {first:#x}, {last:#x}, {step} }}," for first, last, step in runs(letters)]
    print(f"static const run {name}[] = {{")
    for i in range(0, len(cells), 5):
        print("    " + " ".join(cells[i : i + 5]))
    print("};")
