"""`python -m mobilellm_cpp` is `mobilellm`."""

from .cli import main

main()
