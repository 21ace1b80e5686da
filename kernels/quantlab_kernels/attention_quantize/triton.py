"""Two launches: the means of sampled tokens, then everything else with each tensor read once.

A program of the second one has 128 tokens of queries, keys or values of one head. The rotation is a product with a
matrix of ±1, exact in 16 bits; the mean, rotated by the first launch, is subtracted from the result in float32. Values
are multiplied from the left, so that their tile comes out transposed, and their rows are read in the order in which the
kernel wants the columns.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantlab_kernels.attention_quantize.reference import BLOCK, SAMPLES, hadamard
from quantlab_kernels.common.triton_fp8 import store_codes

if TYPE_CHECKING:
    from quantlab_kernels.attention_quantize.op import Problem


def supports(problem: Problem) -> str | None:
    if problem.sm < 80:
        return f"needs sm_80 or newer, the GPU is sm_{problem.sm}"
    return None


@functools.cache
def _matrix(d: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return hadamard(d).to(device, dtype)


def launch(q: Tensor, k: Tensor, v: Tensor, key_range: Tensor | None, out: tuple[Tensor, ...]) -> None:
    """Fill the eight outputs of `op.attention_quantize`."""
    (batch, heads_q, sq, d), (_, heads_kv, skv, _) = q.shape, k.shape
    padded = triton.next_power_of_2(d)
    matrix = _matrix(d, q.dtype, q.device)
    turned = torch.empty((2, batch, heads_kv, d), dtype=torch.float32, device=q.device)
    unit = (d & -d) ** -0.5
    native = q.is_cuda and torch.cuda.get_device_capability(q.device) >= (8, 9)
    if batch * heads_kv:
        _means[(batch * heads_kv, 2)](
            k, v, key_range, matrix, out[7], turned, *k.stride(), *v.stride(), batch, heads_kv, skv, d,
            padded, 64, SAMPLES, key_range is not None, num_warps=8,
        )  # fmt: skip
    blocks_q, blocks_k = -(-sq // BLOCK), -(-skv // BLOCK)
    programs = batch * (heads_q * blocks_q + 2 * heads_kv * blocks_k)
    if programs == 0:
        return
    codes = [t if t.dtype == torch.int8 or native else t.view(torch.uint8) for t in (out[0], out[3], out[5])]
    _quantize[(programs,)](
        q, k, v, key_range, matrix, turned, codes[0], out[1], out[2], codes[1], out[4], codes[2], out[6],
        *q.stride(), *k.stride(), *v.stride(), batch, heads_q, heads_kv, sq, skv, blocks_q, blocks_k, unit, d, padded,
        min(padded, 128), key_range is not None, out[0].dtype == torch.int8, out[5].dtype == torch.int8, native,
        num_warps=8,
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
def _store(pointers, x, inverse, mask, INT8: tl.constexpr, NATIVE: tl.constexpr):
    """x * inverse as codes."""
    if INT8:
        # Adding 1.5 * 2**23 rounds to an integer, ties to even.
        rounded = tl.clamp(x * inverse, -127.0, 127.0) + 12582912.0
        tl.store(pointers, (rounded - 12582912.0).to(tl.int8), mask=mask)
    else:
        store_codes(pointers, x * inverse, mask, NATIVE)


@triton.jit
def _turned_rows(
    x_ptr, token_stride, column_stride, token, valid, matrix_ptr, D: tl.constexpr, DP: tl.constexpr, DK: tl.constexpr
):
    """[128, DP] float32: the tokens' rows times the matrix."""
    out = tl.zeros((128, DP), tl.float32)
    column = tl.arange(0, DP)
    for first in tl.static_range(0, DP, DK):
        inner = first + tl.arange(0, DK)
        mask = valid[:, None] & (inner < D)[None, :]
        x = tl.load(x_ptr + token[:, None] * token_stride + inner[None, :] * column_stride, mask=mask, other=0.0)
        square = (inner < D)[:, None] & (column < D)[None, :]
        matrix = tl.load(matrix_ptr + inner[:, None] * D + column[None, :], mask=square, other=0.0)
        out = tl.dot(x, matrix, out, input_precision="ieee")
    return out


@triton.jit
def _queries(
    q_ptr, matrix_ptr, mean_ptr, codes_ptr, scale_ptr, shift_ptr, token_stride, column_stride, row, block, sq, unit,
    D: tl.constexpr, DP: tl.constexpr, DK: tl.constexpr, INT8: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    token = block * 128 + tl.arange(0, 128).to(tl.int64)
    valid, column = token < sq, tl.arange(0, DP)
    inside = valid[:, None] & (column < D)[None, :]
    x = _turned_rows(q_ptr, token_stride, column_stride, token, valid, matrix_ptr, D, DP, DK) * unit
    amax = tl.max(tl.abs(x), 1)
    scale = _scale(amax, INT8)
    tl.store(scale_ptr + row * sq + token, scale, mask=valid)
    _store(
        codes_ptr + (row * sq + token)[:, None] * D + column[None, :], x, (1.0 / scale)[:, None], inside, INT8, NATIVE
    )
    # Both are turned: their product is that of what they were.
    turned = tl.load(mean_ptr + column, mask=column < D, other=0.0) * unit
    tl.store(shift_ptr + row * sq + token, tl.sum(x * turned[None, :], 1), mask=valid)


@triton.jit
def _keys(
    k_ptr, matrix_ptr, turned_ptr, codes_ptr, scale_ptr, token_stride, column_stride, row, block, blocks, skv, start,
    end, unit, D: tl.constexpr, DP: tl.constexpr, DK: tl.constexpr, INT8: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    token = block * 128 + tl.arange(0, 128).to(tl.int64)
    valid, column = (token >= start) & (token < end), tl.arange(0, DP)
    x = _turned_rows(k_ptr, token_stride, column_stride, token, valid, matrix_ptr, D, DP, DK)
    turned = tl.load(turned_ptr + column, mask=column < D, other=0.0)
    x = tl.where(valid[:, None], (x - turned[None, :]) * unit, 0.0)
    amax = tl.max(tl.max(tl.reshape(tl.max(tl.abs(x), 1), (16, 4, 2)), 2), 0)
    scale = _scale(amax, INT8)
    tl.store(scale_ptr + (row * blocks + block) * 4 + tl.arange(0, 4), scale)
    inverse = tl.reshape(tl.broadcast_to((1.0 / scale)[None, :, None], (16, 4, 2)), (128,))
    inside = (token < skv)[:, None] & (column < D)[None, :]
    _store(codes_ptr + (row * skv + token)[:, None] * D + column[None, :], x, inverse[:, None], inside, INT8, NATIVE)


@triton.jit
def _values(
    v_ptr, matrix_ptr, turned_ptr, codes_ptr, scale_ptr, token_stride, column_stride, row, block, blocks, start, end,
    unit, D: tl.constexpr, DP: tl.constexpr, DK: tl.constexpr, INT8: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    place = tl.arange(0, 128)
    key = place // 32 * 32 + place % 32 // 16 * 16 + place % 4 // 2 * 8 + place % 16 // 4 * 2 + place % 2
    token = block * 128 + key.to(tl.int64)
    valid, column = (token >= start) & (token < end), tl.arange(0, DP)
    x = tl.zeros((DP, 128), tl.float32)
    for first in tl.static_range(0, DP, DK):
        inner = first + tl.arange(0, DK)
        mask = valid[:, None] & (inner < D)[None, :]
        rows = tl.load(v_ptr + token[:, None] * token_stride + inner[None, :] * column_stride, mask=mask, other=0.0)
        square = (inner < D)[:, None] & (column < D)[None, :]
        matrix = tl.load(matrix_ptr + inner[:, None] * D + column[None, :], mask=square, other=0.0)
        x = tl.dot(tl.trans(matrix), tl.trans(rows), x, input_precision="ieee")
    turned = tl.load(turned_ptr + column, mask=column < D, other=0.0)
    x = tl.where(valid[None, :], (x - turned[:, None]) * unit, 0.0)
    scale = _scale(tl.max(tl.max(tl.abs(x), 1), 0), INT8)
    tl.store(scale_ptr + row * blocks + block, scale)
    at = codes_ptr + (row * D + column)[:, None] * (blocks * 128) + block * 128 + place[None, :]
    _store(at, x, 1.0 / scale, (column < D)[:, None] & (place >= 0)[None, :], INT8, NATIVE)


@triton.jit
def _quantize(
    q_ptr, k_ptr, v_ptr, range_ptr, matrix_ptr, turned_ptr,
    q_codes, q_scale, q_shift, k_codes, k_scale, v_codes, v_scale,
    q_b, q_h, q_s, q_d, k_b, k_h, k_s, k_d, v_b, v_h, v_s, v_d,
    batch, heads_q, heads_kv, sq, skv, blocks_q, blocks_k, unit,
    D: tl.constexpr, DP: tl.constexpr, DK: tl.constexpr, RANGE: tl.constexpr,
    QK_INT8: tl.constexpr, PV_INT8: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    queries, keys = batch * heads_q * blocks_q, batch * heads_kv * blocks_k
    if program < queries:
        row, block = program // blocks_q, program % blocks_q
        b, h = row // heads_q, row % heads_q
        kv = b * heads_kv + h // (heads_q // heads_kv)
        _queries(
            q_ptr + b * q_b + h * q_h, matrix_ptr, turned_ptr + kv * D, q_codes, q_scale, q_shift, q_s, q_d, row,
            block, sq, unit, D, DP, DK, QK_INT8, NATIVE,
        )  # fmt: skip
    else:
        rest = program - queries
        is_value = rest >= keys
        rest = tl.where(is_value, rest - keys, rest)
        row, block = rest // blocks_k, rest % blocks_k
        b, h = row // heads_kv, row % heads_kv
        start, end = 0, skv
        if RANGE:
            start = tl.load(range_ptr + 2 * b)
            end = tl.minimum(tl.load(range_ptr + 2 * b + 1), skv)
        if is_value:
            _values(
                v_ptr + b * v_b + h * v_h, matrix_ptr, turned_ptr + (batch * heads_kv + row) * D, v_codes, v_scale,
                v_s, v_d, row, block, blocks_k, start, end, unit, D, DP, DK, PV_INT8, NATIVE,
            )  # fmt: skip
        else:
            _keys(
                k_ptr + b * k_b + h * k_h, matrix_ptr, turned_ptr + row * D, k_codes, k_scale, k_s, k_d, row, block,
                blocks_k, skv, start, end, unit, D, DP, DK, QK_INT8, NATIVE,
            )  # fmt: skip
