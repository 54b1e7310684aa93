"""llama_cpp in an environment that mobilellm-cpp shares with others."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import _mobilellm_cpp_library as ours
import pytest
from checkpoints import make_checkpoint

from mobilellm_cpp import convert_checkpoint
from mobilellm_cpp.engine.library import llama_cpp

SITE = Path(sysconfig.get_path("purelib"))
LOADED = """
import llama_cpp, os
print(llama_cpp.llama_cpp._base_path, os.environ.get("LLAMA_CPP_LIB_PATH"))
"""


def run(code, python=sys.executable, **environment):
    """What a program prints in a new Python, or the last line of its traceback."""
    environment = {**{n: v for n, v in os.environ.items() if n != ours.VARIABLE}, **environment}
    result = subprocess.run(
        [python, "-c", code], env=environment, cwd="/", capture_output=True, text=True
    )
    return (result.stdout or result.stderr).strip().splitlines()[-1]


@pytest.mark.parametrize(
    "code",
    [
        "import llama_cpp",
        "import llama_cpp.llama_chat_format",
        "import llama_cpp; import mobilellm_cpp; mobilellm_cpp.MobileLLM",
        "import mobilellm_cpp; import llama_cpp; mobilellm_cpp.MobileLLM",
        "from mobilellm_cpp import MobileLLM; import llama_cpp",
        "import llama_cpp.llama_cpp as l; import importlib; importlib.reload(l)",
    ],
)
def test_the_order_of_imports_is_free(code):
    assert run(f"{code}\n{LOADED}") == f"{ours.FOLDER} None"


def test_nothing_is_left_behind():
    code = """
import importlib.machinery, inspect, os, sys
before = dict(os.environ)
import llama_cpp
from mobilellm_cpp import MobileLLM
assert dict(os.environ) == before
module = llama_cpp.llama_cpp
assert module.__loader__ is module.__spec__.loader
assert type(module.__loader__) is importlib.machinery.SourceFileLoader
assert inspect.getsource(module)
print("ok")
"""
    assert run(code) == "ok"


def test_llama_cpp_stays_as_it_is():
    """What MobileLLM changes of Llama's constructor, it changes for itself."""
    from mobilellm_cpp import MobileLLM  # noqa: F401

    silence = llama_cpp._utils.suppress_stdout_stderr
    assert llama_cpp.llama.suppress_stdout_stderr is silence
    assert llama_cpp._internals.suppress_stdout_stderr is silence
    formatter = llama_cpp.llama_chat_format.Jinja2ChatFormatter
    assert formatter.__module__ == "llama_cpp.llama_chat_format"
    assert llama_cpp.Llama.__init__.__globals__ is vars(llama_cpp.llama)


def test_loading_leaves_the_output_of_the_process_alone(tmp_path):
    make_checkpoint(tmp_path / "m")
    convert_checkpoint(tmp_path / "m", tmp_path / "m.gguf")
    code = f"""
import os
from mobilellm_cpp import MobileLLM
os.dup2 = None
MobileLLM({str(tmp_path / "m.gguf")!r}, n_threads=1)
print("ok")
"""
    assert run(code) == "ok"


def test_who_names_a_library_gets_it(stock_lib):
    assert run(LOADED, LLAMA_CPP_LIB_PATH=str(stock_lib)) == f"{stock_lib} {stock_lib}"
    # MobileLLM needs its own and leaves the variable to others
    code = f"from mobilellm_cpp import MobileLLM\n{LOADED}"
    assert run(code, LLAMA_CPP_LIB_PATH=str(stock_lib)) == f"{ours.FOLDER} {stock_lib}"


@pytest.fixture
def other_llama_cpp(tmp_path):
    """A folder with llama_cpp, to be put before the installed one."""
    shutil.copytree(SITE / "llama_cpp", tmp_path / "llama_cpp")
    return tmp_path


def test_a_library_of_its_own_is_left_alone(other_llama_cpp, stock_lib):
    own = other_llama_cpp / "llama_cpp" / "lib"
    own.symlink_to(stock_lib)
    path = {"PYTHONPATH": str(other_llama_cpp)}
    assert run(LOADED, **path) == f"{own} None"
    assert run(f"import mobilellm_cpp\n{LOADED}", **path) == f"{own} None"
    assert run(f"from mobilellm_cpp import MobileLLM\n{LOADED}", **path) == f"{ours.FOLDER} None"
    said = run("import llama_cpp; from mobilellm_cpp import MobileLLM", **path)
    assert "another libllama is already loaded" in said
    assert f"llama-cpp-python=={ours.LLAMA_CPP_PYTHON}" in said


def test_other_bindings_are_refused(other_llama_cpp):
    info = other_llama_cpp / "llama_cpp_python-0.3.20.dist-info"
    info.mkdir()
    said = run("import llama_cpp", PYTHONPATH=str(other_llama_cpp))
    assert said.startswith("ImportError: llama_cpp 0.3.20 has no library of its own")
    info.rename(info.with_name(f"llama_cpp_python-{ours.LLAMA_CPP_PYTHON}.dist-info"))
    assert run(LOADED, PYTHONPATH=str(other_llama_cpp)) == f"{ours.FOLDER} None"


@pytest.mark.parametrize("place", ["both below", "llama_cpp below", "none below"])
def test_a_venv_over_other_packages(place, tmp_path):
    """venv --system-site-packages, with both packages below it, or ours in it; and a venv that
    has nothing to do with either."""
    version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    below = tmp_path / "below" / "lib" / version / "site-packages"
    below.parent.mkdir(parents=True)
    if place == "llama_cpp below":
        below.mkdir()
        for entry in SITE.iterdir():
            if "mobilellm" not in entry.name and entry.suffix != ".pth":
                (below / entry.name).symlink_to(entry)
    else:
        below.symlink_to(SITE)
    venv.create(tmp_path / "venv", system_site_packages=place != "none below")
    python = tmp_path / "venv" / "bin" / "python"
    if place == "llama_cpp below":
        site = tmp_path / "venv" / "lib" / version / "site-packages"
        for entry in SITE.glob("*mobilellm_cpp*"):
            (site / entry.name).symlink_to(entry)
    said = run(LOADED, str(python), PYTHONUSERBASE=str(tmp_path / "below"))
    if place == "none below":
        assert said == "ModuleNotFoundError: No module named 'llama_cpp'"
    else:
        assert said == f"{ours.FOLDER} None"


def test_a_folder_on_pythonpath(tmp_path):
    """pip install --target: no .pth file is read there, so mobilellm_cpp goes first."""
    for entry in SITE.iterdir():
        (tmp_path / entry.name).symlink_to(entry)
    python = venv_python(tmp_path.parent / "bare")
    path = {"PYTHONPATH": str(tmp_path)}
    assert run(f"import mobilellm_cpp\n{LOADED}", python, **path) == f"{ours.FOLDER} None"


def venv_python(folder):
    venv.create(folder)
    return str(folder / "bin" / "python")


def test_the_files_belong_to_the_package():
    """So that `pip uninstall mobilellm-cpp` takes them away."""
    import importlib.metadata

    files = {str(file) for file in importlib.metadata.files("mobilellm-cpp")}
    assert {"mobilellm_cpp.pth", "_mobilellm_cpp_library.py"} <= files


def test_the_start_of_python_loads_nothing_more():
    code = "import json, sys; print(json.dumps(sorted(sys.modules)))"
    bare = [sys.executable, "-S", "-c", f"import site; {code}"]
    with_finder = [
        sys.executable,
        "-S",
        "-c",
        f"import site; site.addpackage({str(SITE)!r}, 'mobilellm_cpp.pth', None); {code}",
    ]
    before, after = (
        set(
            json.loads(
                subprocess.run(
                    c, capture_output=True, env={"PYTHONPATH": str(SITE)}, text=True, check=True
                ).stdout
            )
        )
        for c in (bare, with_finder)
    )
    assert after - before == {"_mobilellm_cpp_library"}
