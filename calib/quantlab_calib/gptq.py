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

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from quantlab_calib.rounding import CODE_MAX, GROUP, search_scales
from quantlab_calib.search import round_columns

RIDGES = (0.1, 1.0)  # of the mean energy, added one after the other until the matrix can be factored
DIRECTLY = 512  # channels of a triangular matrix that is inverted without halving it


class SingularError(ArithmeticError):
    """A matrix of second moments that cannot be factored, or is not finite."""


@dataclass(frozen=True)
class Gptq:
    """How codes are chosen.

    damping    of the mean energy, added to each channel's: what few tokens tell is not taken at its word
    act_order  process channels with large energy first
    sweeps     afterwards every channel is visited again so often, and takes the best code given all others
    aim        share of the way to the least-squares weight for the original's outputs; few tokens do not know it well
    """

    damping: float = 0.3
    act_order: bool = True
    sweeps: int = 2
    aim: float = 1.0

    def prepare(self, moments: Tensor, cross: Tensor | None = None) -> Rounder:
        """What rounds weights whose inputs have these statistics.

        moments  float32 [B, K, K], of the inputs that the quantized layer gets
        cross    float32 [B, K, K], sum of (x - x') x'^T, x the inputs of the original layer; None: they are the same
        Raises SingularError.
        """
        with _tensor_cores():
            return self._prepare(moments, cross)

    def _prepare(self, moments: Tensor, cross: Tensor | None) -> Rounder:
        energy = moments.diagonal(dim1=1, dim2=2).clone()
        if not bool(energy.isfinite().all()):
            raise SingularError("its inputs are not finite")
        if cross is not None and not bool(cross.sum().isfinite()):
            cross = None
        order = energy.argsort(dim=1, descending=True, stable=True)[:, :, None] if self.act_order else None
        damped = self._damped(moments, order)
        root = _inverse_root(damped.flip(1, 2))
        return Rounder(energy, cross, order, root, damped if self.sweeps else None, self)

    def _damped(self, moments: Tensor, order: Tensor | None) -> Tensor:
        """With the ridge, in the order of processing; channels that never moved become independent of all others."""
        if order is None:
            moments = moments.clone()
        else:
            moments = moments.gather(1, order.expand_as(moments)).gather(2, order.mT.expand_as(moments))
        diagonal = moments.diagonal(dim1=1, dim2=2)
        mean = diagonal.mean(dim=1, keepdim=True)
        diagonal += torch.where(mean > 0, self.damping * mean, torch.ones_like(mean))
        return moments


@dataclass(frozen=True)
class Rounder:
    """Rounds weights [B, N, K], any number of rows at a time; made by `Gptq.prepare`.

    energy   [B, K], of each channel
    cross    [B, K, K] or None, see `Gptq.prepare`
    order    [B, K, 1], channels in the order of processing, or None
    root     [B, K, K], see `_inverse_root`; in that order
    moments  [B, K, K] or None, damped, in that order; for the sweeps
    """

    energy: Tensor
    cross: Tensor | None
    order: Tensor | None
    root: Tensor
    moments: Tensor | None
    settings: Gptq

    def round(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Codes int8 [B, N, K] and scales float32 [B, N, K / 128]."""
        with _tensor_cores():
            return self._round(weight.to(torch.float32))

    def _round(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        if self.cross is not None:
            change = self._ordered(weight @ self.cross, dim=2) @ self.root.mT @ self.root
            weight = weight.add(self._placed(change, dim=2), alpha=self.settings.aim)
        scale = torch.stack([search_scales(w, importance=e) for w, e in zip(weight, self.energy, strict=True)])
        w = weight.mT  # channels are rows from here on
        step = scale.mT.repeat_interleave(w.shape[1] // scale.shape[2], dim=1)
        w, step = self._ordered(w, dim=1), self._ordered(step, dim=1)
        codes = _feedback(w.clone(), step, self.root)
        for _ in range(self.settings.sweeps):
            assert self.moments is not None
            codes = _sweep(w, step, self.moments, codes)
        return self._placed(codes, dim=1).mT.to(torch.int8).contiguous(), scale

    def _ordered(self, values: Tensor, dim: int) -> Tensor:
        """Channels, along `dim`, in the order of processing."""
        if self.order is None:
            return values
        order = self.order if dim == 1 else self.order.mT
        return values.gather(dim, order.expand_as(values))

    def _placed(self, values: Tensor, dim: int) -> Tensor:
        """Channels that are in the order of processing, each in its place: the inverse of `_ordered`."""
        if self.order is None:
            return values
        order = self.order if dim == 1 else self.order.mT
        return torch.empty_like(values).scatter_(dim, order.expand_as(values), values)


@contextlib.contextmanager
def _tensor_cores() -> Iterator[None]:
    """Products of float32 in TF32 on a GPU: their rounding is noise far below that of the data."""
    products = torch.backends.cuda.matmul
    before = products.fp32_precision
    products.fp32_precision = "tf32"
    try:
        yield
    finally:
        products.fp32_precision = before


def _inverse_root(flipped: Tensor) -> Tensor:
    """Upper triangular R [B, K, K] with H^-1 = R^T R, given H with rows and columns reversed, which is used up.

    R is the inverse of the U in H = U U^T, which is the ordinary Cholesky factor with rows and columns reversed: one
    factorization and one triangular inverse, where the usual way inverts H and factors twice.
    """
    lower, info = torch.linalg.cholesky_ex(flipped)
    for ridge in RIDGES:
        if not bool(info.any()):
            break
        diagonal = flipped.diagonal(dim1=1, dim2=2)
        diagonal += ridge * diagonal.mean(dim=1, keepdim=True)
        lower, info = torch.linalg.cholesky_ex(flipped)
    if bool(info.any()):
        raise SingularError("its second moments cannot be factored")
    del flipped
    _invert(lower)
    return torch.flip(lower, (1, 2))


def _invert(lower: Tensor) -> None:
    """Invert lower triangular [B, K, K] in place, by halves: products, and little memory."""
    if lower.shape[1] <= DIRECTLY:
        identity = torch.eye(lower.shape[1], dtype=lower.dtype, device=lower.device).expand_as(lower)
        lower.copy_(torch.linalg.solve_triangular(lower, identity, upper=False))
        return
    half = lower.shape[1] // 2
    first, corner, second = lower[:, :half, :half], lower[:, half:, :half], lower[:, half:, half:]
    _invert(first)
    _invert(second)
    corner.copy_(second @ (corner @ first)).neg_()


def _feedback(w: Tensor, step: Tensor, root: Tensor) -> Tensor:
    """Round channel after channel; w [B, K, N] is used up.

    A row of R over its diagonal says how much of that channel's error each later one takes over.
    """
    diagonal = root.diagonal(dim1=1, dim2=2)[:, :, None]
    for begin in range(0, w.shape[1], GROUP):
        end = min(begin + GROUP, w.shape[1])
        block = w[:, begin:end]
        pass_on = root[:, begin:end, begin:] / diagonal[:, begin:end]
        codes, errors = _columns(block, step[:, begin:end], pass_on[:, :, : end - begin])
        block.copy_(codes)
        if end < w.shape[1]:
            w[:, end:].baddbmm_(pass_on[:, :, end - begin :].mT, errors, alpha=-1)
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
