"""Where the libraries of mobilellm_cpp lie; and a llama_cpp that has none of its own loads them.

llama-cpp-python is installed as bindings only. mobilellm_cpp.pth imports this module whenever
Python starts, so that `import llama_cpp` works in every program of the environment. Hence it
imports nothing that Python has not loaded by then. While `llama_cpp` looks for its library, and not
longer, LLAMA_CPP_LIB_PATH names ours; whoever sets that variable decides for himself.
"""

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.abc import Loader
    from importlib.machinery import ModuleSpec
    from types import ModuleType

FOLDER = os.path.join(os.path.dirname(os.path.realpath(__file__)), "mobilellm_cpp", "lib")
LLAMA_CPP_PYTHON = "0.3.36"  # its structs are those of our library
VARIABLE = "LLAMA_CPP_LIB_PATH"


class Finder:
    """Finds the module of llama_cpp that loads the library, where ours is the one to load.

    always: also where llama_cpp has a library of its own or the variable names one.
    """

    always = False

    def find_spec(
        self, name: str, path: "Sequence[str] | None" = None, target: "ModuleType | None" = None
    ) -> "ModuleSpec | None":
        if name != "llama_cpp.llama_cpp" or (VARIABLE in os.environ and not self.always):
            return None
        for finder in sys.meta_path:
            find = None if finder is self else getattr(finder, "find_spec", None)
            spec: ModuleSpec | None = find(name, path, target) if find else None
            if spec is not None:
                break
        if spec is None or spec.loader is None or not spec.origin:
            return None
        package = os.path.dirname(spec.origin)
        if not self.always and _holds_llama(os.path.join(package, "lib")):
            return None
        if not _holds_llama(FOLDER):
            return None
        _check_version(os.path.dirname(package))
        spec.loader = _WithOurLibrary(spec.loader)  # type: ignore[assignment]  # has its methods
        return spec


class _WithOurLibrary:
    """A module's loader while LLAMA_CPP_LIB_PATH names our folder."""

    def __init__(self, loader: "Loader") -> None:
        self._loader = loader

    def create_module(self, spec: "ModuleSpec") -> "ModuleType | None":
        return self._loader.create_module(spec)

    def exec_module(self, module: "ModuleType") -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self._loader
        before = os.environ.get(VARIABLE)
        os.environ[VARIABLE] = FOLDER
        try:
            self._loader.exec_module(module)
        finally:
            if before is None:
                del os.environ[VARIABLE]
            else:
                os.environ[VARIABLE] = before


def _holds_llama(folder: str) -> bool:
    return os.path.isdir(folder) and any("llama." in name for name in os.listdir(folder))


def _check_version(folder: str) -> None:
    """Refuses bindings in site folder `folder` that another version of the library belongs to."""
    start = "llama_cpp_python-"
    found = [name for name in os.listdir(folder) if name.startswith(start)]
    if found and not any(name.startswith(f"{start}{LLAMA_CPP_PYTHON}.") for name in found):
        version = found[0].removeprefix(start).removesuffix(".dist-info")
        raise ImportError(
            f"llama_cpp {version} has no library of its own, and the one of mobilellm-cpp is made "
            f"for {LLAMA_CPP_PYTHON}: pip install llama-cpp-python=={LLAMA_CPP_PYTHON}"
        )


finder = Finder()
sys.meta_path.insert(0, finder)
