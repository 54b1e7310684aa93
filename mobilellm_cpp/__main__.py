"""The `mobilellm` command; `python -m mobilellm_cpp` is the same."""

import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn


def main() -> None:
    import gc

    # what imports make is there to stay: looking through it for garbage takes 15 ms
    gc.set_threshold(10_000)
    code: object = 0
    try:
        from .cli import main as run

        run()
    except KeyboardInterrupt:  # while the program starts
        code = 130
    except SystemExit as end:
        code = end.code
    _end(code)


def _end(code: object) -> "NoReturn":
    """Ends the process as sys.exit does, but leaves its memory to the system: to take Python, numpy
    and a model apart takes 40 ms and more."""
    import atexit
    import os
    import threading

    alone = threading.active_count() == 1
    if alone and (code is None or isinstance(code, int)):
        atexit._run_exitfuncs()  # which may print, too
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        except (OSError, ValueError, AttributeError):  # Python says what is to be said
            sys.exit(code)
        os._exit(code or 0)
    sys.exit(code)  # type: ignore[arg-type]  # whatever it was


if __name__ == "__main__":
    main()
