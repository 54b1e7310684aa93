"""`make dev`: edited Python files count at once, wherever Python starts."""

import json
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CODE = """
import importlib, json, site, sys
site.addsitedir(sys.argv[1])
sys.path.append(sys.argv[2])  # what it requires
names = ["mobilellm_cpp", "mobilellm_cpp.convert.families.base", "mobilellm_cpp.quant.rounding",
         "mobilellm_cpp.engine.model", "mobilellm_cpp.cli", "_mobilellm_cpp_library"]
files = [importlib.import_module(name).__file__ for name in names]
import llama_cpp
libraries = [str(llama_cpp.llama_cpp._base_path),
             importlib.import_module("mobilellm_cpp.quant.rounding").ggml()._name]
print(json.dumps([files, libraries]))
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site folder of an editable install."""
    prefix = tmp_path_factory.mktemp("editable")
    install = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--no-build-isolation",
        "--no-deps",
        "--quiet",
    ]
    where = ["--ignore-installed", "--prefix", prefix, "--config-settings=build-dir=build/wheel"]
    subprocess.run([*install, *where, "--editable", "."], cwd=ROOT, check=True)
    return Path(sysconfig.get_path("purelib", vars={"base": prefix}))


@pytest.mark.parametrize("start", ["/", ROOT])
def test_editable(site, start):
    command = [sys.executable, "-S", "-c", CODE, site, sysconfig.get_path("purelib")]
    result = subprocess.run(command, cwd=start, capture_output=True, text=True, check=True)
    files, libraries = json.loads(result.stdout)
    assert files == [
        *(
            str(ROOT / name)
            for name in (
                "mobilellm_cpp/__init__.py",
                "convert/families/base.py",
                "quant/rounding.py",
                "mobilellm_cpp/engine/model.py",
                "mobilellm_cpp/cli/__init__.py",
            )
        ),
        str(site / "_mobilellm_cpp_library.py"),
    ]
    lib = site / "mobilellm_cpp" / "lib"
    assert libraries == [str(lib), str(lib / "libggml-base.so")]
