"""The definition, and the CPU implementation: attention of the dequantized operands.

Which keys a query sees is one interval for every mask that is supported: `visible`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantlab_kernels.attention_quantize import reference as quantization
from quantlab_kernels.attention_quantize.op import Quantized


@dataclass(frozen=True)
class Attributes:
    """What attention does besides its operands; see `op.attention_prefill`. left, right: -1 is no limit."""

    scale: float
    left: int = -1
    right: int = -1
    softcap: float = 0.0


def visible(
    sq: int,
    skv: int,
    left: int,
    right: int,
    key_range: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(low, high), each [B or 1, Sq] int64: query i sees keys low .. high - 1, none where low >= high.

    Query i of a sequence stands at key i + (keys - queries) of it and sees keys ``left`` before and ``right`` after.
    """
    device = next((t.device for t in (key_range, cu_seqlens_q) if t is not None), torch.device("cpu"))
    query = torch.arange(sq, device=device)
    if cu_seqlens_q is not None and cu_seqlens_k is not None:
        sequence = torch.searchsorted(cu_seqlens_q[1:].contiguous(), query, right=True)
        inside = sequence < cu_seqlens_q.numel() - 1
        sequence = sequence.clamp(max=cu_seqlens_q.numel() - 2)
        first, last = cu_seqlens_k[sequence].long(), cu_seqlens_k[sequence + 1].long()
        last = torch.where(inside, last, first)
        place = query - cu_seqlens_q[sequence + 1] + last
        first, last, place = first[None], last[None], place[None]
    else:
        first = torch.zeros(1, 1, dtype=torch.int64, device=device)
        last = torch.full((1, 1), skv, device=device)
        place = (query + skv - sq)[None]
        if key_range is not None:
            first, last = key_range[:, :1].long().clamp(min=0), key_range[:, 1:].long().clamp(max=skv)
    low = first if left < 0 else torch.maximum(first, place - left)
    high = last if right < 0 else torch.minimum(last, place + right + 1)
    return torch.broadcast_tensors(low + 0 * place, high + 0 * place)


def attend(
    operands: Quantized, attributes: Attributes, low: Tensor, high: Tensor, sinks: Tensor | None,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """out [B, Sq, Hq, D] and lse [B, Hq, Sq] in `dtype`; `low`, `high` from `visible`. A head at a time."""
    batch, heads, sq, d = operands.q.shape
    skv, groups = operands.k.shape[2], heads // operands.k.shape[1]
    out = torch.zeros(batch, sq, heads, d, dtype=dtype, device=operands.q.device)
    lse = torch.full((batch, heads, sq), -torch.inf, dtype=dtype, device=operands.q.device)
    if sq == 0 or skv == 0:
        return out, lse
    q = quantization.dequantize_queries(operands.q, operands.q_scale, dtype)
    k = quantization.dequantize_keys(operands.k, operands.k_scale, dtype)
    v = quantization.dequantize_values(operands.v, operands.v_scale, skv, dtype)
    v = v + operands.v_mean.to(dtype)[:, :, None]
    key = torch.arange(skv, device=q.device)
    for b in range(batch):
        bounds = low[b % low.shape[0], :, None], high[b % high.shape[0], :, None]
        seen = (key >= bounds[0]) & (key < bounds[1])
        for h in range(heads):
            scores = q[b, h] @ k[b, h // groups].T + operands.q_shift[b, h, :, None].to(dtype)
            sink = None if sinks is None else sinks[h].to(dtype)
            out[b, :, h], lse[b, h] = _softmax_product(scores, seen, v[b, h // groups], attributes, sink)
    return out, lse


def _softmax_product(
    scores: Tensor, seen: Tensor, v: Tensor, attributes: Attributes, sink: Tensor | None
) -> tuple[Tensor, Tensor]:
    scores = scores * attributes.scale
    if attributes.softcap > 0:
        scores = attributes.softcap * torch.tanh(scores / attributes.softcap)
    scores = scores.masked_fill(~seen, -torch.inf)
    lse = scores.logsumexp(1)
    total = lse if sink is None else torch.logaddexp(lse, sink)
    weights = torch.exp(scores - total[:, None]).nan_to_num(0.0)
    return weights @ v, lse
