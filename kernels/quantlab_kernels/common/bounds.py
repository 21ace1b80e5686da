"""The error model of the GEMM rooms: how far an element may lie from the float64 product of the same operands.

    |out - exact| <= u_out * |exact| + u_sum * (|A| |B|^T + |bias|)

element by element. `exact` multiplies the dequantized operands, so only the kernel's arithmetic counts; the second term
is the size of what was summed, which cancellation hides in `exact`. A norm over the whole result would not do: in a
product whose rows differ in magnitude it does not notice that a row is missing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

# Half a unit in the last place, relative, and the absolute error of results too small for that.
UNIT_ROUNDOFF = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
_SMALLEST_HALF = {torch.float32: 2.0**-150, torch.float16: 2.0**-25, torch.bfloat16: 2.0**-134}

# What a sum of 128 products loses in the FP8 tensor core, relative to the sum of their magnitudes. The core aligns the
# products of one instruction to the largest and truncates them to 14 bits. Largest seen on one H200 (2026-11, `wgmma`
# through Triton, the data of `operands`, K = 512 to 16384): 9.5e-4, on outliers; 6e-4 on one-signed sums.
FP8_TENSOR_CORE = 2.0**-9


def gemm_bound(
    exact: Tensor,
    magnitude: Tensor,
    k: int,
    out_dtype: torch.dtype,
    accumulation: Literal["float32", "fp8"],
) -> Tensor:
    """Largest allowed |out - exact|, float64, same shape.

    exact         [M, N] float64 product of the dequantized operands, bias included
    magnitude     [M, N] float64 product of their absolute values, |bias| included
    accumulation  "float32" for sums in float32 throughout; "fp8" for sums that stay in an FP8 tensor core for 128 of K
    """
    roundoff = (k + 4) * 2.0**-24 if accumulation == "float32" else FP8_TENSOR_CORE + (k / 128 + 4) * 2.0**-24
    rounding = UNIT_ROUNDOFF[out_dtype] * (exact.abs() + roundoff * magnitude)
    return roundoff * magnitude + rounding + _SMALLEST_HALF[out_dtype]


@dataclass(frozen=True)
class Worst:
    """The element that comes nearest to its bound or breaks it; `ratio` above 1 breaks it (infinite for NaN)."""

    index: tuple[int, ...]
    value: float
    exact: float
    ratio: float

    def __str__(self) -> str:
        return f"element {self.index} is {self.value:.6g}, exact {self.exact:.6g}: {self.ratio:.3g} of its bound"


def worst(out: Tensor, exact: Tensor, bound: Tensor) -> Worst:
    """The element of `out` with the largest |out - exact| / bound."""
    error = (out.to(torch.float64) - exact).abs()
    ratio = torch.where(error.isfinite(), error / bound, torch.inf).nan_to_num(nan=0.0, posinf=torch.inf)
    flat = int(ratio.argmax())
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), ratio.shape))
    return Worst(index, float(out[index]), float(exact[index]), float(ratio[index]))
