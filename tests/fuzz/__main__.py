"""See run.py."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # where `fuzz` is

from fuzz.run import main  # noqa: E402

sys.exit(main())
