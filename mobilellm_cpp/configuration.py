"""Defaults of the command line from a TOML file, so that nobody types the same options every day.

    threads = 2                  # for every command that has --threads

    [generate]                   # for one command
    temperature = 0.7
    stop = ["\\n\\n"]

Keys are names of options, and `model` is the MODEL argument. What is typed wins. The file is
$MOBILELLM_CONFIG, or config.toml in the user's configuration folder."""

import difflib
import os
import sys
from pathlib import Path
from typing import Any

import platformdirs

from .errors import MobileLLMError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


class ConfigurationError(MobileLLMError):
    """A configuration file that cannot be followed."""


def configuration_file() -> Path:
    """Where the file is, whether or not there is one."""
    own = os.environ.get("MOBILELLM_CONFIG")
    if own:
        return Path(own).expanduser()
    return Path(platformdirs.user_config_dir("mobilellm-cpp")) / "config.toml"


def defaults(group: Any) -> dict[str, Any]:
    """The default_map of click for a group of commands. Raises ConfigurationError for a file that
    cannot be read, a command or an option that there is not, and a value of the wrong kind."""
    path = configuration_file()
    try:
        given = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise ConfigurationError(f"{path}: {error.strerror}") from error
    except ValueError as error:  # of TOML and of UTF-8
        raise ConfigurationError(f"{path} is not TOML: {error}") from None
    tables = {name: value for name, value in given.items() if isinstance(value, dict)}
    shared = {name: value for name, value in given.items() if not isinstance(value, dict)}
    names = {name: _parameters(command) for name, command in group.commands.items()}
    for name in tables:
        if name not in names:
            raise _unknown(path, f"the command {name}", name, names)
    used = set()
    found: dict[str, Any] = {}
    for command, known in names.items():
        values = {name: value for name, value in shared.items() if _key(name) in known}
        used |= set(values)
        for name in (own := tables.get(command, {})):
            if _key(name) not in known:
                raise _unknown(path, f"{command} and its option {name}", name, known)
        found[command] = {
            known[_key(name)].name: _checked(path, name, known[_key(name)], value)
            for name, value in {**values, **own}.items()
        }
    for name in shared:
        if name not in used:
            everything = {key for known in names.values() for key in known}
            raise _unknown(path, f"the option {name}", name, everything)
    return found


def _key(name: str) -> str:
    return name.replace("_", "-")


def _parameters(command: Any) -> dict[str, Any]:
    """The parameters of a command by the long names that people type: temperature, model."""
    found = {}
    for parameter in command.params:
        for name in parameter.opts if parameter.name != "help" else ():
            if name.startswith("--") or not name.startswith("-"):
                found[_key(name.lstrip("-"))] = parameter
    return found


def _checked(path: Path, name: str, parameter: Any, value: Any) -> Any:
    """A value as click takes it, which looks at it as at one that was typed."""
    several = parameter.multiple if hasattr(parameter, "multiple") else parameter.nargs == -1
    if isinstance(value, dict) or (isinstance(value, list) and not several):
        raise ConfigurationError(f"{path}: {name} is one value, not {value!r}")
    if getattr(parameter, "is_flag", False):
        if not isinstance(value, bool):
            raise ConfigurationError(f"{path}: {name} is true or false, not {value!r}")
        return value
    if isinstance(value, bool):
        raise ConfigurationError(f"{path}: {name} is not {str(value).lower()}")
    return [value] if several and not isinstance(value, list) else value


def _unknown(path: Path, what: str, name: str, known: Any) -> ConfigurationError:
    near = difflib.get_close_matches(_key(name), known, 1)
    hint = f"; did you mean {near[0]}?" if near else ""
    return ConfigurationError(f"{path} names {what}, which there is not{hint}")
