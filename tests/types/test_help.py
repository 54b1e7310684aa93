"""What a person sees who asks Python about the package."""

import pydoc
import subprocess
import sys

import mobilellm_cpp
from mobilellm_cpp import MobileLLM


def test_dir_names_what_is_public():
    names = {name for name in dir(mobilellm_cpp) if not name.startswith("_")}
    assert names == set(mobilellm_cpp.__all__)
    assert all(getattr(mobilellm_cpp, name) is not None for name in names)


def test_help():
    text = pydoc.render_doc(mobilellm_cpp, renderer=pydoc.plaintext)
    for name in ("class MobileLLM(", "class Conversation(", "convert_checkpoint(", "verify("):
        assert name in text
    text = pydoc.render_doc(MobileLLM.stream, renderer=pydoc.plaintext)
    for name in ("temperature", "max_tokens", "stop", "seed", "Raises ModelError"):
        assert name in text


def test_help_without_torch():
    code = """
import sys
sys.modules["torch"] = None
import mobilellm_cpp, pydoc
assert "verify" not in dir(mobilellm_cpp)
assert "class MobileLLM(" in pydoc.plain(pydoc.render_doc(mobilellm_cpp))
"""
    subprocess.run([sys.executable, "-c", code], cwd="/", check=True)


def test_every_public_method_says_what_it_does():
    own = [value for name, value in vars(MobileLLM).items() if not name.startswith("_")]
    assert all(getattr(value, "__doc__", None) for value in own)
