"""Where a model is: in a folder, or on the hub. A folder wins, and without a network the cache of the hub is enough."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from quantlab.errors import PreflightError, UsageError, one_line

RANGE = 1 << 20  # bytes that one request for a header brings
REQUESTS = 8  # at a time


class HubWarning(UserWarning):
    """The hub could not be asked for what may lie beside weights."""


def require_name(model: object) -> None:
    """Raise UsageError for anything that names no model."""
    if not isinstance(model, (str, Path)):
        raise UsageError(f"model is a {type(model).__name__}; give the folder or the hub id it was loaded from")
    if not str(model).strip():
        raise UsageError(f"model is {str(model)!r}; give a folder or a hub id")


def existing_parent(path: Path) -> Path:
    """The nearest folder above that exists: where the bytes will go."""
    parent = path.absolute().parent
    while not parent.exists():
        parent = parent.parent
    return parent


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
            raise UsageError(f"{model}: revision {revision} needs a model on the hub, this is a folder")
        return folder
    if folder.exists():
        raise UsageError(f"{model}: is a file; give the folder that holds config.json and the weights")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model) or model.startswith("."):
        raise UsageError(f"{model}: no such folder")
    return _download(model, revision, ignored)


@contextmanager
def hub_headers(model: str, revision: str | None, ignored: list[str]) -> Iterator[Path | None]:
    """What can be known of a model before its weights are downloaded; None where there is nothing to download.

    The folder holds all files but weights and, of each safetensors file that is not in the hub's cache, the header in a
    sparse file of full size. It goes with the block. Raises as `locate`.
    """
    info = None if Path(model).expanduser().exists() else _hub_info(model, revision)
    if info is None:  # a folder, a wrong name, or a hub out of reach: `locate` knows
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="quantlab-headers-") as folder:
        with _told_in_a_line(model, revision):
            fetched = _fetch_headers(info, ignored, Path(folder))
        yield Path(folder) if fetched else None


def side_file(folder: Path, name: str) -> Path | None:
    """A file beside the weights that lie in `folder`; in the hub's cache maybe they alone, then the hub is asked.

    None where there is no such file. Warns where nobody can say.
    """
    if (folder / name).is_file():
        return folder / name
    if folder.parent.name != "snapshots":  # where the cache has a folder for each commit
        return None
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    model, cache = folder.parents[1].name.removeprefix("models--").replace("--", "/"), folder.parents[2]
    if try_to_load_from_cache(model, name, cache, revision=folder.name) is not None:  # the hub has said: no such file
        return None
    try:
        return Path(hf_hub_download(model, name, revision=folder.name, cache_dir=cache))
    except Exception as error:  # the network fails in many ways
        if not isinstance(error, EntryNotFoundError) or isinstance(error, LocalEntryNotFoundError):
            why = one_line(error)
            told = f"{model}: whether the hub has {name} is unknown ({why}); it is loaded without"
            warnings.warn(told, HubWarning, stacklevel=2)
        return None


def _hub_info(model: str, revision: str | None) -> Any:
    """What the hub says of a model; None where it says nothing, for whatever reason."""
    from huggingface_hub import HfApi

    try:
        return HfApi().model_info(model, revision=revision)
    except Exception:  # `locate` asks again, and says what is wrong
        return None


def _fetch_headers(info: Any, ignored: list[str], folder: Path) -> bool:
    """Fill the folder of `hub_headers`; False, and it stays empty, where the hub's cache has all weights."""
    from huggingface_hub import HfFileSystem, snapshot_download

    from quantlab.shards import HEADER_LIMIT

    kept = Path(snapshot_download(info.id, revision=info.sha, ignore_patterns=[*ignored, "*.safetensors"])).resolve()
    names = [sibling.rfilename for sibling in info.siblings]
    missing = [n for n in names if n.endswith(".safetensors") and "/" not in n and not (kept / n).exists()]
    if not missing:
        return False
    shutil.copytree(kept, folder, copy_function=os.symlink, dirs_exist_ok=True)
    hub = HfFileSystem()

    def fetch(name: str) -> None:
        path = folder / name
        with hub.open(f"{info.id}@{info.sha}/{name}", block_size=RANGE) as remote:
            start = remote.read(8)
            path.write_bytes(start + remote.read(min(int.from_bytes(start, "little"), HEADER_LIMIT)))
            os.truncate(path, remote.size)

    with ThreadPoolExecutor(REQUESTS) as pool:
        list(pool.map(fetch, missing))
    return True


def _download(model: str, revision: str | None, ignored: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    _require_space(model, revision, ignored)
    with _told_in_a_line(model, revision):
        return Path(snapshot_download(model, revision=revision, ignore_patterns=ignored))


def _require_space(model: str, revision: str | None, ignored: list[str]) -> None:
    """Raise PreflightError where the hub's cache cannot take what it does not have."""
    from huggingface_hub import constants, snapshot_download

    try:
        files = snapshot_download(model, revision=revision, ignore_patterns=ignored, dry_run=True)
    except Exception:  # the download says what is wrong
        return
    needed = sum(file.file_size or 0 for file in files if file.will_download)
    free = shutil.disk_usage(existing_parent(Path(constants.HF_HUB_CACHE, model))).free
    if needed > free:
        raise PreflightError(
            f"{model}: has {needed / 1e9:.2f} GB to download, the disk of {constants.HF_HUB_CACHE} has "
            f"{free / 1e9:.2f} GB free; free space, or set HF_HOME to a folder on another disk"
        )


@contextmanager
def _told_in_a_line(model: str, revision: str | None) -> Iterator[None]:
    """What the hub's library raises, as an error of ours."""
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except RevisionNotFoundError:
        raise UsageError(f"{model}: no revision {revision!r} on the hub") from None
    except GatedRepoError:
        raise UsageError(f"{model}: gated on the hub; accept its licence there and run `hf auth login`") from None
    except LocalEntryNotFoundError:
        raise UsageError(f"{model}: no such folder, not in the local hub cache, and the hub is out of reach") from None
    except RepositoryNotFoundError:
        raise UsageError(f"{model}: no such folder, and no such model on the hub") from None
    except ValueError as error:  # not a repository name at all
        raise UsageError(f"{model}: no such folder or model: {one_line(error)}") from None
    except Exception as error:  # the network fails in many ways, and its libraries name them differently
        raise PreflightError(f"{model}: download failed: {one_line(error)}") from None
