"""INT4 codes that minimise the error of a layer's output: GPTQ over the whole matrix of second moments.

The output error of a layer is ``tr((W - Q) H (W - Q)^T)``, H [K, K] the second moments of its inputs. One input channel
after the other is rounded, and the error just made is taken off the channels that are yet to come, as far as their
inputs move with this one's (GPTQ, arXiv 2210.17323, section 3, with the Cholesky factor of its section 3.3). Scales are
chosen before (static groups), so the order of the channels is an order of processing only: nothing of it is stored.

Where the inputs of the original model are known too, the aim is not the layer's own output on the inputs that it gets,
but the original's: the weight is first moved to the least-squares solution ``W' = W E[x x'^T] H^-1``, x the original's
inputs and x' ours (the asymmetric calibration of GPTAQ, arXiv 2504.02692, in closed form).

Matrices come in batches: the experts of a block are rounded in one go.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantlab_calib.rounding import CODE_MAX, GROUP, search_scales
from quantlab_calib.search import round_columns

DAMPINGS = (1.0, 10.0, 100.0)  # times the wanted one, tried until the matrix can be factored


class SingularError(ArithmeticError):
    """A matrix of second moments that cannot be factored, or is not finite."""


@dataclass(frozen=True)
class Gptq:
    """How codes are chosen.

    damping    of the mean energy, added to each channel's: what few tokens tell is not taken at its word
    act_order  process channels with large energy first
    sweeps     afterwards every channel is visited again so often, and takes the best code given all others
    """

    damping: float = 0.3
    act_order: bool = True
    sweeps: int = 2

    def prepare(self, moments: Tensor, cross: Tensor | None = None) -> Rounder:
        """What rounds weights whose inputs have these statistics.

        moments  float32 [B, K, K], of the inputs that the quantized layer gets
        cross    float32 [B, K, K], sum of (x - x') x'^T, x the inputs of the original layer; None: they are the same
        Raises SingularError.
        """
        moments = moments.clone()
        ridge = self._damp(moments)
        energy = moments.diagonal(dim1=1, dim2=2) - ridge[:, None]
        shift = None if cross is None else _shift(moments, cross)
        order = None
        if self.act_order:
            order = energy.argsort(dim=1, descending=True, stable=True)[:, :, None]
            moments = moments.gather(1, order.expand_as(moments)).gather(2, order.mT.expand_as(moments))
        return Rounder(energy, shift, order, _factor(moments), moments if self.sweeps else None, self.sweeps)

    def _damp(self, moments: Tensor) -> Tensor:
        """Add the ridge in place and return it [B]; channels that never moved become independent of all others."""
        diagonal = moments.diagonal(dim1=1, dim2=2)
        if not bool(diagonal.isfinite().all()):
            raise SingularError("its inputs are not finite")
        mean = diagonal.mean(dim=1)
        ridge = torch.where(mean > 0, self.damping * mean, torch.ones_like(mean))
        diagonal += ridge[:, None]
        return ridge


@dataclass(frozen=True)
class Rounder:
    """Rounds weights [B, N, K], any number of rows at a time; made by `Gptq.prepare`.

    energy   [B, K], of each channel
    shift    [B, K, K] or None, see `_shift`
    order    [B, K, 1], channels in the order of processing, or None
    pass_on  [B, K, K], see `_factor`; like `moments` in that order
    moments  [B, K, K] or None, damped; for the sweeps
    """

    energy: Tensor
    shift: Tensor | None
    order: Tensor | None
    pass_on: Tensor
    moments: Tensor | None
    sweeps: int

    def round(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Codes int8 [B, N, K] and scales float32 [B, N, K / 128]."""
        weight = weight.to(torch.float32)
        if self.shift is not None:
            weight = torch.baddbmm(weight, weight, self.shift)
        scale = torch.stack([search_scales(w, importance=e) for w, e in zip(weight, self.energy, strict=True)])
        w = weight.mT  # channels are rows from here on
        step = scale.mT.repeat_interleave(w.shape[1] // scale.shape[2], dim=1)
        if self.order is not None:
            w, step = (t.gather(1, self.order.expand_as(t)) for t in (w, step))
        codes = _feedback(w.clone(), step, self.pass_on)
        for _ in range(self.sweeps):
            assert self.moments is not None
            codes = _sweep(w, step, self.moments, codes)
        if self.order is not None:
            codes = torch.empty_like(codes).scatter_(1, self.order.expand_as(codes), codes)
        return codes.mT.to(torch.int8).contiguous(), scale


def _factor(moments: Tensor) -> Tensor:
    """Upper triangular R [B, K, K] with H^-1 = R^T R, rows divided by their diagonal: row j says how much of channel
    j's error each later channel takes over.

    R is the inverse of the U in H = U U^T, which is the ordinary Cholesky factor with rows and columns reversed: one
    factorization and one triangular inverse, where the usual way inverts H and factors twice.
    """
    flipped = moments.flip(1, 2)
    lower, info = torch.linalg.cholesky_ex(flipped)
    for times in DAMPINGS[1:]:
        if not bool(info.any()):
            break
        diagonal = flipped.diagonal(dim1=1, dim2=2)
        diagonal += times * 0.01 * diagonal.mean(dim=1, keepdim=True)
        lower, info = torch.linalg.cholesky_ex(flipped)
    if bool(info.any()):
        raise SingularError("its second moments cannot be factored")
    del flipped
    identity = torch.eye(lower.shape[1], dtype=lower.dtype, device=lower.device).expand_as(lower)
    inverse = torch.linalg.solve_triangular(lower, identity, upper=False).flip(1, 2)
    return inverse / inverse.diagonal(dim1=1, dim2=2)[:, :, None]


def _shift(damped: Tensor, cross: Tensor) -> Tensor | None:
    """C H^-1 [B, K, K]: what times W moves W to the least-squares weight for the original's outputs."""
    lower, info = torch.linalg.cholesky_ex(damped)
    if bool(info.any()) or not bool(cross.isfinite().all()):
        return None
    return torch.cholesky_solve(cross.mT, lower).mT


def _feedback(w: Tensor, step: Tensor, pass_on: Tensor) -> Tensor:
    """Round channel after channel; w [B, K, N] is used up."""
    for begin in range(0, w.shape[1], GROUP):
        end = min(begin + GROUP, w.shape[1])
        block = w[:, begin:end]
        codes, errors = _columns(block, step[:, begin:end], pass_on[:, begin:end, begin:end])
        block.copy_(codes)
        if end < w.shape[1]:
            w[:, end:].baddbmm_(pass_on[:, begin:end, end:].mT, errors, alpha=-1)
    return w


def _sweep(w: Tensor, step: Tensor, moments: Tensor, codes: Tensor) -> Tensor:
    """Visit every channel once more: the best code for it, all others as they are, so the error can only fall."""
    codes = codes.clone()
    diagonal = moments.diagonal(dim1=1, dim2=2)[:, :, None]
    pull = moments @ (w - codes * step)  # half the gradient of the error
    for begin in range(0, w.shape[1], GROUP):
        end = min(begin + GROUP, w.shape[1])
        band = slice(begin, end)
        old = codes[:, band] * step[:, band]
        best = old + pull[:, band] / diagonal[:, band]
        pass_on = -(moments[:, band, band] / diagonal[:, band]).mT
        codes[:, band], change = _columns(best, step[:, band], pass_on, old)
        if end < w.shape[1]:
            pull[:, end:].baddbmm_(moments[:, end:, band], change)
    return codes


def _columns(w: Tensor, step: Tensor, pass_on: Tensor, old: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`round_columns` for INT4; w may be used up."""
    if w.is_cuda:
        from quantlab_calib import columns

        return columns.round_columns(w, step, pass_on, old)
    return round_columns(w, step, pass_on, _nearest, old)


def _nearest(x: Tensor) -> Tensor:
    return x.round().clamp_(-CODE_MAX, CODE_MAX)
