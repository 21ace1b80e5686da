"""What is remembered of the inputs of a layer while data streams through it: nothing that grows with the data.

An observer has `update(x)` and `amax()`, x [tokens, channels] of any floating dtype on any device. Sums are kept in
float64: the squares of the outlier channels that this is all about lie six orders of magnitude above the others.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from quantlab_kernels.qtensor import block_reduce

GROUP = 128  # channels that share one activation scale (DeepSeek-V3, section 3.3.2)


class ChannelObserver:
    """Absolute maximum and energy (sum of squares) of each channel, and the number of tokens."""

    def __init__(self) -> None:
        self.tokens = 0
        self._amax = self._energy = torch.zeros(0)

    def update(self, x: Tensor) -> None:
        if x.shape[0] == 0:
            return
        x = _wide(x)
        amax, energy = x.abs().amax(dim=0), x.square().sum(dim=0, dtype=torch.float64)
        self._amax = torch.maximum(self._amax, amax) if self.tokens else amax
        self._energy = self._energy + energy if self.tokens else energy
        self.tokens += x.shape[0]

    def amax(self) -> Tensor:
        return self._amax.to("cpu", torch.float32)

    def energy(self) -> Tensor:
        """Sum of squares of each channel, float64 [channels], on the CPU."""
        return self._energy.to("cpu", torch.float64)


class InputObserver(ChannelObserver):
    """Also the second moments of the channels within each group of 128, every token scaled to length one.

    Their diagonal weighs the channels of a weight, the rest says which channels move together, which is what rounding
    one weight after the other needs to know (`search`). The full [channels, channels] matrix would hold what couples
    the groups too, and need as many times the memory as there are groups. Tokens count alike because the next norm
    scales each of them: unscaled, the few tokens with massive activations decide alone, and rounding for them made a
    real model worse than plain rounding (the numbers are in the README).
    """

    def __init__(self) -> None:
        super().__init__()
        self._moments = torch.zeros(0)

    def update(self, x: Tensor) -> None:
        if x.shape[0] == 0:
            return
        unit = torch.nn.functional.normalize(_wide(x), dim=1)
        groups = torch.nn.functional.pad(unit, (0, -x.shape[1] % GROUP)).unflatten(1, (-1, GROUP)).transpose(0, 1)
        moments = (groups.transpose(1, 2) @ groups).to(torch.float64)
        self._moments = self._moments + moments if self.tokens else moments
        super().update(x)

    def moments(self) -> Tensor:
        """float64 [groups, 128, 128], on the device of the data; channels that a short last group lacks have zeros."""
        return self._moments


class MomentObserver:
    """Second moments of all channels of a quantized layer's inputs, every token scaled to length one (see above).

    moments  float32 [K, K] on the device of the data
    cross    float32 [K, K], sum of (original - x) x^T where the original layer's inputs were given
    """

    def __init__(self) -> None:
        self.tokens = 0
        self.moments: Tensor | None = None
        self.cross: Tensor | None = None

    def update(self, x: Tensor, original: Tensor | None = None) -> None:
        """Take in x [tokens, K], and what the original model has in its place."""
        if x.shape[0] == 0:
            return
        # products of bfloat16 in float32: rounding is noise far below that of the data, and much faster on a GPU
        dtype = torch.bfloat16 if x.is_cuda else torch.float32
        wide = _wide(x)
        length = wide.norm(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        unit = (wide / length).to(dtype)
        self.moments = _add_product(self.moments, unit, unit)
        if original is not None:
            self.cross = _add_product(self.cross, ((_wide(original) - wide) / length).to(dtype), unit)
        self.tokens += x.shape[0]


def _add_product(total: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """total + a^T b, float32."""
    if total is None:
        total = torch.zeros(a.shape[1], b.shape[1], device=a.device)
    return total.addmm_(a.T, b) if a.dtype == total.dtype else total.add_(torch.mm(a.T, b, out_dtype=torch.float32))


def _wide(x: Tensor) -> Tensor:
    return x.detach().to(torch.promote_types(x.dtype, torch.float32))


@dataclass(frozen=True)
class ChannelStatistics:
    """Of the inputs of one layer.

    amax    [channels] float32, largest absolute value
    energy  [channels] float64, sum of squares over the tokens
    tokens  how many there were
    """

    amax: Tensor
    energy: Tensor
    tokens: int

    @classmethod
    def of(cls, observer: ChannelObserver) -> ChannelStatistics:
        return cls(observer.amax(), observer.energy(), observer.tokens)

    def group_amax(self) -> Tensor:
        """[ceil(channels / 128)] float32, largest absolute value of each group of 128 channels."""
        return block_reduce(self.amax[None], (1, GROUP), "amax")[0]

    def outlier_ratio(self) -> float:
        """Largest absolute value over that of the median channel: how far a few channels stand above the rest."""
        return float(self.amax.amax() / self.amax.median().clamp_min(torch.finfo(torch.float32).tiny))


@dataclass
class Ratio:
    """Signal and noise, summed up as they come."""

    signal: float = 0.0
    noise: float = 0.0

    def add(self, original: Tensor, difference: Tensor) -> None:
        self.signal += float(original.square().sum(dtype=torch.float64))
        self.noise += float(difference.square().sum(dtype=torch.float64))

    @property
    def decibels(self) -> float | None:
        """None where nothing was lost, or there was nothing to lose."""
        return 10 * math.log10(self.signal / self.noise) if self.noise > 0 and self.signal > 0 else None
