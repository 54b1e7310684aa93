"""What the cache of converted checkpoints holds, how large and how old, and how it goes again.

A file goes at no cost but time: it is converted anew when somebody names its checkpoint again."""

import contextlib
import dataclasses
import time
from collections.abc import Iterable
from pathlib import Path

from .cache import about, cache_folder, converter_key, record_of
from .errors import ModelError

DAY = 24 * 3600.0
FORGET_DAYS = 7
KEY_DAYS = 30  # after which a remembered hash of a checkpoint goes
PART_DAYS = 1  # after which nobody writes to a temporary file any more


@dataclasses.dataclass(frozen=True)
class Kept:
    """A file of the cache. made and used are seconds since 1970; current says whether today's
    converter made it. One that another version made is used by that version alone."""

    path: Path
    name: str
    type: str
    source: str
    size: int
    made: float
    used: float
    current: bool


def kept() -> list[Kept]:
    """The files of the cache, those used last first."""
    found = []
    for path in cache_folder().glob("*.gguf"):
        with contextlib.suppress(OSError):  # somebody else empties the cache
            state = path.stat()
            used = state.st_mtime
            with contextlib.suppress(OSError):
                used = max(used, record_of(path).stat().st_mtime)
            name, type, _ = ["", "", *path.stem.rsplit("-", 2)][-3:]
            said = about(path)
            found.append(
                Kept(
                    path,
                    name,
                    type,
                    said.get("source", ""),
                    state.st_size,
                    state.st_mtime,
                    used,
                    said.get("code") == converter_key(),
                )
            )
    return sorted(found, key=lambda each: -each.used)


def named(what: str) -> list[Kept]:
    """The files that a person means: by the name of the checkpoint, its source, or the name of the
    file or its beginning. Raises ModelError where there is none."""
    files, folder = kept(), str(Path(what).resolve())
    found = (
        [each for each in files if what in (each.path.name, each.path.stem, str(each.path))]
        or [each for each in files if what in (each.name, each.source.partition("@")[0])]
        or [each for each in files if each.source in (what, folder)]
        or [each for each in files if len(what) > 2 and each.path.name.startswith(what)]
    )
    if found:
        return found
    raise ModelError(f"the cache has no {what}; `mobilellm models` lists what it has")


def remove(files: Iterable[Kept]) -> None:
    """Takes files out of the cache. Whoever runs one keeps it until the end. Raises OSError."""
    for each in files:
        record_of(each.path).unlink(missing_ok=True)  # first: what is half gone is not used
        each.path.unlink(missing_ok=True)


def outdated(days: float = 0) -> list[Kept]:
    """The files that other versions of the converter made, and nobody has used for so many days."""
    before = time.time() - days * DAY
    return [each for each in kept() if not each.current and each.used <= before]


def forget_older(source: str, type: str) -> None:
    """Removes what other versions made of a checkpoint that has just been converted, where nobody
    has used it for a week: an environment with such a version would convert it anew."""
    remove([each for each in outdated(FORGET_DAYS) if (each.source, each.type) == (source, type)])


def sweep() -> None:
    """Removes what is of no use to anybody: hashes of checkpoints that were not asked for in a
    month, temporary files of processes that were killed, records of files that are gone."""
    now = time.time()
    folder = cache_folder()
    records = [path for path in folder.glob("*.whole") if not path.with_suffix(".gguf").exists()]
    keys = [p for p in folder.glob("*.key") if _age(p, now) > KEY_DAYS * DAY]
    parts = [p for p in folder.glob(".*") if p.is_file() and _age(p, now) > PART_DAYS * DAY]
    for path in [*records, *keys, *parts]:
        with contextlib.suppress(OSError):
            path.unlink()


def _age(path: Path, now: float) -> float:
    try:
        return now - path.stat().st_mtime
    except OSError:
        return 0.0
