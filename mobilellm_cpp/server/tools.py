"""What requests offer of tools (see engine/tools.py)."""

from collections.abc import Mapping, Sequence
from typing import Any

from ..engine.tools import Offer
from ..errors import ModelError
from .errors import ApiError


def offer(
    tools: Sequence[Mapping[str, Any]], choice: str, template: str, several: bool | None = None
) -> Offer:
    """An Offer. Raises ApiError."""
    try:
        return Offer(tools, choice, template, bool(several))
    except ModelError as error:
        raise ApiError(400, str(error), param="tool_choice") from None
