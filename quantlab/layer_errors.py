"""How far the layers of a quantized checkpoint are from those of the original: their weights, what they put out, and
the outliers in what they read.

Errors are signal-to-quantization-noise ratios in decibels, ``10 log10(sum original^2 / sum difference^2)``: 20 dB more
is a tenth of the error. Weights are streamed in bands of rows; data run through the original block by block.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from quantlab import fused_experts
from quantlab.architecture import load_targets
from quantlab.checkpoint import WEIGHT, Stored
from quantlab.errors import PreflightError, UsageError
from quantlab.kinds import common_name, context_length, position
from quantlab.kv_errors import CacheErrors
from quantlab.lazy import LazyModel
from quantlab.loaders import View
from quantlab.shards import TensorInfo
from quantlab.source import Source
from quantlab.summary import Progress
from quantlab_calib import data
from quantlab_calib.capture import Captured, CaptureError, capture, find_blocks
from quantlab_calib.observers import ChannelStatistics, InputObserver, Ratio
from quantlab_kernels.formats import INT4
from quantlab_kernels.packing import unpack_int4
from quantlab_kernels.qtensor import QuantizedTensor, quantize

BAND_ELEMENTS = 1 << 24  # of a weight at a time: 64 MB in float32
BATCH_TOKENS = 2048
TOP_CHANNELS = 16


@dataclass(frozen=True)
class Pair:
    """A quantized checkpoint beside the model that it was made from. Raises UsageError where they do not belong."""

    quantized: Source
    original: Source

    @cached_property
    def stored(self) -> Stored:
        stored = self.quantized.stored
        if stored is None:
            raise UsageError(f"{self.quantized.model}: is not quantized; a report shows what quantization did")
        return stored

    @cached_property
    def weights(self) -> dict[str, tuple[TensorInfo, TensorInfo, TensorInfo]]:
        """module -> (codes, scale, original weight) of every quantized layer."""
        if self.original.stored is not None:
            how = "give the original model, or write it back with `quantlab convert --to bf16`"
            raise UsageError(f"{self.original.model}: the baseline is itself quantized; {how}")
        view = View(self.quantized, self.stored)
        fused = [info for info in self.original.tensors.values() if len(info.shape) == 3]
        originals = {m: part for info in fused for m, part in fused_experts.matrices(info, self.original.tensors)}
        originals |= {info.name: fused_experts.flat(info) for info in fused}
        originals |= {n.removesuffix(WEIGHT): t for n, t in self.original.tensors.items() if n.endswith(WEIGHT)}
        found = {}
        for module, codes in view.quantized.items():
            original = originals.get(module)
            if original is None or original.shape != codes.shape:
                has = f"{list(original.shape)} there" if original else "not there"
                raise UsageError(
                    f"{self.original.model}: {module} {list(codes.shape)} is {has}; "
                    f"give the model that {self.quantized.model} was made from"
                )
            found[module] = (codes, view.scales[module], original)
        return found

    def dequantized(self, module: str, rows: tuple[int, int] | None = None) -> Tensor:
        """The quantized weight [N, K] or a band of its rows, which starts at a whole block, in float32."""
        info, scale, _ = self.weights[module]
        spec = self.stored.kind(module).weight
        step = spec.block[0]
        scale_rows = None if rows is None or step == -1 else (rows[0] // step, -(-rows[1] // step))
        stored = fused_experts.flat(self.quantized.tensors[info.name])  # packed: `info` has the shape they stand for
        codes = self.quantized.reader.read(stored, rows)
        if spec.format is INT4:
            codes = unpack_int4(codes, 8 * codes.shape[1])
        scales = self.quantized.reader.read(scale, scale_rows).to(torch.float32)
        shape = spec.scale_shape(tuple(codes.shape))
        return QuantizedTensor(codes, scales.view(shape), spec).dequantize()


def weight_errors(pair: Pair, progress: Progress | None = None) -> dict[str, float | None]:
    """SQNR of the weight of every quantized layer, in dB."""
    found = {}
    for number, (module, (info, _, original)) in enumerate(pair.weights.items(), start=1):
        ratio = Ratio()
        count, width = info.shape
        step = max(1, BAND_ELEMENTS // (width * 128)) * 128
        for begin in range(0, count, step):
            rows = (begin, min(begin + step, count))
            before = pair.original.reader.read(original, rows).to(torch.float32)
            ratio.add(before, pair.dequantized(module, rows) - before)
        found[module] = ratio.decibels
        if progress is not None:
            progress("weights beside the original's", number, len(pair.weights))
    return found


@dataclass
class Observed:
    """What data showed of the layers.

    tokens    that ran through the model
    output    module -> SQNR of the layer's output, in dB, its input quantized as the scheme does
    outliers  of every input of linear layers, the worst first: the layers that read it, its largest channels
    cache     what a quantized KV cache would lose in each layer, and keys: the extent of their channels (`kv_errors`)
    notes     what could not be seen
    """

    tokens: int
    output: dict[str, float | None] = field(default_factory=dict)
    outliers: list[dict[str, Any]] = field(default_factory=list)
    cache: list[dict[str, Any]] = field(default_factory=list)
    keys: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def observe(
    pair: Pair,
    calibration: str,
    *,
    samples: int = 8,
    length: int = 256,
    progress: Progress | None = None,
    trust_remote_code: bool = False,
) -> Observed:
    """Run text through the original on the CPU, in float32, each quantized layer computed both ways on the same input.

    So an output error is that of the layer alone, not what the layers before it add. Raises UsageError for data that
    do not serve and PreflightError for a model that does not run on text.
    """
    lazy = LazyModel(pair.original, torch.device("cpu"), torch.float32, trust_remote_code=trust_remote_code)
    if getattr(lazy.model, "main_input_name", "input_ids") != "input_ids":
        raise UsageError(f"{pair.original.model}: takes {lazy.model.main_input_name}, no text; leave out --calib")
    length = min(length, context_length(pair.original.config) or length)
    try:
        tokenizer = data.load_tokenizer(pair.original.folder, trust_remote_code=trust_remote_code)
        tokens = data.windows(calibration, tokenizer, "calibration", count=samples, length=length, seed=0, fewest=1)
    except data.DataError as error:
        raise UsageError(str(error)) from None
    batches = list(tokens.split(max(1, BATCH_TOKENS // length)))
    blocks = find_blocks(lazy.model)
    total = len(lazy.model.get_submodule(blocks)) if blocks else 1
    found = Observed(tokens.numel())
    outputs, cache = _Outputs(pair, lazy.model), CacheErrors(lazy.model)
    try:
        for number, block in enumerate(capture(lazy.model, batches, lazy, device=lazy.device, blocks=blocks), start=1):
            outputs.weights.clear()
            found.outliers += _outliers(block)
            if progress is not None:
                progress("data through the original", number, total)
    except CaptureError as error:
        raise PreflightError(f"{pair.original.model}: does not run on text, leave out --calib: {error}") from None
    finally:
        outputs.remove()
        cache.remove()
    found.cache, found.keys = cache.rows(), cache.keys()
    found.output = {module: ratio.decibels for module, ratio in outputs.ratios.items()}
    found.outliers.sort(key=lambda layer: -layer["ratio"])
    if unseen := len(pair.weights) - len(found.output):
        found.notes.append(f"{unseen} layers without output error: experts, and layers that saw no token")
    return found


class _Outputs:
    """Hooks on the linear layers of the original that compute them once more, as the quantized model would."""

    def __init__(self, pair: Pair, model: Any) -> None:
        self.pair = pair
        self.ratios: dict[str, Ratio] = {}
        self.weights: dict[str, Tensor] = {}  # dequantized, of the block that is running
        modules = dict(model.named_modules())
        targets = load_targets(model, [module + WEIGHT for module in pair.weights])
        homes = {module: targets[module + WEIGHT] for module in pair.weights if module + WEIGHT in targets}
        self.hooks = [
            modules[path].register_forward_hook(self._hook(module))
            for module, target in homes.items()
            if isinstance(modules.get(path := target.parameter.removesuffix(WEIGHT)), nn.Linear)
            and not (target.rearranged or target.patterns)
        ]

    def _hook(self, module: str) -> Callable[..., None]:
        spec = self.pair.stored.kind(module).input

        def compare(layer: nn.Linear, args: tuple[Tensor, ...], output: Tensor) -> None:
            x = args[0].reshape(-1, args[0].shape[-1])
            if not len(x):
                return
            if module not in self.weights:
                self.weights[module] = self.pair.dequantized(module)
            exact = output.reshape(-1, output.shape[-1]) - (0 if layer.bias is None else layer.bias)
            seen = x if spec is None else quantize(x, spec).dequantize()
            self.ratios.setdefault(module, Ratio()).add(exact, seen @ self.weights[module].T - exact)

        return compare

    def remove(self) -> None:
        for hook in self.hooks:
            hook.remove()


def _outliers(block: Captured) -> list[dict[str, Any]]:
    """The inputs of one block: layers that read one tensor are one entry."""
    readers: dict[int, tuple[InputObserver, list[str]]] = {}
    for name, observer in block.inputs.items():
        readers.setdefault(id(observer), (observer, []))[1].append(name.removesuffix(WEIGHT))
    found = []
    for observer, names in readers.values():
        amax = ChannelStatistics.of(observer).amax
        largest = amax.topk(min(TOP_CHANNELS, amax.numel()))
        median = float(amax.median())
        found.append(
            {
                "module": names[0],
                "input": position(common_name(names))[1],
                "absmax": float(largest.values[0]),
                "median": median,
                "ratio": float(largest.values[0]) / max(median, torch.finfo(torch.float32).tiny),
                "tokens": observer.tokens,
                "largest": dict(zip(largest.indices.tolist(), largest.values.tolist(), strict=True)),
                "channels": amax.tolist(),
            }
        )
    return found
