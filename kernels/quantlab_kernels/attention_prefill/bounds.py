"""How far an element of a backend's result may lie from the float64 definition on the same operands.

Softmax cancels what all its weights have in common, so the error is that of single weights: with w the exact ones and v
the centred values,

    |out - exact| <= u_out |exact| + sum_j d_j (|v_j| + |exact - mean|) + turn

    d_j   what weight j may be off: half a code, of a scale that the largest weight of its block sets, (INT8) or half a
          unit in the last place and the sum in an FP8 tensor core; and the rounding of its score in float32, for
          INT8 also that of its logarithm to 10 bits and the polynomial that makes a power of two of it
    turn  the rotation of the result back, in float16 scaled by the row's largest element
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantlab_kernels.attention_quantize import reference as quantization
from quantlab_kernels.attention_quantize.op import Quantized
from quantlab_kernels.attention_quantize.reference import BLOCK
from quantlab_kernels.common.bounds import FP8_TENSOR_CORE, UNIT_ROUNDOFF

LEVELS = 127  # of a probability in INT8: Triton's 7 bits


def attention_bound(
    exact: Tensor, weights: Tensor, operands: Quantized, out_dtype: torch.dtype, b: int, h: int
) -> Tensor:
    """[Sq, D] float64, for one head.

    exact    [Sq, D] float64 result of that head;  weights [Sq, Skv] its exact weights (without a sink's)
    """
    kv = h // (operands.q.shape[1] // operands.k.shape[1])
    skv, d = weights.shape[1], exact.shape[1]
    alone = Quantized(*(t[b : b + 1, kv : kv + 1] if t.dim() > 2 else t for t in operands))
    v = quantization.dequantize_values(alone.v, alone.v_scale, skv)[0, 0].abs()
    centred = exact.abs() + operands.v_mean[b, kv].double().abs()
    blocks = torch.nn.functional.pad(weights, (0, -skv % BLOCK)).unflatten(1, (-1, BLOCK))
    largest = blocks.amax(2, keepdim=True).expand(blocks.shape).flatten(1)[:, :skv]
    if operands.v.dtype == torch.int8:
        off = 0.5 / LEVELS * largest + 2.0**-8 * weights
    else:
        off = (2.0**-4 + FP8_TENSOR_CORE) * weights + 2.0**-18 * largest
    off = off + 2.0**-17 * weights
    turn = 2.0**-11 * d**0.5 * centred.amax(1, keepdim=True)
    return UNIT_ROUNDOFF[out_dtype] * exact.abs() + off @ v + off.sum(1, keepdim=True) * centred + turn + 1e-30
