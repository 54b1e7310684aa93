"""Fetches a checkpoint from the Hugging Face hub: only the files that a conversion reads."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from mobilellm_cpp.errors import CheckpointError

from .adapter import ADAPTER_WEIGHTS, CONFIG, Adapter
from .chat_template import FURTHER
from .config import read_json
from .tokenizer_file import TOKENIZER_FILES
from .weight_files import INDEXES, WEIGHTS, weight_files

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError


def download(repo: str, revision: str | None, *, config_only: bool = False) -> Path:
    """The folder of the snapshot in huggingface_hub's cache; finished files are not fetched again.
    With `config_only` nothing but config.json is. An adapter's folder is fetched as one.

    huggingface_hub takes a broken connection up again where it broke, and a file stands in the
    snapshot whole or not at all. Without a network, or while the hub fails, a complete snapshot in
    the cache is used. Raises CheckpointError.
    """
    import huggingface_hub
    from huggingface_hub import errors

    where = repo if revision is None else f"{repo} at revision {revision}"
    try:
        return _fetch(repo, revision, config_only)
    except errors.HFValidationError:
        raise CheckpointError(f"{repo} is neither a folder here nor a valid hub id.") from None
    except Exception as error:  # no network, or told not to use it: the class depends on versions
        cause = _response_error(error)
        status = cause.response.status_code if cause is not None else 0
        page = f"{huggingface_hub.constants.ENDPOINT}/{repo}"
        if isinstance(cause, errors.GatedRepoError):
            if _has_token():
                step = f"your token has no access to it: ask for access at {page}"
            else:
                step = f"accept its terms at {page}, then run `hf auth login` or set HF_TOKEN"
            reason = f"is gated, and {step}"
        elif isinstance(cause, errors.RevisionNotFoundError):
            reason = "does not exist on the hub"
        elif status == 401 and _has_token():
            reason = "cannot be fetched: the hub refuses your token (`hf auth login`, HF_TOKEN)"
        elif isinstance(cause, errors.RepositoryNotFoundError) or status == 401:
            reason = (
                "is neither a folder here nor a model on the hub "
                "(if it is private, run `hf auth login` or set HF_TOKEN)"
            )
        elif cause is not None and status < 500 and status != 429:
            reason = f"cannot be fetched: {_first_line(cause)}"
        elif _is_local(error):
            reason = f"cannot be put into the hub cache: {_first_line(error)}"
        elif (cached := _cached(repo, revision, config_only)) is not None:
            return cached
        else:
            reason = (
                f"is no folder here, it cannot be fetched from the hub ("
                f"{_first_line(cause or error)}), and the hub cache has no complete copy"
            )
        raise CheckpointError(f"{where} {reason}.") from None


def _fetch(repo: str, revision: str | None, config_only: bool) -> Path:
    from huggingface_hub import HfApi, snapshot_download

    info = HfApi().model_info(repo, revision=revision)
    files = {sibling.rfilename for sibling in info.siblings or []}
    if config_only:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=["config.json"]))
    weights = next((name for name in WEIGHTS if name in files), None)
    # First all that is small: a snapshot that has its weights then has everything.
    templates = f"{FURTHER}/*.jinja"
    small = [
        "config.json",
        *TOKENIZER_FILES,
        templates,
        *(name for name in INDEXES if name == weights),
    ]
    if weights is None:
        small += [CONFIG, *ADAPTER_WEIGHTS]
    folder = Path(snapshot_download(repo, revision=revision, allow_patterns=small))
    if weights is not None:
        wanted = _shards(folder / weights) if weights in INDEXES else {weights}
        names = sorted(wanted & files)
        snapshot_download(repo, revision=folder.name, allow_patterns=names)
    return folder


def _shards(index: Path) -> set[str]:
    """The files that an index names; what is wrong with it is said when the folder is opened."""
    try:
        weight_map = read_json(index).get("weight_map")
    except CheckpointError:
        return set()
    values = weight_map.values() if isinstance(weight_map, dict) else []
    return {name for name in values if isinstance(name, str) and "/" not in name}


def _cached(repo: str, revision: str | None, config_only: bool) -> Path | None:
    """The snapshot in the cache, if all that is wanted is there."""
    import huggingface_hub

    for name in ("config.json", CONFIG):
        config = huggingface_hub.try_to_load_from_cache(repo, name, revision=revision)
        if isinstance(config, str):
            break
    else:
        return None
    folder = Path(config).parent
    try:
        if name == CONFIG:
            Adapter(folder, repo)
        elif not config_only:
            weight_files(folder)
    except CheckpointError:
        return None
    return folder


def _has_token() -> bool:
    import huggingface_hub

    return bool(huggingface_hub.get_token())


def _response_error(error: BaseException | None) -> HfHubHTTPError | None:
    """What the hub answered, in an error or behind it: snapshot_download hides it in others."""
    from huggingface_hub.errors import HfHubHTTPError

    while error is not None and not isinstance(error, HfHubHTTPError):
        error = error.__cause__
    return error


def _is_local(error: Exception) -> bool:
    """Whether the disk failed, and not the network."""
    numbered = isinstance(error, OSError) and error.errno is not None and error.errno > 0
    return numbered and not isinstance(error, (ConnectionError, TimeoutError))


def _first_line(error: BaseException) -> str:
    line = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
    return re.sub(r"^\[Errno -?\d+\] ", "", line)
