"""`mobilellm models` and `pull`: the cache as a person sees it."""

import json
import os
import re
import subprocess
import sysconfig
import time
from pathlib import Path

import pytest
from checkpoints import make_checkpoint

from mobilellm_cpp import cache, kept

MOBILELLM = str(Path(sysconfig.get_path("scripts")) / "mobilellm")


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with checkpoints `tiny` and `small`, and a cache of its own."""
    make_checkpoint(tmp_path / "tiny")
    make_checkpoint(tmp_path / "small", sharing=True)
    monkeypatch.setenv("MOBILELLM_CACHE", str(tmp_path / "cache"))
    return tmp_path


def run(place, *arguments, code=0):
    done = subprocess.run(
        [MOBILELLM, *map(str, arguments)], capture_output=True, text=True, cwd=place, timeout=120
    )
    assert done.returncode == code, done.stderr
    return done.stdout if code == 0 else done.stderr


def age(each, days):
    """As if a file had not been used for so long."""
    moment = time.time() - days * 24 * 3600
    os.utime(cache.record_of(each.path), (moment, moment))
    os.utime(each.path, (moment, moment))


def of_another_version(each, days=0):
    """As if another version had made a file."""
    record = cache.record_of(each.path)
    line, about = record.read_text().splitlines()
    size, _, digest = line.split()
    about = json.dumps({**json.loads(about), "code": "another"})
    path = each.path.with_name(each.path.name.replace(each.path.stem[-4:], "0000"))
    each.path.rename(path)
    record.unlink()
    cache.record_of(path).write_text(f"{size} {path.stat().st_mtime_ns} {digest}\n{about}\n")
    (moved,) = [one for one in kept.kept() if one.path == path]
    age(moved, days)
    return path


def test_pull_and_list(place):
    path = Path(run(place, "pull", "tiny", "--type", "q8_0").strip())
    assert path.is_file() and path.parent == place / "cache"
    assert run(place, "pull", "tiny", "--type", "q8_0").strip() == str(path)
    run(place, "pull", place / "small")
    said = json.loads(run(place, "models", "--json"))
    assert said["folder"] == str(place / "cache")
    found = {(each["name"], each["type"]): each for each in said["models"]}
    assert set(found) == {("tiny", "q8_0"), ("small", "balanced")}
    one = found["tiny", "q8_0"]
    assert one["path"] == str(path) and one["size"] == path.stat().st_size and one["current"]
    assert one["source"] == str(place / "tiny") and abs(one["used"] - time.time()) < 300
    (place / "file").write_text("")  # no folder for a cache
    done = subprocess.run(
        [MOBILELLM, "pull", "tiny"],
        capture_output=True,
        text=True,
        cwd=place,
        env={**os.environ, "MOBILELLM_CACHE": str(place / "file")},
    )
    assert done.returncode == 1 and done.stdout == "" and "was not kept" in done.stderr
    first, second = run(place, "models").splitlines()  # the last one used first
    assert re.fullmatch(rf"small-balanced-\w+ +[\d.]+ KiB +\d+ (s|min)  {place}/small", first)
    assert second.startswith(path.stem)


def test_show_is_inspect(place):
    path = Path(run(place, "pull", "small").strip())
    rows = run(place, "models", "show", "small").splitlines()
    assert rows[0].split() == ["source", str(place / "small")]
    assert rows[2:] == run(place, "inspect", path).splitlines()
    about = json.loads(run(place, "models", "show", "small", "--json"))["models"][0]["about"]
    assert about == json.loads(run(place, "inspect", path, "--json"))


def test_a_use_counts(place):
    path = cache.converted(place / "tiny", "q8_0")
    (one,) = kept.kept()
    age(one, 20)
    assert time.time() - kept.kept()[0].used > 19 * kept.DAY
    assert cache.converted(place / "tiny", "q8_0") == path
    assert time.time() - kept.kept()[0].used < 300


def test_remove(place):
    for name, type in (("tiny", "q8_0"), ("tiny", "f16"), ("small", "f16")):
        cache.converted(place / name, type)
    said = run(place, "models", "rm", "tiny", "tiny")
    assert sorted(line[:7] for line in said.splitlines()) == ["tiny-f1", "tiny-q8"]
    (left,) = kept.kept()
    assert left.name == "small" and len(list((place / "cache").glob("*.whole"))) == 1
    assert run(place, "models", "rm", left.path.stem[:12]).startswith("small-f16")
    said = run(place, "models", "rm", "tiny", code=1)
    assert said.startswith("mobilellm: the cache has no tiny") and said.count("\n") == 1
    assert run(place, "models") == ""


def test_prune(place):
    cache.converted(place / "tiny", "f16")
    old = of_another_version(kept.kept()[0], days=3)
    mine = cache.converted(place / "tiny", "f16")
    folder = place / "cache"
    (folder / ".killed.part").write_text("x")
    (folder / ".killed.part").touch()
    os.utime(folder / ".killed.part", (0, 0))
    (folder / ".new.part").write_text("x")
    assert old.exists() and mine.exists()
    assert run(place, "models", "prune", "--days", 5) == ""
    assert run(place, "models", "prune") == f"{old.name}\n"
    assert [each.path for each in kept.kept()] == [mine]
    assert not (folder / ".killed.part").exists() and (folder / ".new.part").exists()
    assert run(place, "models", "prune", "--all") == f"{mine.name}\n"


def test_what_other_versions_made_goes_by_itself_in_time(place):
    """Once nobody has used it for a week, and the same checkpoint is converted again."""
    for days, left in ((3, 2), (8, 1)):
        for each in kept.kept():
            kept.remove([each])
        cache.converted(place / "tiny", "f16")
        of_another_version(kept.kept()[0], days)
        cache.converted(place / "small", "f16")  # of others nothing is known
        kept.remove(kept.named("small"))
        assert len(kept.kept()) == 1
        cache.converted(place / "tiny", "f16")
        assert len(kept.kept()) == left
