"""How far an element of a backend's result may lie from the float64 definition on the same codes.

Queries times the keys' channels, and weights times the values' scales, are float16 (16-bit caches: the cache's dtype);
codes are exact, sums are float32. With w the exact weights, x_j the scores:

    |out - exact| <= u_out |exact| + sum_j w_j (2 d + 2^-9) (|v_j| + |exact|),   d = max_j |error of x_j|

    d  2^-10 scale sum_c |q_c k_jc| of the rounded queries, 2^-18 of the constant that the mean of the keys adds
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantlab_kernels.attention_decode import reference
from quantlab_kernels.common.bounds import UNIT_ROUNDOFF
from quantlab_kernels.common.kv import PackedKV


def decode_bound(
    exact: Tensor, weights: Tensor, q: Tensor, cache: PackedKV, length: Tensor, start: Tensor | None, scale: float,
    out_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """[B, Sq, Hq, D] float64.

    exact    the float64 result;  weights  [B, Hq, Sq, slots] its weights;  cache  dense
    """
    position, near = reference.positions(cache, length, torch.zeros_like(length) if start is None else start)
    keys, values = reference.operands(cache, position, near, torch.float64)
    centred = keys
    if cache.k_mean is not None:
        packed = torch.where((position >= 0)[:, None, :, None], cache.k_mean.double()[:, :, None], 0.0)
        centred = torch.cat((keys[:, :, : cache.capacity] - packed, keys[:, :, cache.capacity :]), 2)
    groups = q.shape[1] // keys.shape[1]
    queries = q.double().abs().unflatten(1, (-1, groups))
    rounded = torch.einsum("bhgqd,bhsd->bhgqs", queries, centred.abs() * 2.0**-10 + keys.abs() * 2.0**-18)
    off = weights * (2 * scale * rounded.flatten(1, 2).amax(-1, keepdim=True) + 2.0**-9)
    moved = torch.einsum("bhgqs,bhsd->bqhgd", off.unflatten(1, (-1, groups)), values.abs()).flatten(2, 3)
    return UNIT_ROUNDOFF[out_dtype] * exact.abs() + moved + off.sum(-1).transpose(1, 2)[..., None] * exact.abs() + 1e-6
