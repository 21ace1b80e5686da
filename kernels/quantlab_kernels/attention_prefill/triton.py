"""The portable backend: one program per tile of queries, the algorithm of `sm90.cu` in blocks of `tl.dot`.

Probabilities have 7 bits here: Triton multiplies int8 by int8 only. Keys are read in the order in which values are
stored. On GPUs without FP8 units E4M3 operands are converted to float16, exactly.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantlab_kernels.attention_prefill.reference import Attributes
from quantlab_kernels.attention_quantize.op import Quantized
from quantlab_kernels.attention_quantize.reference import BLOCK, hadamard
from quantlab_kernels.common.lasting import lasting
from quantlab_kernels.common.triton_fp8 import decode_e4m3

if TYPE_CHECKING:
    from quantlab_kernels.attention_prefill.op import Problem


@dataclass(frozen=True)
class Config:
    """queries of a program, keys of a step (a divisor of 128), warps, stages of the pipeline."""

    queries: int
    keys: int
    num_warps: int
    num_stages: int


def supports(problem: Problem) -> str | None:
    if problem.sm < 80:
        return f"needs sm_80 or newer, the GPU is sm_{problem.sm}"
    return None


def config(problem: Problem) -> Config:
    """Two accumulators of D per query have to stay in registers."""
    if problem.d > 128:
        return Config(64, 64, 8, 2)
    return Config(128, 128 if problem.sm == 90 else 64, 8, 3 if problem.sm == 90 else 2)


@functools.cache
def _matrix(d: int, device: torch.device) -> Tensor:
    return lasting(lambda: hadamard(d).to(device, torch.float16))


def launch(
    problem: Problem, operands: Quantized, attributes: Attributes, sinks: Tensor | None, key_range: Tensor | None,
    cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None, out: Tensor, lse: Tensor, config: Config | None = None,
) -> None:  # fmt: skip
    """Fill out [B, Sq, Hq, D] and lse [B, Hq, Sq]."""
    p, chosen = problem, config or globals()["config"](problem)
    sequences = 0 if cu_seqlens_q is None else cu_seqlens_q.numel() - 1
    tiles = -(-p.sq // chosen.queries) + sequences
    native = p.sm >= 89
    q, k, v = (
        t.view(torch.uint8) if t.dtype == torch.float8_e4m3fn and not native else t
        for t in (operands.q, operands.k, operands.v)
    )
    _kernel[(tiles, p.heads_q, p.batch)](
        q, operands.q_scale, operands.q_shift, k, operands.k_scale, v, operands.v_scale, operands.v_mean,
        _matrix(p.d, out.device), sinks, key_range, cu_seqlens_q, cu_seqlens_k, out, lse, p.heads_q, p.heads_kv, p.sq,
        p.skv, -(-p.skv // BLOCK), sequences, attributes.left, attributes.right, attributes.scale, attributes.softcap,
        (p.d & -p.d) ** -0.5, p.d, triton.next_power_of_2(p.d), chosen.queries, chosen.keys, p.qk == torch.int8,
        p.pv == torch.int8, native, attributes.softcap > 0, sinks is not None, key_range is not None, sequences > 0,
        chosen.num_stages, num_warps=chosen.num_warps, enable_fp_fusion=True,
    )  # fmt: skip


@triton.jit
def _operand(x, INT8: tl.constexpr, NATIVE: tl.constexpr):
    """Codes as a type that `tl.dot` takes."""
    if INT8 or NATIVE:  # an early return would leave two types of result
        operand = x
    else:
        operand = decode_e4m3(x)
    return operand


@triton.jit
def _span(
    out, largest, total, q, factor, shift, low, high, k_ptr, k_scale_ptr, v_ptr, v_scale_ptr, first, last, skv, width,
    softcap, D: tl.constexpr, DP: tl.constexpr, BN: tl.constexpr, QK_INT8: tl.constexpr, PV_INT8: tl.constexpr,
    NATIVE: tl.constexpr, SOFTCAP: tl.constexpr, MASKED: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Adds steps first .. last - 1 of BN keys to the sums of the rows."""
    column, place = tl.arange(0, DP), tl.arange(0, BN)
    within = place // 32 * 32 + place % 32 // 16 * 16 + place % 4 // 2 * 8 + place % 16 // 4 * 2 + place % 2
    limit: tl.constexpr = 127.0 if PV_INT8 else 256.0
    for step in tl.range(first, last, num_stages=STAGES):
        key = step * BN + within
        k = tl.load(
            k_ptr + key[None, :].to(tl.int64) * D + column[:, None], mask=(column < D)[:, None] & (key < skv)[None, :],
            other=0.0,
        )  # fmt: skip
        scores = tl.dot(q, _operand(k, QK_INT8, NATIVE)).to(tl.float32)
        k_scale = tl.load(k_scale_ptr + key // 128 * 4 + key // 2 % 4)
        x = scores * (factor[:, None] * k_scale[None, :])
        if SOFTCAP:
            # tanh(y) = 1 - 2 / (1 + exp(2 y)), the factor holds 2 log2(e) / softcap
            cap = softcap * 1.4426950408889634
            x = cap - 2.0 * cap / (1.0 + tl.math.exp2(x + shift[:, None]))
        if MASKED:
            seen = (key[None, :] >= low[:, None]) & (key[None, :] < high[:, None])
            x = tl.where(seen, x, float("-inf"))
        block = tl.max(x, 1)
        safe = tl.where(block == float("-inf"), 0.0, block)
        p = tl.math.exp2(x - safe[:, None]) * limit
        v = tl.load(
            v_ptr + column[:, None].to(tl.int64) * width + (step * BN + place)[None, :], mask=(column < D)[:, None],
            other=0.0,
        )  # fmt: skip
        if PV_INT8:
            codes = (p + 0.5).to(tl.int8)
            weight = tl.sum(codes.to(tl.int32), 1).to(tl.float32)
            product = tl.dot(codes, tl.trans(v)).to(tl.float32)
        elif NATIVE:
            weight = tl.sum(p, 1)
            product = tl.dot(p.to(tl.float8e4nv), tl.trans(v))
        else:
            weight = tl.sum(p, 1)
            product = tl.dot(p.to(tl.float16), tl.trans(decode_e4m3(v)))
        grown = tl.maximum(largest, block)
        reference = tl.where(grown == float("-inf"), 0.0, grown)
        rescale, share = tl.math.exp2(largest - reference), tl.math.exp2(block - reference)
        total = total * rescale + weight * share
        share = share * tl.load(v_scale_ptr + step * BN // 128)
        out = out * rescale[:, None] + product * share[:, None]
        largest = grown
    return out, largest, total


# A length of 1 that the compiler knows makes constant weights, for which ptxas 12.9 may take any register: see
# `attention_quantize/triton.py`.
@triton.jit(do_not_specialize=["skv", "blocks"])
def _kernel(
    q_ptr, q_scale_ptr, q_shift_ptr, k_ptr, k_scale_ptr, v_ptr, v_scale_ptr, v_mean_ptr, matrix_ptr, sinks_ptr,
    range_ptr, cu_q_ptr, cu_k_ptr, out_ptr, lse_ptr, heads_q, heads_kv, sq, skv, blocks, sequences, left, right,
    scale, softcap, unit, D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    QK_INT8: tl.constexpr, PV_INT8: tl.constexpr, NATIVE: tl.constexpr, SOFTCAP: tl.constexpr, SINKS: tl.constexpr,
    RANGE: tl.constexpr, PACKED: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    tile, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row, row_end, start, end = (tl.num_programs(0) - 1 - tile) * BM, sq, 0, skv
    place = skv - sq
    if PACKED:
        # Tiles do not reach over the end of a sequence; the programs beyond the last tile are empty.
        row, row_end, start, end, place = sq, sq, 0, 0, 0
        before = 0
        for sequence in range(sequences):
            begin, stop = tl.load(cu_q_ptr + sequence), tl.load(cu_q_ptr + sequence + 1)
            count = (stop - begin + BM - 1) // BM
            if (tile >= before) & (tile < before + count):
                row, row_end = begin + (tile - before) * BM, stop
                start, end = tl.load(cu_k_ptr + sequence), tl.load(cu_k_ptr + sequence + 1)
                place = end - stop
            before += count
    if RANGE:
        start = tl.maximum(tl.load(range_ptr + 2 * batch), 0)
        end = tl.minimum(tl.load(range_ptr + 2 * batch + 1), skv)
    query = row + tl.arange(0, BM)
    inside, bottom = query < row_end, tl.minimum(row + BM, row_end) - 1
    low, high = query * 0 + start, query * 0 + end
    first_low, last_low, first_high, last_high = start, start, end, end
    if left >= 0:
        low = tl.maximum(start, query + place - left)
        first_low, last_low = tl.maximum(start, row + place - left), tl.maximum(start, bottom + place - left)
    if right >= 0:
        high = tl.minimum(end, query + place + right + 1)
        first_high = tl.minimum(end, row + place + right + 1)
        last_high = tl.minimum(end, bottom + place + right + 1)
    # Steps that some row sees, and of them those that all rows see whole.
    begin, stop = first_low // BN, (tl.maximum(last_high, 0) + BN - 1) // BN
    stop = tl.where(row < row_end, tl.maximum(stop, begin), begin)
    whole_begin = tl.minimum(tl.maximum((last_low + BN - 1) // BN, begin), stop)
    whole_stop = tl.minimum(tl.maximum(tl.maximum(first_high, 0) // BN, whole_begin), stop)

    pair = batch.to(tl.int64) * heads_q + head
    kv = batch.to(tl.int64) * heads_kv + head // (heads_q // heads_kv)
    column = tl.arange(0, DP)
    codes = tl.load(
        q_ptr + (pair * sq + query)[:, None] * D + column[None, :], mask=inside[:, None] & (column < D)[None, :],
        other=0.0,
    )  # fmt: skip
    q = _operand(codes, QK_INT8, NATIVE)
    to_power = scale * 1.4426950408889634
    if SOFTCAP:
        to_power = to_power * 2.0 / softcap
    factor = tl.load(q_scale_ptr + pair * sq + query, mask=inside, other=1.0) * to_power
    shift = tl.load(q_shift_ptr + pair * sq + query, mask=inside, other=0.0)
    out = tl.zeros((BM, DP), tl.float32)
    largest = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    k_ptr, v_ptr, width = k_ptr + kv * skv * D, v_ptr + kv * D * (blocks * 128), blocks * 128
    k_scale_ptr, v_scale_ptr = k_scale_ptr + kv * blocks * 4, v_scale_ptr + kv * blocks
    out, largest, total = _span(
        out, largest, total, q, factor, shift * to_power, low, high, k_ptr, k_scale_ptr, v_ptr, v_scale_ptr,
        begin, whole_begin, skv, width, softcap, D, DP, BN, QK_INT8, PV_INT8, NATIVE, SOFTCAP, True, 1,
    )  # fmt: skip
    out, largest, total = _span(
        out, largest, total, q, factor, shift * to_power, low, high, k_ptr, k_scale_ptr, v_ptr, v_scale_ptr,
        whole_begin, whole_stop, skv, width, softcap, D, DP, BN, QK_INT8, PV_INT8, NATIVE, SOFTCAP, False, STAGES,
    )  # fmt: skip
    out, largest, total = _span(
        out, largest, total, q, factor, shift * to_power, low, high, k_ptr, k_scale_ptr, v_ptr, v_scale_ptr,
        whole_stop, stop, skv, width, softcap, D, DP, BN, QK_INT8, PV_INT8, NATIVE, SOFTCAP, True, 1,
    )  # fmt: skip

    full: tl.constexpr = 127.0 if PV_INT8 else 256.0
    some = total > 0.0
    lse = (largest + tl.math.log2(tl.where(some, total, 1.0) / full)) * 0.6931471805599453
    if not SOFTCAP:
        lse += shift * scale
    lse = tl.where(some, lse, float("-inf"))
    tl.store(lse_ptr + pair * sq + query, lse, mask=inside)
    share = tl.where(some, 1.0, 0.0)
    if SINKS:
        sink = tl.load(sinks_ptr + head).to(tl.float32)
        share = tl.where(some, 1.0 / (1.0 + tl.exp(sink - lse)), 0.0)
    out = out * (share / tl.where(some, total, 1.0))[:, None]
    # Turned back in float16, each row scaled by its largest element first.
    peak = tl.maximum(tl.max(tl.abs(out), 1), 1e-30)
    square = (column < D)[:, None] & (column < D)[None, :]
    matrix = tl.load(matrix_ptr + column[None, :] * D + column[:, None], mask=square, other=0.0)
    out = tl.dot((out / peak[:, None]).to(tl.float16), matrix) * (peak * unit)[:, None]
    mean = tl.load(v_mean_ptr + kv * D + column, mask=column < D, other=0.0)
    out += share[:, None] * mean[None, :]
    at = ((batch.to(tl.int64) * sq + query) * heads_q + head)[:, None] * D + column[None, :]
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=inside[:, None] & (column < D)[None, :])
