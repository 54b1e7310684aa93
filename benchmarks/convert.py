"""Conversion against llama.cpp's own converter, on random weights at a published shape.

    python benchmarks/convert.py --llama-cpp DIR [--shape 125M] [--dtype bf16] [--type f16]

Every round runs both converters and a plain copy of the output's bytes, one after the other, each
in a process of its own; the table has the medians. Figures go to stdout, progress to stderr.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from checkpoints import PUBLISHED, make_checkpoint  # noqa: E402

# Each worker prints: seconds after imports, the same until the output is on the disk (ours waits
# for that, llama.cpp's converter does not), processor seconds of the former (on all cores; other
# programs on the machine disturb them less), peak RSS and peak anonymous memory in MB. A tiny
# checkpoint is converted first, so that all that is imported late is there. The peak of anonymous
# memory is sampled every 2 ms, less what was there after that.
SAMPLER = """
import json, os, resource, sys, threading, time
source, out, kind, tiny = sys.argv[1:5]
def memory(key):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(key)) / 1024
peak, running = 0.0, True
def sample():
    global peak
    while running:
        peak = max(peak, memory("RssAnon"))
        time.sleep(0.002)
def processor():
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime
def report():
    global running
    seconds = [time.perf_counter() - start, 0.0, processor() - used]
    file = os.open(out, os.O_RDWR)
    os.fsync(file)
    seconds[1] = time.perf_counter() - start
    running = False
    sampler.join()
    print(json.dumps([*seconds, memory("VmHWM"), peak - base]))
"""
START = """
base = memory("RssAnon")
sampler = threading.Thread(target=sample, daemon=True)
sampler.start()
used = processor()
start = time.perf_counter()
"""
OURS = f"""{SAMPLER}
from mobilellm_cpp.convert import convert_checkpoint
convert_checkpoint(tiny, out, type=kind)
{START}
convert_checkpoint(source, out, type=kind)
report()
"""
THEIRS = f"""{SAMPLER}
import runpy
script = sys.argv[5]
sys.path.insert(0, os.path.dirname(script))
convert = runpy.run_path(script)["main"]
sys.argv = [script, tiny, "--outfile", out, "--outtype", kind]
convert()
sys.argv[1] = source
{START}
convert()
report()
"""
COPY = f"""{SAMPLER}
import shutil
{START}
shutil.copyfile(source, out)
report()
"""


def run(code: str, *arguments: object) -> dict[str, float]:
    """Run a worker; its figures and the seconds of the whole process."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    start = time.perf_counter()
    # elsewhere than here, for the package is to be the installed one
    done = subprocess.run(
        command, env=environment, cwd=tempfile.gettempdir(), capture_output=True, text=True
    )
    seconds = time.perf_counter() - start
    if done.returncode:
        sys.exit(f"a converter failed:\n{done.stderr[-2000:]}")
    after_imports, on_disk, processor, rss, anonymous = json.loads(done.stdout.splitlines()[-1])
    return {
        "seconds": seconds,
        "seconds_after_imports": after_imports,
        "seconds_until_on_disk": on_disk,
        "processor_seconds_after_imports": processor,
        "peak_rss_mb": rss,
        "peak_anonymous_mb": anonymous,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--llama-cpp", type=Path, required=True, help="a llama.cpp source folder")
    parser.add_argument("--shape", choices=list(PUBLISHED), default="125M")
    parser.add_argument("--dtype", choices=["f32", "f16", "bf16"], default="bf16")
    parser.add_argument("--container", choices=["safetensors", "bin"], default="safetensors")
    parser.add_argument("--type", choices=["f32", "f16", "bf16", "q8_0"], default="f16")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where to put the files (removed afterwards)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    script = options.llama_cpp.resolve() / "convert_hf_to_gguf.py"

    home = Path(tempfile.mkdtemp(dir=options.folder))
    results: dict[str, list[dict[str, float]]] = {"mobilellm": [], "llama.cpp": [], "copy": []}
    try:
        print("making the checkpoint ...", file=sys.stderr)
        source = make_checkpoint(
            home / "checkpoint",
            **PUBLISHED[options.shape],
            dtype=options.dtype,
            container=options.container,
            architecture="LlamaForCausalLM",
        )
        tiny = make_checkpoint(
            home / "tiny",
            dtype=options.dtype,
            container=options.container,
            architecture="LlamaForCausalLM",
        )
        ours, theirs, copy = home / "ours.gguf", home / "theirs.gguf", home / "copy.gguf"
        for number in range(options.rounds):
            print(f"round {number + 1} of {options.rounds} ...", file=sys.stderr)
            results["mobilellm"].append(run(OURS, source, ours, options.type, tiny))
            results["llama.cpp"].append(run(THEIRS, source, theirs, options.type, tiny, script))
            results["copy"].append(run(COPY, ours, copy, "-", "-"))
            size = ours.stat().st_size
            for path in (ours, theirs, copy):
                path.unlink()
    finally:
        shutil.rmtree(home)

    medians = {
        who: {key: statistics.median(r[key] for r in rounds) for key in rounds[0]}
        for who, rounds in results.items()
    }
    if options.json:
        names = ("shape", "dtype", "container", "type", "rounds")
        setting = {name: getattr(options, name) for name in names}
        print(json.dumps({**setting, "output_bytes": size, "medians": medians}))
        return
    print(
        f"{options.shape}, {options.dtype} {options.container} to {options.type}, "
        f"{size / 1e6:.0f} MB written, median of {options.rounds} rounds"
    )
    columns = {
        "seconds": ("seconds", 2),
        "after imports": ("seconds_after_imports", 2),
        "on disk": ("seconds_until_on_disk", 2),
        "processor": ("processor_seconds_after_imports", 2),
        "RSS MB": ("peak_rss_mb", 0),
        "anonymous MB": ("peak_anonymous_mb", 0),
    }
    print(" " * 12 + "".join(f"{title:>14}" for title in columns))
    for who, row in medians.items():
        print(f"{who:12}" + "".join(f"{row[key]:14.{n}f}" for key, n in columns.values()))


if __name__ == "__main__":
    main()
