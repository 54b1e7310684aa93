"""The `mobilellm` command; `python -m mobilellm_cpp` is the same."""

import sys


def main() -> None:
    try:
        from .cli import main as run

        run()
    except KeyboardInterrupt:  # while the program starts
        sys.exit(130)


if __name__ == "__main__":
    main()
