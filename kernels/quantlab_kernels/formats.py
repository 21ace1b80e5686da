"""Number formats: their range, and the saturating round-to-nearest-even cast into their codes.

A format knows nothing of scales; `qtensor` puts scales and blocks around it. Codes are held in the dtype that
checkpoints and kernels use: FP8 codes in torch's float8 types, integers in int8 (INT4 one code per byte; `packing`
makes words of them).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Format:
    """A number format.

    name   as written in recipes and messages
    bits   of one code
    max    largest finite value; the grid is used symmetrically, so ``-max`` is its counterpart (INT8 leaves -128 and
           INT4 leaves -8 unused when a scale is derived from an absolute maximum, but both cast and decode)
    dtype  torch dtype that holds one code
    """

    name: str
    bits: int
    max: float
    dtype: torch.dtype

    @property
    def is_float(self) -> bool:
        return self.dtype.is_floating_point

    @property
    def min(self) -> float:
        return -self.max if self.is_float else -self.max - 1

    def cast(self, x: Tensor) -> Tensor:
        """Round to nearest, ties to even, saturate at the ends of the range. NaN stays NaN (floats), is 0 (integers).

        x is any real dtype and shape; the result has ``self.dtype``. Rounding happens once, from float32 (float64
        input is first rounded to float32, which is exact for everything a float32 scale can produce).
        """
        x = x.to(torch.float32)
        if self.is_float:
            return x.clamp(self.min, self.max).to(self.dtype)
        return x.nan_to_num(nan=0.0, posinf=self.max, neginf=self.min).round().clamp(self.min, self.max).to(self.dtype)

    def decode(self, codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Values of the codes, exact in any dtype of at least 11 bits of precision."""
        return codes.to(dtype)


E4M3 = Format("e4m3", 8, 448.0, torch.float8_e4m3fn)
E5M2 = Format("e5m2", 8, 57344.0, torch.float8_e5m2)
INT8 = Format("int8", 8, 127.0, torch.int8)
INT4 = Format("int4", 4, 7.0, torch.int8)

FORMATS: dict[str, Format] = {f.name: f for f in (E4M3, E5M2, INT8, INT4)}
