"""`make bench` writes the table of the processor that it runs on, and nothing else."""

import importlib
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def with_section(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("versus_stock").with_section


def test_each_processor_has_a_section(with_section):
    text = with_section("# Measurements\n\nIntro.\n", "A (model 1)", "| one |")
    text += "\nMissed: nothing.\n"
    text = with_section(text, "A (model 10)", "| two |")
    text = with_section(text, "A (model 1)", "| three \\1 |")
    assert text == (
        "# Measurements\n\nIntro.\n"
        "\n## A (model 1)\n\n<!-- make bench -->\n| three \\1 |\n<!-- end -->\n"
        "\nMissed: nothing.\n"
        "\n## A (model 10)\n\n<!-- make bench -->\n| two |\n<!-- end -->\n"
    )
    assert with_section("# M\n\n## B\n\nNotes.\n", "B", "| x |") == (
        "# M\n\n## B\n\n<!-- make bench -->\n| x |\n<!-- end -->\n\nNotes.\n"
    )
