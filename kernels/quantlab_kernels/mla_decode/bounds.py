"""How far an element of a backend's result may lie from the float64 definition on the same codes.

Queries and weights are rounded to what they multiply: float16, or the dtype of a 16-bit cache; codes are exact, sums
are float32. With w the exact weights and c_j the latents:

    |out - exact| <= u_out |exact| + sum_j w_j (2 d + u_w) (|c_j| + |exact|),   d = max_j |error of score j|

    d    u_q scale (|q| |c_j| + |q_rope| |r_j|), u_q and u_w twice the roundoff of the dtype

With 8-bit MMA in the scores (``narrow``) a query is the sum of two E4M3 numbers, or an integer of 14 bits; sums of 512
products are good to 2^-7 of their terms. INT4 in tiles of 64 rows has integers of 8 bits: a channel is off by up to
2^-8 of the largest, which over the channels of a row adds up to less than 2^-7 of the terms, unless the largest stands
alone. With ``narrow_weights`` (all but INT4 in tiles of 64 rows) a weight, times its token's scale, is one E4M3 number,
whose least step is 2^-9 where the row's largest product is 128 or more.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantlab_kernels.common.bounds import UNIT_ROUNDOFF
from quantlab_kernels.common.latent import PackedLatent
from quantlab_kernels.mla_decode import reference


def decode_bound(
    exact: Tensor, weights: Tensor, q_latent: Tensor, q_rope: Tensor, cache: PackedLatent, length: Tensor,
    start: Tensor | None, scale: float, narrow: bool = False, narrow_weights: bool = False,
) -> Tensor:  # fmt: skip
    """[B, Sq, H, L] float64, for results in q's dtype.

    exact    the float64 result;  weights  [B, H, Sq, slots] its weights;  cache  dense
    """
    start = torch.zeros_like(length) if start is None else start
    latent, rope = reference.operands(cache, length, start, torch.float64)
    kept = cache.rope.dtype
    u_rope = 2.0 ** (-9 if kept == torch.bfloat16 and q_rope.dtype != kept else -10)
    u_latent = 2.0**-7 if narrow else u_rope if cache.format == "16bit" else 2.0**-10
    u_weight = 2.0**-4 if narrow_weights else 2.0 ** (-8 if cache.format == "16bit" and kept == torch.bfloat16 else -9)
    scores = torch.einsum("bqhl,bsl->bhqs", q_latent.double().abs(), latent.abs()) * u_latent
    scores += torch.einsum("bqhr,bsr->bhqs", q_rope.double().abs(), rope.abs()) * u_rope
    off = weights * (2 * scale * scores.amax(-1, keepdim=True) + u_weight)
    if narrow_weights and cache.scale is not None:
        scales = cache.scale.double().nan_to_num()[:, None, None]
        off += torch.where(weights > 0, 2.0**-17 * (weights * scales).amax(-1, keepdim=True) / scales, 0.0)
    moved = torch.einsum("bhqs,bsl->bqhl", off, latent.abs())
    moved += off.sum(-1).transpose(1, 2)[..., None] * exact.abs()
    return UNIT_ROUNDOFF[q_latent.dtype] * exact.abs() + moved + 1e-6
