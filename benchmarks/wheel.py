"""What a wheel for every processor loses against a build for this one.

    make wheels && .venv/bin/python benchmarks/wheel.py

125M with random weights, benchmarks/loop.cpp over the libraries of the wheel in dist/ and over
those that are installed, in turn. Prints ratios of tokens/s as Markdown: the median of the rounds,
and the least and largest.
"""

import argparse
import statistics
import tempfile
import zipfile
from pathlib import Path

from builds import ROOT, Bench, Build

DEPTH = 64  # cells in the cache where decoding is measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="keep the models here; by default removed")
    given = parser.parse_args()
    (wheel,) = (ROOT / "dist").glob("mobilellm_cpp-*_x86_64.whl")
    with tempfile.TemporaryDirectory() as temporary:
        zipfile.ZipFile(wheel).extractall(temporary)
        bench = Bench(given.folder or Path(temporary), "125M", given.rounds)
        libraries = Path(temporary, "mobilellm_cpp/lib")
        portable = Build(bench.ours.loop, {"LD_LIBRARY_PATH": str(libraries)})
        print("| wheel / build for this processor | prefill 256 | decode |\n|---|---|---|")
        for type in ("q4_0", "q8_0"):
            for threads in (1, 2):
                model = bench.model("base", type)

                def work(model: Path = model, threads: int = threads) -> dict[str, float]:
                    wheels = portable.rates(model, threads, True, "f16", 256, [DEPTH])
                    native = bench.ours.rates(model, threads, True, "f16", 256, [DEPTH])
                    ratios = [a / b for a, b in zip(wheels, native, strict=True)]
                    return dict(zip(("prefill", "decode"), ratios, strict=True))

                found = bench.repeat(f"{type}, {threads} threads", work).values()
                cells = [f"{statistics.median(x):.2f} ({min(x):.2f}–{max(x):.2f})" for x in found]
                print(f"| {type}, {threads} threads | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
