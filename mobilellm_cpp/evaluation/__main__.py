"""python -m mobilellm_cpp.evaluation --model mobilellm --model_args path=model.gguf --tasks ...

lm_eval's own command line, in which the model class `mobilellm` is known.
"""

import sys

from ..errors import MobileLLMError


def main() -> None:
    try:
        from lm_eval.__main__ import cli_evaluate
    except ImportError:
        sys.exit("mobilellm: this needs lm_eval: pip install 'mobilellm-cpp[eval]'")
    from . import harness  # noqa: F401

    try:
        cli_evaluate()
    except MobileLLMError as error:
        sys.exit(f"mobilellm: {error}")


if __name__ == "__main__":
    main()
