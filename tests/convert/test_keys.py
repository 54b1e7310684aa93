"""The list of metadata keys: C++ has the same one, and what it does not list runs in the ordinary
graph."""

from pathlib import Path

from mobilellm_cpp.convert import keys

NATIVE = Path(__file__).parents[2] / "mobilellm_cpp/native/llama/keys.inc"


def test_the_list_in_c_plus_plus_is_this_one():
    assert NATIVE.read_text() == keys.native(), (
        "run .venv/bin/python convert/keys.py (see its head)"
    )
