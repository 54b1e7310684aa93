"""ARM without an ARM processor: what a token takes there, counted under qemu-user.

    make bench-arm
    .venv/bin/python benchmarks/instructions.py --only decode

Random weights, one thread, benchmarks/loop.cpp over the libraries of cross builds. Ours is a build
as it is; stock the same build with MOBILELLM_KERNELS=0: upstream's kernels, compiled for that
processor, with its repacking. A count is the difference of two runs (of 10 and 2 tokens after 8, or
of prompts of 64 tokens and 1, divided by 64). Bytes are those that a simulated cache (count.c) gets
from memory, with the sizes of the board's. Weights a cycle are llvm-mca's for the inner loop that
decodes Q4_0. None of it is time. Progress goes to stderr, the tables (Markdown) to stdout, and with
--write between their marks in a file.
"""

import argparse
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from each_type import NARROW, R1, WIDE, quantized

ROOT = Path(__file__).resolve().parents[1]
ARM = "/usr/aarch64-linux-gnu"
MAX = "max,sve-max-vq=1"
# how weights are best prefetched is measured when a model is loaded, which an emulator cannot
NO_PREFETCHING = """#include <cstdint>
extern "C" void mobilellm_streaming_force(int32_t hint, int64_t ahead);
__attribute__((constructor)) static void force() { mobilellm_streaming_force(0, 0); }
"""
BEGIN, END = "<!-- make bench-arm -->\n", "<!-- end of bench-arm -->\n"

# the build whose upstream kernels are those of this processor
BUILDS = {"cortex-a53": "arm", "cortex-a72": "arm", "cortex-a76": "arm-a76", MAX: "arm-max"}

# A model: whose widths it has, type, schedule. 125M's rows of 576 are no multiple of 256, so Q6_K
# is counted at R1's widths, in 4 layers.
MODELS = {
    "Q4_0": ("125M", "q4_0", None),
    "Q4_0, layer-shared": ("125M", "q4_0", "immediate"),
    "Q4_1": ("125M", "q4_1", None),
    "IQ4_NL": ("125M", "iq4_nl", None),
    "Q6_K": ("R1", "q6_K", None),
}
# model, processor, goal of ours / stock
DECODE = [
    ("Q4_0", "cortex-a53", "≤ 0.32"),
    ("Q4_0", "cortex-a72", "≤ 0.32"),
    ("Q4_0", "cortex-a76", "≤ 0.62"),
    ("Q4_0", MAX, "≤ 0.55"),
    ("Q4_0, layer-shared", "cortex-a76", "≤ 0.62"),
    ("IQ4_NL", "cortex-a72", ""),
    ("IQ4_NL", "cortex-a76", ""),
    ("Q4_1", "cortex-a76", ""),
    ("Q6_K", "cortex-a72", ""),
    ("Q6_K", "cortex-a76", ""),
]
PREFILL = [
    ("Q4_0", "cortex-a72", "≤ 0.32"),
    ("Q4_0", "cortex-a76", "≤ 0.75"),
    ("Q4_0", MAX, "≤ 0.75"),
]
# KB of each level that a thread has, with the other cores idle
BOARDS = {
    "Raspberry Pi 3, Zero 2 W": ("cortex-a53", "l1=32,l2=512"),
    "Raspberry Pi 4": ("cortex-a72", "l1=32,l2=1024"),
    "Raspberry Pi 5": ("cortex-a76", "l1=64,l2=512,l3=2048"),
}
# Kernels, their function that decodes, the processor as llvm-mca knows it, its options. Neoverse N1
# is A76, which decodes four instructions a cycle.
NEON = "add_group<(ggml_type)2, mobilellm::(anonymous namespace)::neon_tokens<1, 4> >"
LOOPS = {
    "A53": ("neon", NEON, "cortex-a53", []),
    "A72": ("neon", NEON, "cortex-a72", []),
    "A76": ("dotprod", NEON.replace("neon", "dot"), "neoverse-n1", ["-dispatch=4"]),
}


class Counter:
    def __init__(self, folder: Path, builds: Path) -> None:
        self.folder, self.builds = folder, builds
        self.plugin, self.loop = folder / "count.so", folder / "loop-arm"
        source = ROOT / "benchmarks/arm/count.c"
        run(["cc", "-O2", "-shared", "-fPIC", "-o", str(self.plugin), str(source)])
        upstream, libraries = builds / "arm/llama.cpp", self.libraries("cortex-a72")
        (folder / "no_prefetching.cpp").write_text(NO_PREFETCHING)
        sources = [str(ROOT / "benchmarks/loop.cpp"), str(folder / "no_prefetching.cpp")]
        command = ["aarch64-linux-gnu-g++", "-std=c++17", "-O2", *sources]
        command += [f"-I{upstream / 'include'}", f"-I{upstream / 'ggml/include'}"]
        command += [f"-L{libraries}", "-lllama", f"-Wl,-rpath-link,{libraries}"]
        run([*command, "-o", str(self.loop)])

    def libraries(self, processor: str) -> Path:
        return self.builds / BUILDS[processor] / "bin"

    def model(self, name: str) -> Path:
        width, type, schedule = MODELS[name]
        path = self.folder / f"{width}-{type}{'-shared' if schedule else ''}.gguf"
        if not path.exists():
            floats = self.folder / f"{width}-f16.gguf"
            if type == "q4_0" or not floats.exists():
                sys.path.insert(0, str(ROOT / "tests"))
                from checkpoints import PUBLISHED, make_checkpoint

                from mobilellm_cpp import convert_checkpoint

                shape = R1 if width == "R1" else dict(PUBLISHED[width])
                source = make_checkpoint(self.folder / "checkpoint", **shape, dtype="f16")
                converted, of = (path, "q4_0") if type == "q4_0" else (floats, "f16")
                convert_checkpoint(source, converted, type=of, schedule=schedule)
                shutil.rmtree(source)
            if type != "q4_0":
                quantized(floats, type, (NARROW | WIDE)[type])
        return path

    def run(
        self, processor: str, kernels: str, model: Path, prompt: int, made: int, caches: str = ""
    ) -> tuple[int, int]:
        """Instructions and bytes from memory of a process that makes tokens."""
        out = self.folder / "counts.txt"
        out.unlink(missing_ok=True)
        plugin = f"{self.plugin},out={out}" + (f",{caches}" if caches else "")
        settings = f"LD_LIBRARY_PATH={self.libraries(processor)},MOBILELLM_KERNELS={kernels}"
        # on one core: threads that pack weights side by side would lose counts
        command = ["taskset", "-c", str(random.choice(list(os.sched_getaffinity(0))))]
        command += ["qemu-aarch64", "-cpu", processor, "-L", ARM, "-E", settings, "-plugin", plugin]
        run([*command, str(self.loop), str(model), "1", "first", str(prompt), str(made)])
        instructions, bytes_read = out.read_text().split()
        return int(instructions), int(bytes_read)

    def decode(self, processor: str, kernels: str, name: str) -> float:
        """Millions of instructions a decoded token."""
        few, more = (self.run(processor, kernels, self.model(name), 8, n)[0] for n in (2, 10))
        return (more - few) / 8e6

    def prefill(self, processor: str, kernels: str, name: str) -> float:
        """The same a token of a prompt, without what a process of one token takes."""
        one, all = (self.run(processor, kernels, self.model(name), n, 1)[0] for n in (1, 64))
        return (all - one) / 64e6

    def bytes_decoded(self, processor: str, name: str, sizes: str) -> float:
        """Megabytes from memory a decoded token, of two after one that fills the caches."""
        few, more = (self.run(processor, "1", self.model(name), 8, n)[0] for n in (2, 4))
        caches = f"{sizes},warm={few},from={(few + more) // 2}"
        return self.run(processor, "1", self.model(name), 8, 5, caches)[1] / 2e6


def run(command: list[str], text: str | None = None) -> str:
    done = subprocess.run(command, input=text, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"instructions.py: {' '.join(command)}\n{done.stderr.strip()[-2000:]}")
    return done.stdout


def short(processor: str) -> str:
    return processor.split(",")[0].removeprefix("cortex-").capitalize().replace("Max", "max")


def ratios(counter: Counter, only: str) -> str:
    lines = [
        "| millions of instructions a token | ours | stock | ours / stock | goal |",
        "|---|---|---|---|---|",
    ]
    for rows, measure in ((DECODE, counter.decode), (PREFILL, counter.prefill)):
        if only and only != measure.__name__:
            continue
        for name, processor, goal in rows:
            what = f"{measure.__name__} {name}, {short(processor)}"
            ours, stock = (measure(processor, kernels, name) for kernels in ("1", "0"))
            lines.append(f"| {what} | {ours:.1f} | {stock:.1f} | {ours / stock:.3f} | {goal} |")
            print(lines[-1], file=sys.stderr)
    return "\n".join(lines) + "\n"


def traffic(counter: Counter) -> str:
    lines = ["| MB from memory a decoded token | base | layer-shared |", "|---|---|---|"]
    for board, (processor, caches) in BOARDS.items():
        found = [
            counter.bytes_decoded(processor, name, caches)
            for name in ("Q4_0", "Q4_0, layer-shared")
        ]
        sizes = ", ".join(level.replace("=", " ").upper() for level in caches.split(","))
        lines.append(f"| {board} ({sizes} KB) | {found[0]:.1f} | {found[1]:.1f} |")
        print(lines[-1], file=sys.stderr)
    return "\n".join(lines) + "\n"


def inner_loop(path: Path, function: str) -> list[str]:
    """The shortest loop of a function that multiplies, without the branch back to its begin."""
    text = run(["aarch64-linux-gnu-objdump", "-d", "-C", "--no-show-raw-insn", str(path)])
    body = text.partition(f"{function}(")[2].partition("\n\n")[0]
    code = [
        (int(line[1], 16), line[2].split("//")[0])
        for line in re.finditer(r"^ +(\w+):\t(.*)$", body, re.M)
    ]
    at = {address: i for i, (address, _) in enumerate(code)}
    loops = []
    for i, (_, instruction) in enumerate(code):
        back = re.match(r"(?:b|cb|tb)[\w.]*\t.*?(\w+) <", instruction)
        if back and at.get(int(back[1], 16), i) < i:
            # llvm-mca follows no branch
            loop = code[at[int(back[1], 16)] : i]
            loops.append([re.sub(r"\w+ <.*", "#0", x) for _, x in loop])
    return min((x for x in loops if re.search("sdot|smlal", " ".join(x))), key=len)


def weights_a_cycle(counter: Counter) -> str:
    """By llvm-mca, of the loop over 64 columns of 32 rows."""
    lines = ["| decoding Q4_0 | " + " | ".join(LOOPS) + " |", "|---|" + "---|" * len(LOOPS)]
    found = []
    for kernels, function, processor, options in LOOPS.values():
        path = counter.builds / "arm/CMakeFiles/kernels.dir/kernels/arm" / f"{kernels}.cpp.o"
        loop = inner_loop(path, function)
        mca = ["llvm-mca-19", "-mtriple=aarch64-linux-gnu", "-mattr=+dotprod,+fullfp16"]
        mca += [f"-mcpu={processor}", "-iterations=200", *options]
        cycles = re.search(r"Total Cycles:\s+(\d+)", run(mca, "\n".join(loop) + "\n"))
        assert cycles
        rate = 64 * 32 * 200 / int(cycles[1])
        found.append(f"{rate:.1f} ({len(loop) / 64 / 32:.3f} instructions a weight)")
    lines.append("| weights a cycle | " + " | ".join(found) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--builds", type=Path, default=ROOT / "build")
    parser.add_argument("--folder", type=Path, help="keep the models here; by default removed")
    parser.add_argument("--only", choices=("decode", "prefill", "bytes", "cycles"), default="")
    parser.add_argument("--write", type=Path, metavar="FILE", help="put the tables into this file")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.folder or Path(temporary)
        os.makedirs(folder, exist_ok=True)
        counter = Counter(folder.resolve(), given.builds.resolve())
        tables = [] if given.only in ("bytes", "cycles") else [ratios(counter, given.only)]
        tables += [traffic(counter)] if given.only in ("", "bytes") else []
        tables += [weights_a_cycle(counter)] if given.only in ("", "cycles") else []
    text = "\n".join(tables)
    print(text, end="")
    if given.write:
        page = given.write.read_text(encoding="utf-8")
        before, _, rest = page.partition(BEGIN)
        _, _, after = rest.partition(END)
        given.write.write_text(f"{before}{BEGIN}{text}{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
