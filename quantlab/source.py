"""A model as it lies on the disk: config, tensors and side files, all of them checked before any work."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from quantlab.checkpoint import CONFIG, INDEX, OURS, SINGLE, Stored, stored_in
from quantlab.errors import PreflightError
from quantlab.locate import hub_headers, locate, require_name
from quantlab.shards import ShardReader, TensorInfo, read_header

PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl"}
OTHER_WEIGHTS = PICKLES | {".gguf", ".h5", ".msgpack", ".onnx", ".onnx_data", ".ot", ".tflite", ".mlmodel", ".npz"}
OTHER_WEIGHT_FOLDERS = {"original", "metal", "onnx", "openvino", "gguf", "coreml", "mlx", OURS}
# What transformers calls weights, shards and variants (`model.fp16.safetensors`) of them.
_WEIGHTS = re.compile(r"model(\.\w+)?(-\d+-of-\d+)?\.safetensors")
NOT_DOWNLOADED = [*(f"*{suffix}" for suffix in OTHER_WEIGHTS), *(f"{name}/*" for name in OTHER_WEIGHT_FOLDERS - {OURS})]


@dataclass(frozen=True)
class Source:
    """An opened checkpoint: everything about it is known and checked, no weight has been read.

    model       as the user named it
    folder      where it lies
    config      config.json
    tensors     by name, in the order of shards and of positions in them
    side_files  relative paths of all files that belong to the model and are not its weights
    left_out    relative paths of weights once more: in other formats, of an older save, of another precision
    lost_links  relative paths of links that lead nowhere, or back to where the model lies
    """

    model: str
    folder: Path
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]
    side_files: tuple[Path, ...] = ()
    left_out: tuple[Path, ...] = ()
    lost_links: tuple[Path, ...] = ()
    reader: ShardReader = field(default_factory=ShardReader, compare=False)

    @classmethod
    def open(
        cls,
        model: str | Path,
        revision: str | None = None,
        *,
        before_download: Callable[[Source], object] | None = None,
    ) -> Source:
        """Find the model, read its config and headers, check them all.

        before_download  called with what the headers tell, if there are weights to download; it may refuse the model

        Raises UsageError where there is no such model and PreflightError where it is damaged or in another format.
        """
        require_name(model)
        if before_download is not None:
            with hub_headers(str(model), revision, NOT_DOWNLOADED) as folder:
                if folder is not None:
                    before_download(cls._read(model, folder))
        return cls._read(model, locate(str(model), revision, NOT_DOWNLOADED))

    @classmethod
    @contextmanager
    def open_headers(cls, model: str | Path, revision: str | None = None) -> Iterator[Source]:
        """`open` for those who read no weights, which are not downloaded; outside the block its folder may be gone."""
        require_name(model)
        with hub_headers(str(model), revision, NOT_DOWNLOADED) as folder:
            yield cls._read(model, folder or locate(str(model), revision, NOT_DOWNLOADED))

    @classmethod
    def _read(cls, model: str | Path, folder: Path) -> Source:
        try:
            shards, index = _weight_files(folder)
            config = read_config(folder)
            tensors = _collect(folder, shards, index)
            side, left_out = _side_files(folder, shards)
            lost = tuple(path for path in side if not (folder / path).is_file())
        except OSError as error:
            raise PreflightError(f"{folder}: cannot be read: {error.strerror}") from None
        side = tuple(path for path in side if path not in lost)
        return cls(str(model), folder, config, tensors, side, left_out, lost)

    @property
    def stored(self) -> Stored | None:
        """How it is quantized, or None. Raises PreflightError for formats that this project does not read."""
        try:
            return stored_in(self.config)
        except PreflightError as error:
            raise PreflightError(f"{self.model}: {error}; start from the original model") from None

    @property
    def weight_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        """One tensor, or some of its rows, on the CPU."""
        return self.reader.read(self.tensors[name], rows)


def read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.is_file():
        if (folder / "adapter_config.json").is_file():
            raise PreflightError(f"{folder}: is an adapter (LoRA); merge it into its model first, and give that")
        raise PreflightError(f"{folder}: has no {CONFIG}; needs a model folder in the Hugging Face layout")
    return _read_json(path)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise PreflightError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise PreflightError(f"{path}: is not JSON") from None
    if not isinstance(data, dict):
        raise PreflightError(f"{path}: is not a JSON object")
    return data


def _weight_files(folder: Path) -> tuple[list[Path], dict[str, str] | None]:
    """The shards in order, and the index where there is one."""
    if (folder / INDEX).is_file():
        index = _read_index(folder / INDEX)
        shards = [folder / name for name in sorted(set(index.values()))]
        if (folder / SINGLE).is_file() and folder / SINGLE not in shards:
            raise PreflightError(
                f"{folder}: holds {SINGLE} and {INDEX}, which does not name it; transformers would load the first, "
                "vLLM what the second names: remove what is not the model (an older save?)"
            )
        for shard in shards:
            if not shard.is_file():
                raise PreflightError(f"{folder / INDEX}: names {shard.name}, which is missing (download it again)")
        return shards, index
    if (folder / SINGLE).is_file():
        return [folder / SINGLE], None
    shards = sorted(path for path in folder.glob("*.safetensors") if path.is_file())
    if shards:
        return shards, None
    raise PreflightError(f"{folder}: {_why_no_weights(folder)}")


def _why_no_weights(folder: Path) -> str:
    suffixes = {path.suffix for path in folder.iterdir()}
    if suffixes & PICKLES:
        return (
            "holds pickled weights only; loading a pickle runs code from it, so they are refused: "
            "save the model as safetensors first (save_pretrained does)"
        )
    if ".gguf" in suffixes:
        return "holds GGUF files, which are already quantized; give the original model in safetensors"
    inner = sorted(
        path.parent for pattern in ("*/*.safetensors", "snapshots/*/*.safetensors") for path in folder.glob(pattern)
    )
    meant = f"did you mean {inner[-1]}?" if inner else "needs a model folder in the Hugging Face layout"
    return f"holds no safetensors file; {meant}"


def _read_index(path: Path) -> dict[str, str]:
    weight_map = _read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise PreflightError(f"{path}: has no weight_map")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not shard.endswith(".safetensors"):
            raise PreflightError(f"{path}: {name}: {shard!r} is not the name of a safetensors file")
        if Path(shard).name != shard or "\\" in shard:
            raise PreflightError(f"{path}: {name}: {shard!r} points out of the folder; refused")
    return weight_map


def _collect(folder: Path, shards: list[Path], index: dict[str, str] | None) -> dict[str, TensorInfo]:
    tensors: dict[str, TensorInfo] = {}
    for shard in shards:
        found, _ = read_header(shard)
        for name, info in sorted(found.items(), key=lambda item: item[1].begin):
            if name in tensors:
                both = f"{tensors[name].shard.name} and {shard.name}"
                raise PreflightError(f"{folder}: duplicate tensor {name} in {both}")
            if index is not None and index.get(name) != shard.name:
                says = f"puts it into {index[name]}" if name in index else "does not name it"
                raise PreflightError(f"{shard}: holds {name}, but {INDEX} {says}")
            tensors[name] = info
    for name in index or ():
        if name not in tensors:
            raise PreflightError(f"{folder / INDEX}: names {name}, which is in no shard")
    if not tensors:
        raise PreflightError(f"{folder}: its safetensors files hold no tensor")
    return tensors


def _side_files(folder: Path, shards: Sequence[Path]) -> tuple[tuple[Path, ...], tuple[Path, ...]]:
    """All other files of the model, and those that are its weights once more (`Source.left_out`)."""
    side: list[Path] = []
    left_out: list[Path] = []
    written_anew = {CONFIG, INDEX, *(shard.name for shard in shards)}
    for path in sorted(_walk(folder)):
        relative = path.relative_to(folder)
        top = relative.parts[0]
        if str(relative) in written_anew or any(part.startswith(".") for part in relative.parts) or top == OURS:
            continue
        another = len(relative.parts) == 1 and (
            path.suffix in OTHER_WEIGHTS
            or path.name.startswith("consolidated")
            or path.name.endswith(".index.json")
            or _WEIGHTS.fullmatch(path.name)
        )
        (left_out if another or top in OTHER_WEIGHT_FOLDERS else side).append(relative)
    return tuple(side), tuple(left_out)


def _walk(folder: Path, above: frozenset[Path] = frozenset()) -> Iterator[Path]:
    """All files below, those of linked folders too; of links that lead nowhere, or to a folder `above`, themselves."""
    above |= {folder.resolve()}
    for path in folder.iterdir():
        leads_back = path.is_symlink() and any(inner.is_relative_to(path.resolve()) for inner in above if path.is_dir())
        if path.is_dir() and not leads_back:
            yield from _walk(path, above)
        elif path.is_file() or path.is_symlink():
            yield path
