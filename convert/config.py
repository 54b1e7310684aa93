"""config.json and other small JSON files, read with checked types and ranges."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mobilellm_cpp.errors import CheckpointError


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; anything else is refused."""
    try:
        fields = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing.") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}.") from None
    if not isinstance(fields, dict):
        raise CheckpointError(f"{path} holds a {type(fields).__name__}, not a JSON object.")
    return fields


SMALLEST = 2.0**-126  # GGUF holds float32, in which less loses digits and in the end is 0


class Config:
    """The fields of config.json; each method refuses a value of another kind, naming the field.

    Those under `text_config` count as if they stood in the file itself. A field that is absent or
    null has the given default; without a default it is refused. `settings` override what the file
    says; `unread` names those that nothing has asked for.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any] | None = None) -> None:
        self.path = path
        self.fields = read_json(path)
        inner = self.fields.get("text_config")
        if isinstance(inner, dict):
            said = {name: value for name, value in inner.items() if value is not None}
            top = self.fields.get("architectures") or inner.get("architectures")
            self.fields = inner | self.fields | said | {"architectures": top}
        self.fields |= settings or {}
        self.unread = set(settings or {})

    def get(self, name: str, default: Any = None) -> Any:
        """The value as it stands in the file, null too; `default` where the field is absent."""
        self.unread.discard(name)
        return self.fields.get(name, default)

    def integer(self, name: str, high: int, *, low: int = 1, default: int | None = None) -> int:
        value = self._value(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.refusal(name, f"must be a whole number from {low} to {high}", value)
        return value

    def number(self, name: str, high: float, *, default: float | None = None) -> float:
        """A positive number not above `high`."""
        return self.check_number(name, self._value(name, default), high)

    def check_number(self, name: str, value: Any, high: float) -> float:
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not SMALLEST <= value <= high:  # a NaN compares false
            raise self.refusal(name, f"must be a number from {SMALLEST:.1g} to {high:g}", value)
        return float(value)

    def flag(self, name: str, *, required: bool = False) -> bool:
        """True or false; when absent false, or refused where it is required."""
        value = self._value(name, None if required else False)
        if not isinstance(value, bool):
            raise self.refusal(name, "must be true or false", value)
        return value

    def token_id(self, name: str, size: int) -> int | None:
        """A token id below `size`, or the first such one of a list; None for anything else."""
        value = self.get(name)
        for candidate in value if isinstance(value, list) else [value]:
            is_id = isinstance(candidate, int) and not isinstance(candidate, bool)
            if is_id and 0 <= candidate < size:
                return int(candidate)
        return None

    def missing(self, name: str) -> CheckpointError:
        return CheckpointError(
            f"{self.path}: {name} is missing (mobilellm convert --set {name}=VALUE supplies it)."
        )

    def refusal(self, name: str, rule: str, value: Any) -> CheckpointError:
        shown = repr(value)
        if len(shown) > 60:
            shown = shown[:57] + "..."
        return CheckpointError(f"{self.path}: {name} {rule}, not {shown}.")

    def _value(self, name: str, default: Any) -> Any:
        value = self.get(name)
        if value is None:
            if default is None:
                raise self.missing(name)
            return default
        return value
