"""The definition: `qtensor.quantize` with the spec of each granularity. Also the CPU implementation."""

from __future__ import annotations

import functools

from torch import Tensor

from quantlab_kernels.common.gemm import empty_group_scale
from quantlab_kernels.formats import E4M3
from quantlab_kernels.qtensor import TensorSpec, quantize


@functools.cache
def spec(granularity: str, power2: bool = False) -> TensorSpec:
    """Spec of "group" (1x128), "token" (one row) or "block" (128x128)."""
    block = {"group": (1, 128), "token": (1, -1), "block": (128, 128)}[granularity]
    return TensorSpec(E4M3, block, dynamic=granularity != "block", scale="power2" if power2 else "float32")


def group(x: Tensor, scale: Tensor | None, power2: bool) -> tuple[Tensor, Tensor]:
    """codes [M, K] and scale [M, ceil(K/128)] column-major and padded; `scale` may be given as [G] or [M, G]."""
    rows, columns = x.shape
    given = None if scale is None else scale.expand(rows, -(-columns // 128))
    result = quantize(x, spec("group", power2), given)
    padded = empty_group_scale(x, rows, result.scale.shape[1])
    return result.codes, padded.copy_(result.scale)


def token(x: Tensor) -> tuple[Tensor, Tensor]:
    """codes [M, K] and scale [M, 1]."""
    result = quantize(x, spec("token"))
    return result.codes, result.scale


def block(w: Tensor, scale: Tensor | None, power2: bool) -> tuple[Tensor, Tensor]:
    """codes [N, K] and scale [ceil(N/128), ceil(K/128)] row-major."""
    result = quantize(w, spec("block", power2), scale)
    return result.codes, result.scale.contiguous() if scale is None else result.scale.clone()
