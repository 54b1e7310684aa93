"""Makes the pictures of the documents, from real programs and from the tables of measurements.md.

    .venv/bin/python docs/pictures.py [chat] [page] [speed] [quality]

chat.svg is a chat with the model that comes along, as a terminal shows it; page.png the server's
page in Chromium; speed.png and quality.png show tables.
"""

import io
import itertools
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.style import Style
from rich.terminal_theme import DIMMED_MONOKAI
from rich.text import Text

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "server")]
from terminal import Terminal  # noqa: E402

ROWS, COLUMNS = 17, 84
QUESTIONS = ("hi, who are you?", "who bakes the bread here?", "and where does she live?")
SHOWN = {  # rows of `make bench`
    "decode, base Q4_0, depth 64, 2 threads": "Q4_0",
    "decode, base Q8_0, depth 64, 2 threads": "Q8_0",
    "decode, base Q4_0, f16 KV, depth 512, 2 threads": "Q4_0, 512 tokens in the context",
    "decode, layer-shared Q4_0, depth 64, 2 threads, against the weights written out twice in "
    "stock": "layer-shared Q4_0\n(stock: blocks written out twice)",
}
LABELS: dict[str, Any] = {  # where a label right of its dot would cover another
    "IQ4_XS": {"xytext": (-6, -3), "ha": "right"},
    "IQ4_NL": {"xytext": (-4, -13)},
    "Q3_K_M": {"xytext": (6, -6)},
    "Q4_K_M, embedding Q4_0": {"xytext": (7, -3)},
    "IQ4_NL, embedding too": {"xytext": (7, -2)},
}
OURS, OTHERS = "#1f77b4", "#b0b7bf"


def chat() -> None:
    with tempfile.TemporaryDirectory() as home:
        env = {**os.environ, "XDG_DATA_HOME": home}
        command = [str(Path(sys.executable).with_name("mobilellm")), "chat"]
        chat = Terminal(command, env=env, rows=ROWS, columns=COLUMNS)
        chat.wait("^>")
        for question in QUESTIONS:
            for key in question:
                chat.type(key)
            chat.type("\r")
            chat.wait(r"\w.*\n>$", after=question)
        chat.type("/s")
        chat.wait("/stats")
        until = time.monotonic() + 1
        while time.monotonic() < until:
            chat.read()
        console = Console(
            record=True, width=COLUMNS, height=ROWS, file=io.StringIO(), force_terminal=True
        )
        for row in range(ROWS):
            console.print(
                _line(chat.screen, row), end="\n" if row < ROWS - 1 else "", soft_wrap=True
            )
        chat.child.close(force=True)
    svg = console.export_svg(title="mobilellm chat", theme=DIMMED_MONOKAI, unique_id="chat")
    (DOCS / "chat.svg").write_text(svg, encoding="utf-8")


def page() -> None:
    from serving import running
    from test_page import Page, browser

    from mobilellm_cpp import MobileLLM
    from mobilellm_cpp.cache import DEMO

    with (
        MobileLLM.from_checkpoint(DEMO, type="q8_0") as llm,
        running(llm, "mobilellm-demo") as server,
        browser() as driver,
    ):
        driver.set_window_size(1000, 840)
        shown = Page(driver, server.url)
        shown.until(lambda: shown.one("#model").text)
        shown.one("#open-settings").click()
        shown.one("#temperature").send_keys("0")
        shown.one("dialog button[value=close]").click()
        for number, question in enumerate(QUESTIONS[:2], 1):
            shown.ask(question + "\n")
            shown.until(lambda n=number: len(shown.texts("article")) == 2 * n)
            shown.status("The answer is there.")
        driver.save_screenshot(str(DOCS / "page.png"))


def speed() -> None:
    """Bars for the processors of measurements.md, the sections with a table of `make bench`."""
    page = (DOCS / "measurements.md").read_text(encoding="utf-8")
    parts = re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL)
    tables = {name: _table(text.split("<!-- make bench -->")[-1]) for name, text in parts}
    measured = {
        name: {cells[0]: re.findall(r", (\d+) : (\d+)", cells[2]) for cells in table}
        for name, table in tables.items()
        if any(cells[0] in SHOWN for cells in table)
    }
    figure, axes = _figure(len(measured), (10, 3.4))
    for place, (name, rows) in zip(axes, measured.items(), strict=True):
        for at, row in enumerate(SHOWN):
            ours, stock = map(int, rows[row][0])
            for value, shift, colour in ((ours, -0.2, OURS), (stock, 0.2, OTHERS)):
                place.barh(at + shift, value, 0.38, color=colour)
                place.text(value, at + shift, f" {value}", va="center", fontsize=8)
        place.set(title=name, xlabel="tokens/s", yticks=range(len(SHOWN)))
        place.set_yticklabels(SHOWN.values())
        place.title.set_fontsize(10)
        place.margins(x=0.12)
    axes[0].invert_yaxis()
    from matplotlib.patches import Patch

    labels = {"mobilellm-cpp": OURS, "stock llama.cpp": OTHERS}
    handles = [Patch(color=colour, label=label) for label, colour in labels.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False)
    figure.suptitle("Decode of 125M with 2 threads", fontsize=11)
    figure.savefig(DOCS / "speed.png", dpi=110)


def quality() -> None:
    """Loss against bits a weight, of the table under "At every size"."""
    page = (DOCS / "measurements.md").read_text(encoding="utf-8")
    rows = _table(page.split("### At every size")[1])
    figure, (axes,) = _figure(1, (7.5, 4.4))
    points = [(name, float(bits), float(loss.split()[0])) for name, _, bits, loss, *_ in rows]
    ours = sorted(point[1:] for point in points if point[0][0] == "`")
    axes.plot(*zip(*ours, strict=True), "o-", color=OURS)
    for name, *at in points:
        if name[0] != "`":
            axes.plot(*at, "o", color="#6b7280")
            beside = LABELS.get(name, {"xytext": (6, 3)})
            style = {"textcoords": "offset points", "fontsize": 8, "color": "#374151"}
            axes.annotate(name, at, **style, **beside)
    axes.set(yscale="log", xlabel="bits a weight, all tensors counted", xlim=(3, 8.6))
    axes.set_ylabel("mean KL divergence from F16, nats")
    ticks = [0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5]
    axes.set_yticks(ticks, map(str, ticks))
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    title = "SmolLM2-135M: mobilellm quantize (blue) and llama-quantize with an imatrix (grey)"
    axes.set_title(title, fontsize=10)
    figure.savefig(DOCS / "quality.png", dpi=110)


def _figure(n: int, size: tuple[float, float]) -> Any:
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        1, n, figsize=size, squeeze=False, sharey=True, layout="constrained"
    )
    for each in axes[0]:
        each.spines[["top", "right"]].set_visible(False)
    return figure, axes[0]


def _table(text: str) -> list[list[str]]:
    """The cells of the first table in a text, without its head."""
    lines = itertools.takewhile(
        lambda line: line.startswith("|"),
        itertools.dropwhile(lambda line: not line.startswith("|---"), text.splitlines()),
    )
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines][1:]


def _line(screen: Any, row: int) -> Text:
    text = Text()
    chars = [screen.buffer[row][column] for column in range(screen.columns)]
    for style, run in itertools.groupby(chars, _style):
        text.append("".join(char.data for char in run), style)
    return text


def _style(char: Any) -> Style:
    return Style(
        color=_colour(char.fg),
        bgcolor=_colour(char.bg),
        bold=char.bold,
        italic=char.italics,
        underline=char.underscore,
        reverse=char.reverse,
    )


def _colour(name: str) -> str | None:
    """A colour of pyte as one of rich."""
    if name == "default":
        return None
    if len(name) == 6 and all(digit in "0123456789abcdef" for digit in name):
        return f"#{name}"
    name = {"brown": "yellow", "brightbrown": "brightyellow"}.get(name, name)
    return name.replace("bright", "bright_")


PICTURES: tuple[Callable[[], None], ...] = (chat, page, speed, quality)


def main(names: list[str]) -> None:
    for picture in PICTURES:
        if not names or picture.__name__ in names:
            picture()


if __name__ == "__main__":
    main(sys.argv[1:])
