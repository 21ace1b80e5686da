"""Where a model is: in a folder, or on the hub. A folder wins, and without a network the cache of the hub is enough."""

from __future__ import annotations

import re
from pathlib import Path

from quantlab.errors import PreflightError, UsageError


def require_name(model: object) -> None:
    """Raise UsageError for anything that names no model."""
    if not isinstance(model, (str, Path)):
        raise UsageError(f"model is a {type(model).__name__}; give the folder or the hub id it was loaded from")
    if not str(model).strip():
        raise UsageError(f"model is {str(model)!r}; give a folder or a hub id")


def locate(model: str, revision: str | None, ignored: list[str]) -> Path:
    """The folder of a model: `model` itself, or what the hub has under that id, downloaded or from its cache.

    ignored  patterns of files that are not downloaded

    Raises UsageError where there is no such model, PreflightError where it cannot be fetched; each is one line.
    """
    folder = Path(model).expanduser()
    if folder.suffix == ".gguf":
        raise PreflightError(f"{model}: GGUF files are already quantized; give the original model in safetensors")
    if folder.is_dir():
        if revision is not None:
            raise UsageError(f"{model}: --revision {revision} needs a model on the hub, this is a folder")
        return folder
    if folder.exists():
        raise UsageError(f"{model}: is a file; give the folder that holds config.json and the weights")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model) or model.startswith("."):
        raise UsageError(f"{model}: no such folder")
    return _download(model, revision, ignored)


def _download(model: str, revision: str | None, ignored: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        return Path(snapshot_download(model, revision=revision, ignore_patterns=ignored))
    except RevisionNotFoundError:
        raise UsageError(f"{model}: no revision {revision!r} on the hub") from None
    except GatedRepoError:
        raise UsageError(f"{model}: gated on the hub; accept its licence there and run `hf auth login`") from None
    except LocalEntryNotFoundError:
        raise UsageError(f"{model}: no such folder, not in the local hub cache, and the hub is out of reach") from None
    except RepositoryNotFoundError:
        raise UsageError(f"{model}: no such folder, and no such model on the hub") from None
    except ValueError as error:  # not a repository name at all
        raise UsageError(f"{model}: no such folder or model: {_one_line(error)}") from None
    except Exception as error:  # the network fails in many ways, and its libraries name them differently
        raise PreflightError(f"{model}: download failed: {_one_line(error)}") from None


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
