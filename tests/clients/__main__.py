"""Programs that others wrote, over our package: each in an environment of its own.

    python tests/clients [NAME ...]      (make clients)

For each name a virtual environment in build/clients/NAME gets the packages below, our wheel and
that of the bindings, and runs use_NAME.py with the demo model. The table of what works is in
docs/clients.md. The first run downloads some hundred megabytes.
"""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "clients"
PINS = {
    "llama_cpp": ["llama-cpp-python[server,test]==0.3.36"],
    "server": ["llama-cpp-python[server]==0.3.36", "openai==3.57.0"],
    "langchain": ["langchain-community==0.4.2"],
    "llamaindex": ["llama-index-llms-llama-cpp==0.7.0"],
    "outlines": ["outlines[llamacpp]==1.3.3"],
    "guidance": ["guidance==0.3.1"],
    "lmeval": ["lm-eval==0.4.13", "llama-cpp-python[server]==0.3.36"],
    "ray": ["ray[data]==2.60.0"],
    "llm": ["llm==0.36", "llm-gguf==0.2", "llm-llama-cpp==0.3"],
}


def run(*command: str | Path) -> None:
    subprocess.run([str(part) for part in command], check=True, cwd=BUILD)


def python_of(name: str) -> Path:
    """The Python of a client's environment, with the package as it is now."""
    environment = BUILD / name
    python = environment / "bin" / "python"
    done = environment / "installed"
    pip = [python, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    if not done.exists() or done.read_text() != str(PINS[name]):
        run(sys.executable, "-m", "venv", environment)
        run(*pip, "--find-links", BUILD, *BUILD.glob("*.whl"), *PINS[name])
        done.write_text(str(PINS[name]))
    run(*pip, "--no-deps", "--force-reinstall", *BUILD.glob("mobilellm_cpp-*.whl"))
    return python


def main(names: list[str]) -> int:
    BUILD.mkdir(parents=True, exist_ok=True)
    for wheel in BUILD.glob("mobilellm_cpp-*.whl"):
        wheel.unlink()
    wheels = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--quiet"]
    wheels += ["--no-deps", "--no-build-isolation", "--wheel-dir", BUILD]
    os.environ["CMAKE_ARGS"] = "-DLLAMA_BUILD=OFF"
    run(*wheels, f"--config-settings=build-dir={ROOT / 'build' / 'wheel'}", ROOT)
    if not list(BUILD.glob("llama_cpp_python-*.whl")):
        run(*wheels, "llama-cpp-python==0.3.36")
    mobilellm, demo = Path(sys.executable).parent / "mobilellm", ROOT / "mobilellm_cpp" / "demo"
    run(mobilellm, "convert", demo, "--type", "f16", "-o", BUILD / "demo.gguf")
    run(mobilellm, "convert", demo, "--type", "f16", "--portable", "-o", BUILD / "portable.gguf")
    failed = []
    for name in names or PINS:
        try:
            python = python_of(name)
        except subprocess.CalledProcessError:  # pip has said why
            print(f"{name:12} FAILS to be installed", flush=True)
            failed.append(name)
            continue
        model = BUILD / ("portable.gguf" if name == "llama_cpp" else "demo.gguf")
        script = Path(__file__).parent / f"use_{name}.py"
        done = subprocess.run(
            [python, "-W", "ignore", script, model], cwd=BUILD, capture_output=True, text=True
        )
        how = "FAILS" if done.returncode else "works"
        print(f"{name:12} {how} {done.stdout[-100:]}".rstrip(), flush=True)
        if done.returncode:
            print(done.stdout[-4000:] + done.stderr[-4000:])
            failed.append(name)
    return len(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
