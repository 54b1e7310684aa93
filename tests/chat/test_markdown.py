"""Markdown that is drawn while it comes, on a screen of pyte."""

import random

import pyte
import pytest
from rich.console import Console

from mobilellm_cpp.chat.markdown import MarkdownStream
from mobilellm_cpp.chat.view import visible

TEXT = """# What is shared

Each *block* runs **twice in a row**, so `weights` stay in the cache.
A line that ends
ends here, too: 5 < 6 & "quotes" &amp; <b>tags</b> stay.

Title
=====

1. one
2. two, which is longer than the window is wide and so goes on in another line of it
   - inner
   - second

     with a paragraph
3. three

| name | layers |
|------|-------:|
| 125M | 30 |
| 350M | 32 |

```python
def f(x):

    if x:
        return x  # ``` no end


    return 2
```

> a quote
> of two lines

[ref]: http://example.org/lost
![picture](http://example.org/a.png) and [a link](http://example.org/b)

* * *

- last
- item
"""
LONG = "".join(f"{i}. number {i}\n" for i in range(1, 30))
LONG += "\n```\n" + "".join(f"line{i} = {i}\n" if i % 7 else "\n" for i in range(30)) + "```\n\n"
LONG += "| a | b |\n|---|---|\n" + "".join(f"| r{i} | {'x' * i} |\n" for i in range(25))


class Screen:
    def __init__(self, rows=14, columns=50):
        self.screen = pyte.HistoryScreen(columns, rows, history=100_000)
        self.stream = pyte.Stream(self.screen)
        self.frames = []

    def write(self, text):
        self.stream.feed(text)
        self.frames.append(text)

    def flush(self):
        pass

    def lines(self):
        rows = [
            *self.screen.history.top,
            *(self.screen.buffer[y] for y in range(self.screen.lines)),
        ]
        texts = ["".join(row[x].data for x in range(self.screen.columns)).rstrip() for row in rows]
        while texts and not texts[-1]:
            texts.pop()
        return texts


def drawn(text, cuts, rows=14, status=""):
    screen = Screen(rows)
    console = Console(
        file=screen, force_terminal=True, width=50, height=rows, color_system="256", _environ={}
    )
    stream = MarkdownStream(console, screen)
    for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
        stream.feed(text[start:end])
        stream.draw(status and f"{status} {start}")
    stream.finish()
    return screen


@pytest.mark.parametrize("text", [TEXT, LONG], ids=["kinds", "long"])
@pytest.mark.parametrize("seed", range(2))
def test_the_screen_does_not_depend_on_how_the_text_came(text, seed):
    rng = random.Random(seed)
    whole = drawn(text, []).lines()
    cuts = sorted(rng.sample(range(1, len(text)), len(text) // 4))
    came = drawn(text, cuts, status="working" if seed % 2 else "").lines()
    # a list whose items are printed one by one gives numbers the width that they need
    assert [" ".join(line.split()) for line in came] == [" ".join(line.split()) for line in whole]


@pytest.mark.parametrize("text", [TEXT, LONG], ids=["kinds", "long"])
def test_no_word_is_lost(text):
    shown = "".join("".join(drawn(text, range(5, len(text), 5)).lines()).split())
    for word in (
        "sharedEachblockrunstwiceinarow,soweightsstay",
        "another",
        "&amp;",
        "<b>tags</b>",
        "http://example.org/lost",
        "http://example.org/a.png",
        "http://example.org/b",
        "withaparagraph",
        "```noend",
        "125M",
        "lastitem".replace("item", ""),
        "item",
    ):
        assert word in shown or text is LONG, word
    if text is LONG:
        for i in range(1, 30):
            assert f"number{i}" in shown
        for i in range(25):
            assert f"r{i}" in shown
        for i in range(30):
            assert i % 7 == 0 or f"line{i}={i}" in shown


def test_code_without_a_fence_keeps_its_indentation():
    code = "def sign(x):\n    if x < 0:\n        return -1\n    return 1"
    for cuts in ([], range(1, len(code), 3)):
        assert drawn(code, cuts).lines() == code.split("\n")


def test_a_line_that_goes_on_is_all_that_is_drawn_anew():
    screen = drawn("one paragraph\n\nand another that ", [5, 16, 20, 25])
    assert sum(frame.count("one paragraph") for frame in screen.frames) <= 2


def test_blank_lines_of_code_stay():
    text = "```\na\n\n\nb\n\n```\nafter\n"
    for cuts in ([], range(1, len(text))):
        assert [line.strip() for line in drawn(text, cuts).lines()] == [
            "a",
            "",
            "",
            "b",
            "",
            "after",
        ]


def test_what_moves_the_cursor_is_not_passed_on():
    assert visible("a\x1b[2Jb\rc\td\n") == "a\ufffd[2Jb\ufffdc\td\n"
