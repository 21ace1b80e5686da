"""What a quantized cache has to know of a model's keys: measured once, and kept in a file beside the checkpoint.

Per layer and channel two numbers (`quantlab_calib.rope`), and of keys and values as a whole the largest magnitudes, of
which engines make the scale of their FP8 cache. They belong to certain weights, so the file names them by a digest:
what was measured on others is never used. The digest is of samples, because hashing a model takes as long as reading
it, and of the checkpoint as it is stored: whatever rewrites the weights (`convert`, `save_pretrained`) writes it anew.
"""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from quantlab import kinds
from quantlab.architecture import counterpart, meta_model
from quantlab.checkpoint import KEY_STATISTICS, KV_SCALES, module_of
from quantlab.errors import PreflightError, UsageError
from quantlab.jobs import Replace
from quantlab.output import Output
from quantlab.shards import TensorInfo, TensorSlot, layout
from quantlab.source import Source
from quantlab.summary import Progress
from quantlab_calib import data, rope
from quantlab_calib.capture import CaptureError
from quantlab_kernels.formats import E4M3

if TYPE_CHECKING:
    from quantlab.preflight import Plan

FLOOR = 1 / 64  # least scale of a channel, of the head's largest: what hardly moved while measuring still may
SAMPLE = 4096  # bytes of each tensor that the digest sees
DIGEST = "weights"  # key of the file's metadata


class Keys(NamedTuple):
    """Of one layer: mean and scale of each channel [1, Hkv, D] float32, and the largest magnitudes of keys and of
    values [2] float32, where they are known."""

    mean: Tensor
    scale: Tensor
    amax: Tensor | None = None


class StaleKeysWarning(UserWarning):
    """What was measured on keys is not of these weights; it is measured again."""


def of_statistics(found: rope.Statistics) -> dict[int, Keys]:
    return {layer: Keys(x.mean, channel_scale(x.spread), x.amax) for layer, x in found.items()}


def channel_scale(spread: Tensor) -> Tensor:
    """[1, Hkv, D] scale of each channel from how far it strays; all ones where nothing strays.

    SmoothQuant's migration (arXiv 2211.10438) with all of it on the keys' side: queries are not quantized.
    """
    largest = spread.amax(-1, keepdim=True)
    return torch.where(largest > 0, spread.maximum(FLOOR * largest), 1.0)


def texts(folder: str | Path, config: Any, *, trust_remote_code: bool = False) -> Tensor:
    """Tokens [pieces, length] int64 of the bundled text, for a model of this config. Raises data.DataError where the
    folder has no tokenizer, or one of another model."""
    text = config.get_text_config(decoder=True)
    tokenizer = data.load_tokenizer(folder, trust_remote_code=trust_remote_code)
    length = min(rope.PIECE, rope.horizon_of(text))
    tokens = data.windows("bundled", tokenizer, "calibration", count=rope.PIECES, length=length)
    if int(tokens.max()) >= text.vocab_size:
        raise data.DataError(
            f"{folder}: its tokenizer gives token {int(tokens.max())}, the model has {text.vocab_size}"
        )
    return tokens


def measure(
    source: Source,
    device: torch.device,
    kept: Path,
    progress: Progress | None = None,
    *,
    trust_remote_code: bool = False,
) -> dict[int, Keys]:
    """Measure the keys of a checkpoint that is not quantized, one block of it in memory; none of latent attention.

    kept  folder where an interrupted run finds what was measured
    Raises PreflightError, CaptureError or data.DataError where that cannot be done.
    """
    from quantlab.calibrated import blocks_of
    from quantlab.lazy import LazyModel

    path = kept / "keys.safetensors"
    if path.is_file():
        return read(path)[0]
    dtype = torch.float32 if device.type == "cpu" else None
    lazy = LazyModel(source, device, dtype, trust_remote_code=trust_remote_code)
    if getattr(lazy.model.config.get_text_config(decoder=True), "kv_lora_rank", None):
        return {}
    tokens = texts(source.folder, lazy.model.config, trust_remote_code=trust_remote_code)

    def show(block: str, done: int, total: int) -> None:
        if progress is not None:
            progress(f"measuring keys of {block}", done, total)

    blocks = blocks_of(lazy.model)
    if blocks is None:
        raise CaptureError("it has no one list of repeated blocks")
    try:
        found = rope.key_statistics_by_block(lazy.model, tokens, lazy, blocks, device, show)
    except torch.OutOfMemoryError:
        raise CaptureError(f"memory ran out on {device}") from None
    keys = of_statistics(found)
    if not all(bool(x.isfinite().all()) for layer in keys.values() for x in layer if x is not None):
        raise CaptureError("they are not finite")
    write(path, keys, "")
    return read(path)[0]


@dataclass(frozen=True)
class Measured:
    """What a run of `quantize` adds to its checkpoint.

    keys    of each layer; none where the cache needs none or they could not be measured
    scales  of the FP8 cache of engines, where the checkpoint's format has a place for them
    """

    keys: dict[int, Keys] = field(default_factory=dict)
    scales: tuple[Replace, ...] = ()
    warnings: tuple[str, ...] = ()

    def summary(self) -> dict[str, str]:
        if not self.keys:
            return {}
        scales = ", and the scales of its FP8 cache" if self.scales else ""
        return {"keys": f"{len(self.keys)} layers measured all over the context{scales}"}


def for_run(
    plan: Plan,
    device: torch.device,
    kept: Path,
    progress: Progress | None = None,
    *,
    trust_remote_code: bool = False,
) -> Measured:
    """What the recipe of a plan needs to know of keys; where that cannot be measured, a warning says so."""
    kv = plan.recipe.kv
    if kv in ("none", "16bit"):
        return Measured()
    try:
        keys = measure(plan.source, device, kept, progress, trust_remote_code=trust_remote_code)
    except (PreflightError, CaptureError, data.DataError) as error:
        reason = str(error).removeprefix(f"{plan.source.folder}: ").partition(" (")[0]
        return Measured(warnings=(f"keys were not measured, every load does it: {reason}",))
    if not keys or kv != "fp8" or plan.stored.layout == "fp8":
        return Measured(keys)
    model = meta_model(plan.source.folder, trust_remote_code)
    scales = engine_scales(model, keys, [(path, module_of(tensor)) for tensor, path in plan.paths.items()])
    if not scales:
        kind = type(model).__name__
        return Measured(keys, warnings=(f"no kv_cache_scheme: compressed-tensors knows no attention like {kind}'s",))
    return Measured(keys, scales)


def write(path: Path, keys: dict[int, Keys], weights: str) -> Path:
    """One safetensors file: `<layer>.mean`, `<layer>.scale`, `<layer>.amax`, float32; `weights` is a digest."""
    names = Keys._fields
    tensors = {
        f"{layer}.{name}": tensor.float().cpu().contiguous()
        for layer, pair in keys.items()
        for name, tensor in zip(names, pair, strict=False)
        if tensor is not None
    }
    slots = [TensorSlot(name, "F32", tuple(tensor.shape)) for name, tensor in tensors.items()]
    header = layout(slots, {"format": "pt", DIGEST: weights}).header  # the same bytes for the same content
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_bytes(header + b"".join(tensor.numpy().tobytes() for tensor in tensors.values()))
    part.replace(path)
    return path


def read(path: Path) -> tuple[dict[int, Keys], str]:
    """Keys of each layer, and the digest of the weights. Raises UsageError for a file that is not whole."""
    try:
        with safe_open(path, "pt") as file:
            weights = (file.metadata() or {}).get(DIGEST, "")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        layers = sorted({int(name.partition(".")[0]) for name in tensors})
        return {
            layer: Keys(tensors[f"{layer}.mean"], tensors[f"{layer}.scale"], tensors.get(f"{layer}.amax"))
            for layer in layers
        }, weights
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise UsageError(f"{path}: cannot be read ({error}); remove it, and keys are measured at load") from None


def load(folder: str | Path) -> dict[int, Keys] | None:
    """What was measured on the weights of a checkpoint; None where nothing was, or on others, with a warning then."""
    keys, fits = beside(folder)
    if not fits:
        warnings.warn(
            f"{Path(folder) / KEY_STATISTICS}: was measured on other weights than these; keys are measured again "
            "(quantlab.cache.save_keys keeps what is found)",
            StaleKeysWarning,
            stacklevel=3,
        )
    return keys


def beside(folder: str | Path) -> tuple[dict[int, Keys] | None, bool]:
    """What was measured on the weights of a checkpoint, and False where what lies there is of others."""
    path = Path(folder) / KEY_STATISTICS
    if not path.is_file():
        return None, True
    keys, weights = read(path)
    fits = weights == digest(folder)
    return (keys if fits else None), fits


def digest(folder: str | Path) -> str:
    """A name for the weights of a checkpoint and the places of its tokens: changes with nearly every change of either.

    Names, dtypes and shapes of all tensors but routed experts', `SAMPLE` bytes of each, and the rotary embedding.
    "" where the folder holds no safetensors that can be read.
    """
    try:
        source = Source.open(folder)
    except (PreflightError, UsageError):
        return ""
    found = hashlib.sha256(json.dumps(_places(source.config), sort_keys=True).encode())
    try:
        for name, info in sorted(source.tensors.items()):
            if kinds.experts_of(module_of(name)) is None:
                found.update(f"{name} {info.dtype} {info.shape} ".encode())
                found.update(_sample(source, info))
    finally:
        source.reader.close()
    return found.hexdigest()


def _places(config: dict[str, Any]) -> dict[str, Any]:
    text = kinds.text_config(config)
    return {key: value for key, value in text.items() if re.search(r"^rope|rotary|^max_position_embeddings$", key)}


def _sample(source: Source, info: TensorInfo) -> bytes:
    """Bytes in the middle of a tensor."""
    buffer = torch.empty(min(info.nbytes, SAMPLE), dtype=torch.uint8)
    source.reader.read_into(info.shard, info.begin + (info.nbytes - len(buffer)) // 2, buffer)
    return buffer.numpy().tobytes()


def keep(out: Output, keys: dict[int, Keys]) -> None:
    """Put the file beside the checkpoint that a run has written, for the weights that are there."""
    path = write(out.kept / "beside.safetensors", keys, digest(out.partial))
    out.copy_file(path, KEY_STATISTICS)


def engine_scales(model: Any, keys: dict[int, Keys], modules: Sequence[tuple[str, str]]) -> tuple[Replace, ...]:
    """Scales of keys and values for each layer of a checkpoint, as engines and compressed-tensors read them: one number
    each, absmax / 448, rounded up to bfloat16.

    model    of transformers, its parameters may be on the meta device
    modules  of the checkpoint's tensors: path in the model, path in the checkpoint

    Empty where a layer has no attention module of the kind that compressed-tensors knows: it would start others from
    random numbers, and find these surplus.
    """
    paths = {}
    for path, module in model.named_modules():
        layer = getattr(module, "layer_idx", None)
        if layer in keys and "Attention" in type(module).__name__ and _has_projections(module):
            paths[layer] = counterpart(path, modules)
    if not keys or paths.keys() != keys.keys() or None in paths.values():
        return ()
    found = []
    for layer, path in paths.items():
        amax = keys[layer].amax
        if amax is None:
            return ()
        for suffix, value in zip(KV_SCALES, amax, strict=True):
            scale = _rounded_up(torch.where(value > 0, value / E4M3.max, 1.0).reshape(1))
            found.append(Replace(TensorInfo(f"{path}{suffix}", "BF16", (1,), Path(), 0, 2), scale))
    return tuple(found)


def _has_projections(module: Any) -> bool:
    return any(hasattr(module, name) for name in ("k_proj", "v_proj", "qkv_proj"))


def _rounded_up(value: Tensor) -> Tensor:
    """The smallest bfloat16 that is not less than a positive float32."""
    nearest = value.bfloat16()
    return torch.where(nearest.float() < value, (nearest.view(torch.int16) + 1).view(torch.bfloat16), nearest)


def problems(source: Source) -> Iterator[str]:
    """What is wrong with the file that lies beside a checkpoint."""
    try:
        keys, weights = read(source.folder / KEY_STATISTICS)
    except UsageError as error:
        yield str(error)
        return
    if weights != digest(source.folder):
        yield f"{KEY_STATISTICS}: was measured on other weights; loading measures again"
    rows = _rows_of_keys(source)
    for layer in sorted(rows.keys() - keys.keys()):
        yield f"{KEY_STATISTICS}: layer {layer} is missing"
    for layer, (mean, scale, amax) in keys.items():
        layers = kinds.Model.of(source.config).layers
        if layers is not None and layer >= layers:
            yield f"{KEY_STATISTICS}: has layer {layer}, the model has {layers}"
        wanted = _heads_and_channels(source.config)
        if wanted and rows.get(layer, prod(wanted)) != prod(wanted):
            wanted = None  # a layer with heads of its own
        if mean.shape != scale.shape or mean.ndim != 3 or (wanted and mean.shape[1:] != wanted):
            shapes = f"{list(mean.shape)} and {list(scale.shape)}"
            yield f"{KEY_STATISTICS}: layer {layer} has {shapes}, needs {_said(wanted)}"
        elif mean.numel() != rows.get(layer, mean.numel()):
            yield f"{KEY_STATISTICS}: layer {layer} has {mean.numel()} channels, its keys have {rows[layer]}"
        if not bool(mean.isfinite().all()) or not bool((scale.isfinite() & (scale > 0)).all()):
            yield f"{KEY_STATISTICS}: layer {layer} has numbers that are not finite, or scales that are not positive"
        if amax is not None and (amax.shape != (2,) or not bool((amax.isfinite() & (amax >= 0)).all())):
            yield f"{KEY_STATISTICS}: layer {layer} has no two largest magnitudes, finite and 0 or more"


def _said(shape: tuple[int, int] | None) -> str:
    return "two of one shape [1, heads, channels]" if shape is None else f"two of [1, {shape[0]}, {shape[1]}]"


def _heads_and_channels(config: dict[str, Any]) -> tuple[int, int] | None:
    text = kinds.text_config(config)
    queries, hidden = (kinds.positive(text.get(key)) for key in ("num_attention_heads", "hidden_size"))
    heads = kinds.positive(text.get("num_key_value_heads")) or queries
    channels = kinds.positive(text.get("head_dim")) or (hidden // queries if hidden and queries else None)
    return (heads, channels) if heads and channels else None


def _rows_of_keys(source: Source) -> dict[int, int]:
    """Layer -> rows of its projection to keys, where there is one by the usual name."""
    model = kinds.Model.of(source.config)
    found = {}
    for name, info in source.tensors.items():
        layer = re.search(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.(?:\w+\.)*k_proj\.weight(?:_packed)?$", name)
        if layer and not kinds.in_tower(name, model) and not kinds.is_mtp(name, model):
            found[int(layer[1])] = info.shape[0]
    return found
