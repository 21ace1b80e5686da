"""A quantized tensor and its arithmetic: the definition that every kernel, file format and test refers to.

`quantize` and `dequantize` are plain torch, run on every device, and are slow and right. A frozen dataclass holds the
parts; it is not a `torch.Tensor` subclass, so what an operation costs and does is visible at the call.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from quantlab_kernels.formats import Format

ScaleKind = Literal["float32", "bfloat16", "power2"]


@dataclass(frozen=True)
class TensorSpec:
    """How one tensor is stored.

    format     number format of the codes
    block      (rows, columns) that share one scale; -1 is the full extent: (-1, -1) one scale per tensor, (1, -1) per
               row, (1, 128) per group, (128, 128) per block. Ragged edges make smaller blocks.
    symmetric  no zero point
    dynamic    scales are computed from the data at run time (activations) and are not stored
    scale      "float32": ``amax / format.max``; "bfloat16": that, rounded to bfloat16, because some readers of
               checkpoints keep scales in the model's dtype; "power2": rounded up to a power of two. All are held as
               float32
    """

    format: Format
    block: tuple[int, int] = (-1, -1)
    symmetric: bool = True
    dynamic: bool = False
    scale: ScaleKind = "float32"

    def __post_init__(self) -> None:
        if len(self.block) != 2 or any(b == 0 or b < -1 for b in self.block):
            raise ValueError(f"block = {self.block}: needs two extents, each positive or -1 for the full extent")
        if self.format.bits == 4 and self.block[1] == -1:
            raise ValueError("int4 with one scale for a whole row loses most codes; use block=(1, 128)")
        if not self.symmetric and self.format.is_float:
            raise ValueError(f"{self.format.name} has a sign; a zero point needs an integer format")

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Shape of the scale of a 2-D tensor of this shape."""
        rows, columns = (extent if b == -1 else b for b, extent in zip(self.block, shape, strict=True))
        return -(-shape[0] // max(rows, 1)), -(-shape[1] // max(columns, 1))


@dataclass(frozen=True)
class QuantizedTensor:
    """``value[i, j] = scale[i // rows, j // columns] * (codes[i, j] - zero[...])``.

    codes  [R, C]  spec.format.dtype
    scale  spec.scale_shape((R, C))  float32
    zero   like scale, int32, or None when spec.symmetric
    """

    codes: Tensor
    scale: Tensor
    spec: TensorSpec
    zero: Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        return self.codes.shape

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The values, computed in float32 (float64 if asked for) and rounded once to `dtype`."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        values = self.spec.format.decode(self.codes, wide)
        if self.zero is not None:
            values = values - expand_blocks(self.zero.to(wide), self.spec.block, self.shape)
        return (values * expand_blocks(self.scale.to(wide), self.spec.block, self.shape)).to(dtype)


def quantize(x: Tensor, spec: TensorSpec, scale: Tensor | None = None) -> QuantizedTensor:
    """Quantize a 2-D tensor; `scale` (float32, `spec.scale_shape`) replaces the one derived from the data.

    A block of zeros gets scale 1. Non-finite input gives non-finite codes or scales; callers that must refuse it check
    first. Raises ValueError for other ranks and for a scale of the wrong shape.
    """
    if x.ndim != 2:
        raise ValueError(f"quantize: got shape {tuple(x.shape)}, needs two dimensions")
    if not spec.symmetric:
        return _quantize_asymmetric(x, spec)
    x = x.to(torch.float32)
    if scale is None:
        scale = scale_of(block_reduce(x.abs(), spec.block, "amax"), spec)
    elif scale.shape != spec.scale_shape(tuple(x.shape)):
        raise ValueError(f"quantize: scale {tuple(scale.shape)}, needs {spec.scale_shape(tuple(x.shape))}")
    codes = spec.format.cast(x / expand_blocks(scale, spec.block, x.shape))
    return QuantizedTensor(codes, scale, spec)


def scale_of(amax: Tensor, spec: TensorSpec) -> Tensor:
    """Scale from the absolute maximum, float32. Zero gives 1; values whose scale would be subnormal give 2**-126."""
    amax = amax.to(torch.float32)
    # Divided by a tensor: by a number, CUDA multiplies with the reciprocal, and its scales would not equal the CPU's.
    scale = (amax / torch.full_like(amax, spec.format.max)).clamp_min(torch.finfo(torch.float32).tiny)
    if spec.scale == "power2":
        mantissa, exponent = torch.frexp(scale)  # scale = mantissa * 2**exponent, 0.5 <= mantissa < 1
        power2 = torch.ldexp(torch.ones_like(scale), exponent - (mantissa == 0.5).to(exponent.dtype))
        scale = torch.where(scale.isfinite(), power2, scale)
    elif spec.scale == "bfloat16":
        scale = scale.to(torch.bfloat16).to(torch.float32)
    return torch.where(amax == 0, torch.ones_like(scale), scale)


def _quantize_asymmetric(x: Tensor, spec: TensorSpec) -> QuantizedTensor:
    x = x.to(torch.float32)
    low = block_reduce(x, spec.block, "amin").clamp_max(0)
    high = block_reduce(x, spec.block, "amax").clamp_min(0)
    levels = torch.full_like(high, spec.format.max - spec.format.min)
    scale = ((high - low) / levels).clamp_min(torch.finfo(torch.float32).tiny)
    scale = torch.where(high == low, torch.ones_like(scale), scale)
    zero = (spec.format.min - low / scale).round().clamp(spec.format.min, spec.format.max).to(torch.int32)
    shifted = x / expand_blocks(scale, spec.block, x.shape) + expand_blocks(zero.float(), spec.block, x.shape)
    return QuantizedTensor(spec.format.cast(shifted), scale, spec, zero)


def block_reduce(x: Tensor, block: tuple[int, int], how: Literal["amax", "amin", "sum"]) -> Tensor:
    """Reduce each (rows, columns) block of a 2-D tensor to one number; ragged edge blocks see only what is there."""
    reduce = getattr(torch, how)
    for dim, extent in enumerate(block):
        size = x.shape[dim]
        step = size if extent == -1 else extent
        if step == 1:
            continue
        if size == 0:
            x = x.new_zeros([0 if d == dim and extent != -1 else s for d, s in enumerate(x.shape)])
            continue
        whole = size // step * step
        body = x.narrow(dim, 0, whole).unflatten(dim, (whole // step, step))
        parts = [reduce(body, dim=dim + 1)] if whole else []
        if whole < size:
            parts.append(reduce(x.narrow(dim, whole, size - whole), dim=dim, keepdim=True))
        x = torch.cat(parts, dim=dim)
    return x


def expand_blocks(scale: Tensor, block: tuple[int, int], shape: torch.Size | tuple[int, ...]) -> Tensor:
    """Inverse layout of `block_reduce`: one number per block to one per element (broadcastable where possible)."""
    for dim, extent in enumerate(block):
        if extent not in (-1, 1):
            scale = scale.repeat_interleave(extent, dim=dim).narrow(dim, 0, shape[dim])
    return scale
