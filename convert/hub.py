"""Fetches a checkpoint from the Hugging Face hub: only the files that a conversion reads."""

from __future__ import annotations

from pathlib import Path

from mobilellm_cpp.errors import CheckpointError

from .checkpoint import SAFETENSORS, SAFETENSORS_INDEX, TOKENIZER_FILES, TORCH, TORCH_INDEX


def download(repo: str, revision: str | None) -> Path:
    """The folder of the snapshot in huggingface_hub's cache; finished files are not fetched again.

    Without a network the cached snapshot is used.
    """
    import huggingface_hub
    from huggingface_hub import errors

    where = repo if revision is None else f"{repo} at revision {revision}"
    try:
        info = huggingface_hub.HfApi().model_info(repo, revision=revision)
        files = {sibling.rfilename for sibling in info.siblings or []}
        wanted = ["config.json", *TOKENIZER_FILES, *_weights(files)]
        return Path(
            huggingface_hub.snapshot_download(repo, revision=revision, allow_patterns=wanted)
        )
    except errors.GatedRepoError:
        raise CheckpointError(
            f"{where} is gated: accept its terms on huggingface.co and run `hf auth login`."
        ) from None
    except errors.RevisionNotFoundError:
        raise CheckpointError(f"{where} does not exist on the hub.") from None
    except errors.RepositoryNotFoundError:
        raise CheckpointError(
            f"{where} is neither a folder here nor a model on the hub "
            "(if it is private, run `hf auth login`)."
        ) from None
    except errors.HFValidationError:
        raise CheckpointError(f"{repo} is neither a folder here nor a valid hub id.") from None
    except errors.HfHubHTTPError as error:
        raise CheckpointError(f"{where} cannot be fetched: {_first_line(error)}.") from None
    except Exception as error:  # no network, or told not to use it: the class depends on versions
        if isinstance(error, OSError) and error.errno is not None and error.filename:
            raise  # the disk, not the hub
        cached = huggingface_hub.try_to_load_from_cache(repo, "config.json", revision=revision)
        if isinstance(cached, str):
            return Path(cached).parent
        raise CheckpointError(
            f"{where} is not in the hub cache, and the hub cannot be reached: {_first_line(error)}."
        ) from None


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def _weights(files: set[str]) -> list[str]:
    """The weight files to fetch; safetensors are preferred. Shards may have any name."""
    if SAFETENSORS in files:
        return [SAFETENSORS]
    index, ending = TORCH_INDEX, ".bin"
    if SAFETENSORS_INDEX in files:
        index, ending = SAFETENSORS_INDEX, ".safetensors"
    elif TORCH in files:
        return [TORCH]
    return [index, *sorted(name for name in files if name.endswith(ending) and "/" not in name)]
