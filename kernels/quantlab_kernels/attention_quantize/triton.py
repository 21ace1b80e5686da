"""The means of sampled tokens, then a launch each for queries, keys and values.

A program has 64 queries, or 128 keys or values, of one head. The rotation is a product with a matrix
of ±1, exact in 16 bits; the mean, rotated already, is subtracted from the result in float32. Rows of values
are read in the order in which the kernel wants the columns of their transpose. A block of keys or values is rotated
twice, 64 tokens at a time, once for its scale and once for its codes: rotating is cheaper than the registers that would
hold it.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantlab_kernels.attention_quantize.reference import BLOCK, SAMPLES, Rotary, hadamard
from quantlab_kernels.common.lasting import lasting
from quantlab_kernels.common.triton_fp8 import encode_e4m3

if TYPE_CHECKING:
    from quantlab_kernels.attention_quantize.op import Problem


def supports(problem: Problem) -> str | None:
    if problem.sm < 80:
        return f"needs sm_80 or newer, the GPU is sm_{problem.sm}"
    if problem.dtype == torch.float32:
        return "rotates with 16-bit tensor cores, the inputs are float32"
    return None


@functools.cache
def _matrix(d: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return lasting(lambda: hadamard(d).to(device, dtype))


def launch(
    q: Tensor, k: Tensor, v: Tensor, key_range: Tensor | None, out: tuple[Tensor, ...], rotary: Rotary | None = None
) -> None:
    """Fill the eight outputs of `op.attention_quantize`; a rotary embedding is torch's, before all else."""
    if rotary is not None:
        q, k = rotary.embed(q), rotary.embed(k)
    (batch, _, sq, d), (_, heads_kv, skv, _) = q.shape, k.shape
    padded = triton.next_power_of_2(d)
    matrix = _matrix(d, q.dtype, q.device)
    turned = torch.empty((2, batch, heads_kv, d), dtype=torch.float32, device=q.device)
    unit = (d & -d) ** -0.5
    native = q.is_cuda and torch.cuda.get_device_capability(q.device) >= (8, 9)
    if batch * heads_kv:
        _means[(batch * heads_kv, 2)](
            k, v, key_range, matrix, out[7], turned, *k.stride(), *v.stride(), batch, heads_kv, skv, d,
            padded, 64, SAMPLES, key_range is not None, num_warps=8, enable_fp_fusion=True,
        )  # fmt: skip
    q_codes, q_scale, q_shift, k_codes, k_scale, v_codes, v_scale, _ = (
        t.view(torch.uint8) if t.dtype == torch.float8_e4m3fn and not native else t for t in out
    )
    blocks = -(-skv // BLOCK)
    kinds = (
        ("queries", q, turned[0], q_codes, q_scale, q_shift, -(-sq // 64)),
        ("keys", k, turned[0], k_codes, k_scale, None, blocks),
        ("values", v, turned[1], v_codes, v_scale, None, blocks),
    )
    for kind, x, mean, codes, scale, shift, tiles in kinds:
        if x.numel():
            _quantize[(tiles, batch * x.shape[1])](
                x, key_range, matrix, mean, codes, scale, shift, *x.stride(), x.shape[1], heads_kv, x.shape[2], blocks,
                unit, kind, d, padded, min(padded, 64), key_range is not None, codes.dtype == torch.int8, native,
                num_warps=4 if padded <= 128 else 8, num_stages=1, enable_fp_fusion=True,
            )  # fmt: skip


@triton.jit
def _means(
    k_ptr, v_ptr, range_ptr, matrix_ptr, v_mean_ptr, turned_ptr,
    k_b, k_h, k_s, k_d, v_b, v_h, v_s, v_d, batch, heads, length,
    D: tl.constexpr, DP: tl.constexpr, CHUNK: tl.constexpr, SAMPLES: tl.constexpr, RANGE: tl.constexpr,
):  # fmt: skip
    head, values = tl.program_id(0).to(tl.int64), tl.program_id(1)
    b, h = head // heads, head % heads
    start, end = 0, length
    if RANGE:
        start = tl.maximum(tl.load(range_ptr + 2 * b), 0)
        end = tl.minimum(tl.load(range_ptr + 2 * b + 1), length)
    count = tl.maximum(end - start, 0).to(tl.int64)
    samples = tl.minimum(count, SAMPLES)
    column = tl.arange(0, DP)
    total = tl.zeros((DP,), tl.float32)
    for first in tl.static_range(0, SAMPLES, CHUNK):
        i = first + tl.arange(0, CHUNK)
        token = start + i * count // tl.maximum(samples, 1)
        mask = (i < samples)[:, None] & (column < D)[None, :]
        if values == 0:
            x = tl.load(k_ptr + b * k_b + h * k_h + token[:, None] * k_s + column[None, :] * k_d, mask=mask, other=0.0)
            total += tl.sum(x.to(tl.float32), 0)
        else:
            x = tl.load(v_ptr + b * v_b + h * v_h + token[:, None] * v_s + column[None, :] * v_d, mask=mask, other=0.0)
            total += tl.sum(x.to(tl.float32), 0)
    mean = total / tl.maximum(samples, 1).to(tl.float32)
    inside = column < D
    if values == 1:
        tl.store(v_mean_ptr + head * D + column, mean, mask=inside)
    square = inside[:, None] & inside[None, :]
    matrix = tl.load(matrix_ptr + column[:, None] * D + column[None, :], mask=square, other=0.0).to(tl.float32)
    turned = tl.sum(mean[:, None] * matrix, 0)
    tl.store(turned_ptr + (values * batch * heads + head) * D + column, turned, mask=inside)


@triton.jit
def _limit(INT8: tl.constexpr):
    return 127.0 if INT8 else 448.0


@triton.jit
def _scale(amax, INT8: tl.constexpr):
    return tl.where(amax > 0.0, amax / _limit(INT8), 1.0)


@triton.jit
def _codes(x, inverse, INT8: tl.constexpr, NATIVE: tl.constexpr):
    """x * inverse as codes."""
    if INT8:
        # Adding 1.5 * 2**23 rounds to an integer, ties to even.
        rounded = tl.clamp(x * inverse, -127.0, 127.0) + 12582912.0
        codes = (rounded - 12582912.0).to(tl.int8)
    elif NATIVE:
        codes = (x * inverse).to(tl.float8e4nv)  # saturates
    else:
        codes = encode_e4m3(x * inverse)
    return codes


@triton.jit
def _turned_rows(
    x_ptr, token_stride, column_stride, token, valid, matrix_ptr, D: tl.constexpr, DP: tl.constexpr, DK: tl.constexpr
):
    """[64, DP] float32: the tokens' rows times the matrix."""
    out = tl.zeros((64, DP), tl.float32)
    column = tl.arange(0, DP)
    for first in tl.range(0, DP, DK, num_stages=1):
        inner = first + tl.arange(0, DK)
        mask = valid[:, None] & (inner < D)[None, :]
        x = tl.load(x_ptr + token[:, None] * token_stride + inner[None, :] * column_stride, mask=mask, other=0.0)
        square = (inner < D)[:, None] & (column < D)[None, :]
        matrix = tl.load(matrix_ptr + inner[:, None] * D + column[None, :], mask=square, other=0.0)
        out = tl.dot(x, matrix, out)
    return out


@triton.jit
def _queries(
    q_ptr, matrix_ptr, mean_ptr, codes_ptr, scale_ptr, shift_ptr, token_stride, column_stride, row, block, sq, unit,
    D: tl.constexpr, DP: tl.constexpr, DK: tl.constexpr, INT8: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    token = block * 64 + tl.arange(0, 64)
    valid, column = token < sq, tl.arange(0, DP)
    x = _turned_rows(q_ptr, token_stride, column_stride, token, valid, matrix_ptr, D, DP, DK) * unit
    scale = _scale(tl.max(tl.abs(x), 1), INT8)
    scale_ptr, shift_ptr, codes_ptr = scale_ptr + row * sq, shift_ptr + row * sq, codes_ptr + row * sq * D
    tl.store(scale_ptr + token, scale, mask=valid)
    # Both are turned: their product is that of what they were.
    turned = tl.load(mean_ptr + column, mask=column < D, other=0.0) * unit
    tl.store(shift_ptr + token, tl.sum(x * turned[None, :], 1), mask=valid)
    inside = valid[:, None] & (column < D)[None, :]
    codes = _codes(x, (1.0 / scale)[:, None], INT8, NATIVE)
    tl.store(codes_ptr + token[:, None] * D + column[None, :], codes, mask=inside)


@triton.jit
def _keys(
    k_ptr, matrix_ptr, turned_ptr, codes_ptr, scale_ptr, token_stride, column_stride, row, block, blocks, skv, start,
    end, unit, D: tl.constexpr, DP: tl.constexpr, DK: tl.constexpr, INT8: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, DP)
    turned = tl.load(turned_ptr + column, mask=column < D, other=0.0)
    amax = tl.zeros((4,), tl.float32)
    for half in range(2):
        token = block * 128 + half * 64 + tl.arange(0, 64)
        valid = (token >= start) & (token < end)
        x = _turned_rows(k_ptr, token_stride, column_stride, token, valid, matrix_ptr, D, DP, DK)
        largest = tl.where(valid, tl.max(tl.abs(x - turned[None, :]), 1), 0.0)
        amax = tl.maximum(amax, tl.max(tl.max(tl.reshape(largest, (8, 4, 2)), 2), 0))
    scale = _scale(amax * unit, INT8)
    tl.store(scale_ptr + (row * blocks + block) * 4 + tl.arange(0, 4), scale)
    inverse = tl.reshape(tl.broadcast_to((unit / scale)[None, :, None], (8, 4, 2)), (64,))
    codes_ptr = codes_ptr + row * skv * D
    for half in range(2):
        token = block * 128 + half * 64 + tl.arange(0, 64)
        valid = (token >= start) & (token < end)
        x = _turned_rows(k_ptr, token_stride, column_stride, token, valid, matrix_ptr, D, DP, DK)
        x = tl.where(valid[:, None], x - turned[None, :], 0.0)
        inside = (token < skv)[:, None] & (column < D)[None, :]
        codes = _codes(x, inverse[:, None], INT8, NATIVE)
        tl.store(codes_ptr + token[:, None] * D + column[None, :], codes, mask=inside)


@triton.jit
def _values(
    v_ptr, matrix_ptr, turned_ptr, codes_ptr, scale_ptr, token_stride, column_stride, row, block, blocks, start, end,
    unit, D: tl.constexpr, DP: tl.constexpr, DK: tl.constexpr, INT8: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    place, column = tl.arange(0, 64), tl.arange(0, DP)
    key = place // 32 * 32 + place % 32 // 16 * 16 + place % 4 // 2 * 8 + place % 16 // 4 * 2 + place % 2
    turned = tl.load(turned_ptr + column, mask=column < D, other=0.0)
    amax = tl.zeros((64,), tl.float32)
    for half in range(2):
        token = block * 128 + half * 64 + key
        valid = (token >= start) & (token < end)
        x = _turned_rows(v_ptr, token_stride, column_stride, token, valid, matrix_ptr, D, DP, DK)
        amax = tl.maximum(amax, tl.where(valid, tl.max(tl.abs(x - turned[None, :]), 1), 0.0))
    scale = _scale(tl.max(amax, 0) * unit, INT8)
    tl.store(scale_ptr + row * blocks + block, scale)
    codes_ptr = codes_ptr + row * D * (blocks * 128) + block * 128
    for half in range(2):
        token = block * 128 + half * 64 + key
        valid = (token >= start) & (token < end)
        x = _turned_rows(v_ptr, token_stride, column_stride, token, valid, matrix_ptr, D, DP, DK)
        codes = tl.trans(_codes(tl.where(valid[:, None], x - turned[None, :], 0.0), unit / scale, INT8, NATIVE))
        at = codes_ptr + column[:, None] * (blocks * 128) + (half * 64 + place)[None, :]
        tl.store(at, codes, mask=(column < D)[:, None] & (place >= 0)[None, :])


# With a length of 1 known to the compiler, the codes of all other keys are constants; where a pair of equal constants
# becomes E4M3, ptxas 12.9 reads a register one turn of the loop before it writes it: a code of 0 was anything, NaN too.
@triton.jit(do_not_specialize=["length", "blocks"])
def _quantize(
    x_ptr, range_ptr, matrix_ptr, turned_ptr, codes_ptr, scale_ptr, shift_ptr, x_b, x_h, x_s, x_d, heads, heads_kv,
    length, blocks, unit, KIND: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, DK: tl.constexpr,
    RANGE: tl.constexpr, INT8: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    block, row = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    b, h = row // heads, row % heads
    x_ptr += b * x_b + h * x_h
    if KIND == "queries":
        mean_ptr = turned_ptr + (b * heads_kv + h // (heads // heads_kv)) * D
        _queries(
            x_ptr, matrix_ptr, mean_ptr, codes_ptr, scale_ptr, shift_ptr, x_s, x_d, row, block, length, unit, D, DP, DK,
            INT8, NATIVE,
        )  # fmt: skip
    else:
        start, end = 0, length
        if RANGE:
            start = tl.load(range_ptr + 2 * b)
            end = tl.minimum(tl.load(range_ptr + 2 * b + 1), length)
        if KIND == "keys":
            _keys(
                x_ptr, matrix_ptr, turned_ptr + row * D, codes_ptr, scale_ptr, x_s, x_d, row, block, blocks, length,
                start, end, unit, D, DP, DK, INT8, NATIVE,
            )  # fmt: skip
        else:
            _values(
                x_ptr, matrix_ptr, turned_ptr + row * D, codes_ptr, scale_ptr, x_s, x_d, row, block, blocks, start, end,
                unit, D, DP, DK, INT8, NATIVE,
            )  # fmt: skip
