"""Rounding the channels of INT4 weights one after the other, on a GPU: one launch for a group of channels.

A program holds a tile of one group, all its channels by some rows of the weight, in registers. Rows do not know of each
other, so nothing leaves the program but the result. As steps of torch the same takes ten launches a channel, and a
layer has thousands.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantlab_calib.rounding import CODE_MAX

ROWS, WARPS = 32, 4  # of the weight in one program; its warps


def round_columns(w: Tensor, step: Tensor, pass_on: Tensor, old: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`search.round_columns` with INT4's codes, all float32 [B, C, N] on a GPU, C a power of two; w stays as it is."""
    batch, channels, rows = w.shape
    codes, errors = (torch.empty(w.shape, device=w.device) for _ in range(2))
    before = w if old is None else old
    with torch.cuda.device_of(w):
        _kernel[triton.cdiv(rows, ROWS), batch](
            w, step, before, pass_on, codes, errors, rows, *w.stride(), *step.stride(), *before.stride(),
            *pass_on.stride(), *codes.stride(), channels, ROWS, CODE_MAX, old is not None, num_warps=WARPS,
            enable_fp_fusion=True,
        )  # fmt: skip
    return codes, errors


@triton.jit
def _round(x):
    """To the nearest integer, halves to even, for |x| below 2^22: adding 1.5 * 2^23 leaves no bits for fractions."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def _kernel(
    w_ptr, step_ptr, old_ptr, pass_ptr, codes_ptr, errors_ptr, rows,
    w_batch, w_channel, w_row, step_batch, step_channel, step_row, old_batch, old_channel, old_row,
    pass_batch, pass_from, pass_to, out_batch, out_channel, out_row,
    CHANNELS: tl.constexpr, ROWS: tl.constexpr, TOP: tl.constexpr, OLD: tl.constexpr,
):  # fmt: skip
    channel, batch = tl.arange(0, CHANNELS), tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c, n, mask = channel[:, None].to(tl.int64), row[None, :].to(tl.int64), row[None, :] < rows
    w = tl.load(w_ptr + batch * w_batch + c * w_channel + n * w_row, mask=mask, other=0.0)
    step = tl.load(step_ptr + batch * step_batch + c * step_channel + n * step_row, mask=mask, other=1.0)
    if OLD:
        old = tl.load(old_ptr + batch * old_batch + c * old_channel + n * old_row, mask=mask, other=0.0)
    pass_ptr += batch * pass_batch + channel * pass_to
    for j in range(CHANNELS):
        passed = tl.load(pass_ptr + j * pass_from, mask=channel > j, other=0.0)
        here = channel[:, None] == j
        value, unit = tl.sum(tl.where(here, w, 0.0), 0), tl.sum(tl.where(here, step, 0.0), 0)
        nearest = _round(tl.clamp(value / unit, -TOP, TOP))
        before = tl.sum(tl.where(here, old, 0.0), 0) if OLD else value
        w -= passed[:, None] * (before - nearest * unit)[None, :]
    # what a channel was when its turn came is what it is now: later ones pass nothing back
    codes = _round(tl.clamp(w / step, -TOP, TOP))
    at = batch * out_batch + c * out_channel + n * out_row
    tl.store(codes_ptr + at, codes, mask=mask)
    tl.store(errors_ptr + at, (old if OLD else w) - codes * step, mask=mask)
