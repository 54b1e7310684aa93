"""The command `mobilellm-run`: the program that lies beside the libraries takes the place of this
process, and with it of Python."""

import os
import sys

from _mobilellm_cpp_library import FOLDER


def main() -> None:
    program = os.path.join(FOLDER, "mobilellm-run.exe" if os.name == "nt" else "mobilellm-run")
    os.execv(program, [program, *sys.argv[1:]])
