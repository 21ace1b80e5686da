"""Weights rounded for the layer's output instead of for themselves.

The error of a layer's output is ``sum_t |(W - Q) x_t|^2 = sum_n d_n H d_n^T`` with d_n a row of ``W - Q`` and H the
second moments of the inputs. Two things are free: the scales, and for each weight which of the codes around it to take.

`search_scales` takes the scales: for each block the candidate with the smallest error, H cut down to its diagonal.
`Feedback.round` takes the codes: one input channel after the other is rounded to nearest, and the error just made is
taken off the channels that are yet to come, as far as their inputs move with this one's (GPTQ, arXiv 2210.17323,
section 3; there for the full H, here within groups of 128 channels, so that all groups go in parallel and the matrices
stay as small as 128 x 128). The stored format knows nothing of it: only codes differ.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from quantlab_calib import rounding
from quantlab_calib.observers import GROUP
from quantlab_kernels.formats import INT4
from quantlab_kernels.qtensor import QuantizedTensor, TensorSpec, block_reduce, expand_blocks, quantize, scale_of

DAMPING = 0.3  # of the mean energy, added to each channel's: of 0.01, 0.1, 0.3, 1 the best on a real model (README)
STEP = 32  # channels rounded before their errors are passed on to the rest of the group in one product


@dataclass(frozen=True)
class Feedback:
    """What rounding needs to know of a layer's inputs.

    pass_on  [groups, 128, 128] float32, upper triangular with diagonal 1: row j says how much of channel j's error each
             later channel takes over
    energy   [groups * 128] float32, weight of each channel's error
    """

    pass_on: Tensor
    energy: Tensor

    @classmethod
    def of(cls, moments: Tensor) -> Feedback:
        """From second moments [groups, 128, 128]. Channels that never moved take over nothing."""
        moments = moments.to(torch.float64)
        energy = moments.diagonal(dim1=1, dim2=2)
        mean = energy.mean(dim=1)
        ridge = torch.where(mean > 0, DAMPING * mean, torch.ones_like(mean))
        identity = torch.eye(GROUP, dtype=torch.float64, device=moments.device)
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(moments + ridge[:, None, None] * identity))
        upper = torch.linalg.cholesky(inverse, upper=True)
        pass_on = upper / upper.diagonal(dim1=1, dim2=2)[:, :, None]
        return cls(pass_on.to(torch.float32).contiguous(), energy.flatten().to(torch.float32))

    def to(self, device: torch.device) -> Feedback:
        return Feedback(self.pass_on.to(device), self.energy.to(device))

    def quantize(self, weight: Tensor, spec: TensorSpec) -> QuantizedTensor:
        """Quantize a weight [N, K], or a band of its rows that begins and ends with blocks."""
        weight, energy = weight.to(torch.float32), self.energy[: weight.shape[1]]
        int4 = spec.format is INT4 and weight.shape[1] % GROUP == 0
        scale = rounding.search_scales(weight, importance=energy) if int4 else search_scales(weight, spec, energy)
        return QuantizedTensor(self.round(weight, spec, scale), scale, spec)

    def round(self, weight: Tensor, spec: TensorSpec, scale: Tensor) -> Tensor:
        """Codes of a weight [N, K] for given scales (`spec.scale_shape`)."""
        columns = weight.shape[1]
        step = expand_blocks(scale, spec.block, weight.shape).expand_as(weight)
        w, s = _by_group(weight, 0.0), _by_group(step, 1.0)
        codes, _ = round_columns(w, s, self.pass_on, lambda x: _nearest(x, spec))
        codes = codes.to(spec.format.dtype)
        return codes.flatten(0, 1).T[:, :columns].contiguous()


def round_columns(
    w: Tensor, step: Tensor, pass_on: Tensor, nearest: Callable[[Tensor], Tensor], old: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Round the channels of weights w [B, C, N] one after the other, each passing its error on to the later ones.

    w        float32, is used up
    step     scale of each weight, like w
    pass_on  [B, C, C]; of it the part above the diagonal
    nearest  values in units of the step -> the code next to them, as float32
    old      what errors are taken against, like w; None: what a channel is when its turn comes

    Returns the codes and the errors that rounding made, float32, like w.
    """
    codes, errors = torch.empty_like(w), torch.empty_like(w)
    for begin in range(0, w.shape[1], STEP):
        end = min(begin + STEP, w.shape[1])
        for j in range(begin, end):
            codes[:, j] = nearest(w[:, j] / step[:, j])
            errors[:, j] = (w if old is None else old)[:, j] - codes[:, j] * step[:, j]
            w[:, j + 1 : end] -= pass_on[:, j, j + 1 : end, None] * errors[:, j, None]
        w[:, end:] -= pass_on[:, begin:end, end:].mT @ errors[:, begin:end]
    return codes, errors


def _nearest(x: Tensor, spec: TensorSpec) -> Tensor:
    """The codes next to values in units of the step; symmetric, so without INT4's -8."""
    return spec.format.decode(spec.format.cast(x.clamp(-spec.format.max, spec.format.max)))


def _by_group(weight: Tensor, fill: float) -> Tensor:
    """[N, K] -> [groups, 128, N], a short last group filled up."""
    padded = torch.nn.functional.pad(weight, (0, -weight.shape[1] % GROUP), value=fill)
    return padded.T.reshape(-1, GROUP, weight.shape[0]).clone()


def candidates(spec: TensorSpec) -> tuple[float, ...]:
    """Factors on the scale that just fits the largest weight.

    Powers of two: half (clips), the same, twice (a binade less for the smallest). Else eighths of an octave: the
    relative step of a float format is the same everywhere, so what changes is where in their binades the weights lie.
    """
    if spec.scale == "power2":
        return (1.0, 0.5, 2.0)
    return tuple(2 ** (i / 8) for i in range(-1, 8)) if spec.format.is_float else tuple(1 - i / 20 for i in range(8))


def search_scales(weight: Tensor, spec: TensorSpec, energy: Tensor) -> Tensor:
    """Scale of each block of a weight [N, K] with the smallest ``sum (W - Q)^2 energy``; energy [K], float32.

    Of equals the first candidate, so that blocks without energy keep the scale that fits.
    """
    base = scale_of(block_reduce(weight.abs(), spec.block, "amax"), spec)
    best, least = base, torch.full_like(base, torch.inf)
    for factor in candidates(spec):
        scale = base * factor
        error = (quantize(weight, spec, scale).dequantize() - weight).square() * energy
        error = block_reduce(error, spec.block, "sum")
        best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
    return best
