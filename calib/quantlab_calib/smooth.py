"""Scales that move from weights into activations and back: s per channel, divided out of what produces an input of a
layer and multiplied into the columns of the layer. The model stays the same, what rounding loses does not.

Candidates for s are ``activation^a / weight^b``, both the mean magnitude of each channel: a alone is AWQ's (arXiv
2306.00978, section 3.2), b alone evens the columns out and needs no data (FireQ's channel-wise scaling, 2505.20839). Of
the grid the pair is taken whose output, as it will be deployed, is nearest to the original's. A common constant, which
FireQ sets by hand, changes nothing here: the scales of groups and tokens are relative.

Where s can be folded is found by experiment, not by names. Which layers read a norm is seen from the values that they
get. Of a linear layer some output rows are doubled: if exactly some input channels of a later layer double, the path
between them is linear, channel by channel, and binary patterns of doubled rows tell which row belongs to which channel,
through repeated heads too. Every fold is then tried with random powers of two, under which the output of the block must
stay what it was: a reader that was missed, or a path that is not linear, refuses the fold.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from quantlab_calib.capture import LinearCalls, alike, linear_weights
from quantlab_calib.rounding import decode_int4, round_int4

EXPONENTS = tuple((a / 4, b / 4) for a in range(5) for b in (0, 2, 4))
TINY = 1e-12
WIDEST = 64.0  # factor between a scale and the mean of its fold
TOLERANCE = 2**-5  # of what half a fold changes: what an exact one may leave, rounding in 16 bits inside the block


@dataclass(frozen=True)
class Fold:
    """A place to fold scales into, and the layers that undo them.

    producer   path of the norm or linear layer
    consumers  names of the weights that read it
    channels   int64 [K], the producer's channel behind each input channel of the consumers
    offset     what a norm adds to its weight before it multiplies: 0 or 1
    """

    producer: str
    consumers: tuple[str, ...]
    channels: Tensor
    offset: float = 0.0


@dataclass
class Trace:
    """One run of a block on a few tokens: inputs [tokens, K] by name of the weight in the order of the calls, outputs
    of norms by path, and the output of the block."""

    inputs: dict[str, Tensor] = field(default_factory=dict)
    norms: dict[str, Tensor] = field(default_factory=dict)
    output: Tensor | None = None


def trace(block: nn.Module, path: str, run: Callable[[], Tensor]) -> Trace:
    """Run a block by `run` and see what enters its linear layers and leaves its norms."""
    seen = Trace()

    def remember(name: str, x: Tensor, *_: Tensor) -> None:
        seen.inputs.setdefault(name, x.detach().reshape(-1, x.shape[-1]))

    def hook(name: str) -> Callable[..., None]:
        def see(module: nn.Module, args: object, output: Tensor) -> None:
            seen.norms.setdefault(name, output.detach().reshape(-1, output.shape[-1]))

        return see

    hooks = [module.register_forward_hook(hook(name)) for name, module in norms_of(block, path).items()]
    try:
        with LinearCalls(linear_weights(block, path, routers=True), remember):
            seen.output = run().detach()
    finally:
        for handle in hooks:
            handle.remove()
    return seen


def norms_of(block: nn.Module, path: str) -> dict[str, nn.Module]:
    """Modules at and below one that are norms with a weight, by path."""
    return {
        name: module
        for name, module in block.named_modules(prefix=path)
        if "Norm" in type(module).__name__ and isinstance(getattr(module, "weight", None), nn.Parameter)
    }


@torch.no_grad()
def find_folds(block: nn.Module, path: str, run: Callable[[], Tensor]) -> tuple[list[Fold], list[str]]:
    """The folds of a block, and why there are not more.

    run  runs the block on a few tokens, always the same, and returns its output
    """
    before = trace(block, path, run)
    weights, modules = linear_weights(block, path, routers=True), dict(block.named_modules(prefix=path))
    found, notes = [], []
    for fold in [*_fromnorms_of(before, modules, weights), *_from_layers(block, path, run, before, weights, modules)]:
        if _exact(fold, block, path, run, before):
            found.append(fold)
        else:
            notes.append(f"{fold.producer}: scales do not fold into it without changing the block")
    return found, notes


def _fromnorms_of(seen: Trace, modules: dict[str, nn.Module], weights: dict[str, Tensor]) -> list[Fold]:
    folds = []
    for path, output in seen.norms.items():
        weight = modules[path].get_parameter("weight")
        rows = {row.numpy().tobytes() for row in output.float().cpu()}
        kinds = {
            alike(name)
            for name, x in seen.inputs.items()
            if x.shape[1] == output.shape[1] and all(row.numpy().tobytes() in rows for row in x.float().cpu())
        }
        readers = tuple(name for name in weights if alike(name) in kinds)  # experts that saw nothing, too
        if readers and weight.shape == output.shape[1:]:
            folds.append(Fold(path, readers, torch.arange(output.shape[1]), norm_offset(modules[path], output)))
    return folds


def norm_offset(norm: nn.Module, output: Tensor) -> float:
    """Whether a norm multiplies by its weight or by 1 + weight: the latter's output is not zero for weights of zero."""
    weight = norm.get_parameter("weight")
    kept = weight.data.clone()
    weight.data.zero_()
    zero = norm(output)
    weight.data.copy_(kept)
    bias = getattr(norm, "bias", None)
    return 0.0 if bool((zero == (0 if bias is None else bias)).all()) else 1.0


def _from_layers(
    block: nn.Module,
    path: str,
    run: Callable[[], Tensor],
    before: Trace,
    weights: dict[str, Tensor],
    modules: dict[str, nn.Module],
) -> list[Fold]:
    """Folds into linear layers: `up` before `down`, `v` before `o`."""
    names = [name for name in before.inputs if name.endswith(".weight") and name.rpartition(".")[0] in modules]
    folds: list[Fold] = []
    for position, consumer in enumerate(names):
        for producer in names[:position]:
            layer = modules[producer.rpartition(".")[0]]
            everything = torch.ones(len(weights[producer]), dtype=torch.bool)
            if not bool((_doubled(layer, everything, block, path, run, before, consumer) == 1).all()):
                continue
            channels = torch.zeros(before.inputs[consumer].shape[1], dtype=torch.int64)
            rows = torch.arange(len(weights[producer]))
            for bit in range((len(rows) - 1).bit_length()):
                answer = _doubled(layer, (rows >> bit) % 2 == 1, block, path, run, before, consumer)
                channels += answer << bit if bool((answer >= 0).all()) else -(1 << 62)
            if bool((channels >= 0).all()) and int(channels.max()) < len(rows):
                folds.append(Fold(producer.rpartition(".")[0], (consumer,), channels))
                break
    return folds


def _doubled(
    layer: nn.Module,
    rows: Tensor,
    block: nn.Module,
    path: str,
    run: Callable[[], Tensor],
    before: Trace,
    consumer: str,
) -> Tensor:
    """Which input channels of a layer double with rows of another, int64 [K]: 1 yes, 0 no, -1 neither of the two."""
    kept = {name: parameter.data.clone() for name, parameter in layer.named_parameters()}
    for parameter in layer.parameters():
        parameter.data[rows.to(parameter.device)] *= 2
    x, was = trace(block, path, run).inputs[consumer].cpu(), before.inputs[consumer].cpu()
    for name, parameter in layer.named_parameters():
        parameter.data.copy_(kept[name])
    if x.shape != was.shape:
        return torch.full((was.shape[1],), -1)
    same, double = (x == was).all(dim=0), (x == 2 * was).all(dim=0)
    return torch.where(double, 1, torch.where(same, 0, -1))


def _exact(fold: Fold, block: nn.Module, path: str, run: Callable[[], Tensor], before: Trace) -> bool:
    """Whether the block's output survives the fold of random powers of two: what is left of the change that half of the
    fold makes, which a residual stream may hide, is rounding."""
    generator = torch.Generator().manual_seed(0)
    powers = 2.0 ** torch.randint(-1, 2, (int(fold.channels.max()) + 1,), generator=generator)
    kept = {name: parameter.data.clone() for name, parameter in block.named_parameters()}
    outputs = []
    for tried in (fold, replace(fold, consumers=())):
        apply(tried, powers, block, path)
        outputs.append(run().double())
        for name, parameter in block.named_parameters():
            parameter.data.copy_(kept[name])
    assert before.output is not None
    if outputs[0].shape != before.output.shape:
        return False
    whole, half = ((output - before.output.double()).square().mean() for output in outputs)
    rounding = roundoff(before.output) ** 2 * before.output.double().square().mean()
    return bool(whole <= TOLERANCE**2 * half + rounding)


def roundoff(x: Tensor) -> float:
    """Relative error that computing in the dtype of x leaves; norms compute in float32 whatever they are given."""
    return max(torch.finfo(x.dtype).eps, torch.finfo(torch.float32).eps)


@torch.no_grad()
def apply(fold: Fold, scale: Tensor, block: nn.Module, path: str, stored: torch.dtype | None = None) -> None:
    """Divide `scale` [producer's channels] out of the producer and multiply it into the consumers, in place.

    A norm's weight is rounded first, to the dtype it is `stored` in, and its consumers undo what it really became.
    """
    layer = dict(block.named_modules(prefix=path))[fold.producer]
    weight = layer.get_parameter("weight")
    scale = scale.to(weight.device, torch.float32)
    bias = getattr(layer, "bias", None)
    if weight.ndim == 1:
        old = weight.data.float() + fold.offset
        new = (old / scale - fold.offset).to(stored or weight.dtype).to(weight.dtype)
        really = new.float() + fold.offset
        usable = (old != 0) & (really != 0)
        weight.data.copy_(torch.where(usable, new, weight.data))
        scale = torch.where(usable, old / really, torch.ones_like(scale))
    else:
        weight.data.copy_(weight.data.float() / scale[:, None])
    if bias is not None:
        bias.data.copy_(bias.data.float() / scale)
    columns = scale[fold.channels.to(scale.device)]
    weights = linear_weights(block, path, routers=True)
    for name in fold.consumers:
        weights[name].data.copy_(weights[name].data.float() * columns)


def search(
    fold: Fold,
    readers: list[str],
    weights: dict[str, Tensor],
    samples: dict[str, Tensor],
    quantized: Callable[[Tensor], Tensor],
    exponents: tuple[tuple[float, float], ...],
) -> tuple[Tensor, tuple[float, float]]:
    """Scales [producer's channels] and their exponents (a, b).

    readers    the consumers that count: quantized, and with a sample of their inputs
    samples    [tokens, K] of the inputs of each
    quantized  quantizes activations as the deployed layer does
    """
    unit = {name: torch.nn.functional.normalize(samples[name].float(), dim=1) for name in readers}
    channels = fold.channels.to(unit[readers[0]].device)
    activation = _per_channel(sum(x.abs().sum(dim=0) for x in unit.values()), channels)  # type: ignore[arg-type]
    weight = _per_channel(sum(weights[name].float().abs().sum(dim=0) for name in readers), channels)  # type: ignore[arg-type]
    best, least = (torch.ones_like(activation), (0.0, 0.0)), torch.inf
    for a, b in exponents:
        scale = activation.clamp_min(TINY).log() * a - weight.clamp_min(TINY).log() * b
        scale = (scale - scale.mean()).clamp(-math.log(WIDEST), math.log(WIDEST)).exp()
        columns = scale[channels]
        error = 0.0
        for name, x in unit.items():
            scaled = quantized(x / columns)
            codes, steps = round_int4(weights[name].float() * columns, importance=scaled.square().mean(dim=0))
            exact = x @ weights[name].float().T
            error += float((exact - scaled @ decode_int4(codes, steps).T).square().sum())
        if error < least:
            best, least = (scale, (a, b)), error
    return best


def _per_channel(values: Tensor, channels: Tensor) -> Tensor:
    """Mean of `values` [K] over the input channels that come from one of the producer's."""
    size = int(channels.max()) + 1
    total = torch.zeros(size, device=values.device).index_add_(0, channels, values)
    count = torch.zeros_like(total).index_add_(0, channels, torch.ones_like(values))
    return total / count.clamp_min(1)
