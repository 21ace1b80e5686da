"""The ops: checks (which are also their fakes), the CPU way, and dispatch to a GPU backend."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantlab_kernels.attention_prefill import reference
from quantlab_kernels.attention_prefill.reference import Attributes
from quantlab_kernels.attention_quantize.op import Format, Quantized, attention_quantize, check_key_range
from quantlab_kernels.attention_quantize.reference import BLOCK, GROUPS
from quantlab_kernels.common.backends import Backends
from quantlab_kernels.common.hardware import gpu_of
from quantlab_kernels.common.ops import define

BACKENDS = Backends("attention_prefill", ("sm90", "triton", "eager"), last_resort="eager")
_OUTPUTS = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Problem:
    """What a backend decides on. `packed`: several sequences in one; `softcap`, `sinks`: whether there are any."""

    batch: int
    heads_q: int
    heads_kv: int
    sq: int
    skv: int
    d: int
    causal: bool = False
    window: bool = False
    softcap: bool = False
    sinks: bool = False
    padded: bool = False
    packed: bool = False
    qk: torch.dtype = torch.int8
    pv: torch.dtype = torch.int8
    out_dtype: torch.dtype = torch.bfloat16
    sm: int = 90

    @property
    def flops(self) -> int:
        """Of both products; a causal mask halves them where queries and keys are as many."""
        pairs = self.sq * self.skv if not self.causal else self.sq * self.skv - self.sq * (self.sq - 1) // 2
        return 4 * self.batch * self.heads_q * self.d * pairs


def attention_8bit(
    q: Tensor, k: Tensor, v: Tensor, *,
    scale: float | None = None, causal: bool = False, window: int | tuple[int, int] | None = None,
    softcap: float = 0.0, sinks: Tensor | None = None, key_range: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None, cu_seqlens_k: Tensor | None = None, qk: Format = "int8", pv: Format = "int8",
    cos: Tensor | None = None, sin: Tensor | None = None, interleaved: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`attention_quantize` and `attention_prefill`: 16-bit q, k, v in, out [B, Sq, Hq, D] in their dtype and lse."""
    operands = attention_quantize(
        q, k, v, key_range=key_range, qk=qk, pv=pv, cos=cos, sin=sin, interleaved=interleaved
    )  # fmt: skip
    return attention_prefill(
        operands, scale=scale, causal=causal, window=window, softcap=softcap, sinks=sinks, key_range=key_range,
        cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, out_dtype=q.dtype,
    )  # fmt: skip


def attention_prefill(
    operands: Quantized, *,
    scale: float | None = None, causal: bool = False, window: int | tuple[int, int] | None = None,
    softcap: float = 0.0, sinks: Tensor | None = None, key_range: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None, cu_seqlens_k: Tensor | None = None, out_dtype: torch.dtype = torch.bfloat16,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``softmax(scale * q k^T) v`` of what `attention_quantize` wrote.

    scale       1 / sqrt(D) by default
    causal      query i stands at key i + Skv - Sq (of its sequence) and sees no key after that
    window      (left, right): a query sees no more than so many keys before and after its own place, -1 is no limit;
                an int w sees w keys, its own included: (w - 1, 0) when causal, (w - 1, w - 1) when not
    softcap     above 0: scores become ``softcap * tanh(score / softcap)``
    sinks       [Hq] float: a further score per head that takes its share of the weights and has no value
    key_range   [B, 2] int32: only keys start .. end - 1 are seen
    cu_seqlens_q, cu_seqlens_k
                [n + 1] int32, both or none, B = 1: sequences lie one after the other, each sees only itself
    out_dtype   bfloat16, float16 or float32

    Returns out [B, Sq, Hq, D] and lse [B, Hq, Sq] float32, log of the sum of exponentials of the scores that a query
    sees, its sink not among them. A query that sees no key gets 0 and -inf. Raises RuntimeError for operands that
    do not fit together.
    """
    left, right = limits(causal, window)
    default = operands.q.shape[3] ** -0.5
    return _OP(
        *operands, default if scale is None else scale, left, right, softcap, sinks, key_range, cu_seqlens_q,
        cu_seqlens_k, out_dtype,
    )  # fmt: skip


def limits(causal: bool, window: int | tuple[int, int] | None) -> tuple[int, int]:
    """(left, right) of a mask, -1 for no limit."""
    if window is None:
        return -1, 0 if causal else -1
    if isinstance(window, int):
        if window < 1:
            raise ValueError(f"attention: window = {window}, needs at least 1 key, or None for no window")
        window = (window - 1, window - 1)
    left, right = window
    return left, (min(right, 0) if right >= 0 else 0) if causal else right


def _check_operands(operands: Quantized) -> None:
    q, k, v = operands.q, operands.k, operands.v
    codes = (torch.int8, torch.float8_e4m3fn)
    torch._check(
        q.dtype in codes and k.dtype == q.dtype and v.dtype in codes,
        lambda: (
            f"attention_prefill: codes are {q.dtype}, {k.dtype}, {v.dtype}; needs int8 or float8_e4m3fn, q and k "
            "alike: what attention_quantize writes"
        ),
    )
    (batch, heads_q, sq, d), (_, heads_kv, skv, _) = q.shape, k.shape
    blocks = (skv + BLOCK - 1) // BLOCK
    expected = (
        (batch, heads_q, sq, d), (batch, heads_q, sq), (batch, heads_q, sq),
        (batch, heads_kv, skv, d), (batch, heads_kv, blocks, GROUPS),
        (batch, heads_kv, d, blocks * BLOCK), (batch, heads_kv, blocks), (batch, heads_kv, d),
    )  # fmt: skip
    for name, tensor, shape in zip(Quantized._fields, operands, expected, strict=True):
        torch._check(
            tuple(tensor.shape) == tuple(shape),
            lambda name=name, tensor=tensor, shape=shape: (
                f"attention_prefill: {name} {tuple(tensor.shape)}, needs {shape}: what attention_quantize writes"
            ),
        )


def _check(
    operands: Quantized, sinks: Tensor | None, key_range: Tensor | None, cu_q: Tensor | None, cu_k: Tensor | None,
    out_dtype: torch.dtype,
) -> None:  # fmt: skip
    _check_operands(operands)
    batch, heads = operands.q.shape[:2]
    torch._check(out_dtype in _OUTPUTS, lambda: f"attention_prefill: out_dtype {out_dtype}, needs one of {_OUTPUTS}")
    if sinks is not None:
        torch._check(
            tuple(sinks.shape) == (heads,) and sinks.dtype.is_floating_point,
            lambda: (
                f"attention_prefill: sinks {sinks.dtype} {tuple(sinks.shape)}, needs a float of each of {heads} heads"
            ),
        )
    check_key_range(key_range, batch)
    torch._check(
        (cu_q is None) == (cu_k is None) and (cu_q is None or (key_range is None and batch == 1)),
        lambda: "attention_prefill: packed sequences need cu_seqlens_q and cu_seqlens_k, batch 1 and no key_range",
    )
    if cu_q is not None and cu_k is not None:
        torch._check(
            cu_q.dtype == torch.int32 and cu_k.dtype == torch.int32 and cu_q.dim() == 1 and cu_k.shape == cu_q.shape,
            lambda: (
                f"attention_prefill: cu_seqlens {cu_q.dtype} {tuple(cu_q.shape)} and {cu_k.dtype} "
                f"{tuple(cu_k.shape)}, needs int32 [sequences + 1] twice"
            ),
        )


def _fake(
    q: Tensor, q_scale: Tensor, q_shift: Tensor, k: Tensor, k_scale: Tensor, v: Tensor, v_scale: Tensor,
    v_mean: Tensor, scale: float, left: int, right: int, softcap: float, sinks: Tensor | None,
    key_range: Tensor | None, cu_q: Tensor | None, cu_k: Tensor | None, out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    operands = Quantized(q, q_scale, q_shift, k, k_scale, v, v_scale, v_mean)
    _check(operands, sinks, key_range, cu_q, cu_k, out_dtype)
    batch, heads, sq, d = q.shape
    return q.new_empty((batch, sq, heads, d), dtype=out_dtype), q_scale.new_empty((batch, heads, sq))


def _cpu(
    q: Tensor, q_scale: Tensor, q_shift: Tensor, k: Tensor, k_scale: Tensor, v: Tensor, v_scale: Tensor,
    v_mean: Tensor, scale: float, left: int, right: int, softcap: float, sinks: Tensor | None,
    key_range: Tensor | None, cu_q: Tensor | None, cu_k: Tensor | None, out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    operands = Quantized(q, q_scale, q_shift, k, k_scale, v, v_scale, v_mean)
    _check(operands, sinks, key_range, cu_q, cu_k, out_dtype)
    low, high = reference.visible(q.shape[2], k.shape[2], left, right, key_range, cu_q, cu_k)
    attributes = Attributes(scale, left, right, softcap)
    out, lse = reference.attend(operands, attributes, low, high, sinks, torch.float32)
    return out.to(out_dtype), lse


def _cuda(
    q: Tensor, q_scale: Tensor, q_shift: Tensor, k: Tensor, k_scale: Tensor, v: Tensor, v_scale: Tensor,
    v_mean: Tensor, scale: float, left: int, right: int, softcap: float, sinks: Tensor | None,
    key_range: Tensor | None, cu_q: Tensor | None, cu_k: Tensor | None, out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    operands = Quantized(q, q_scale, q_shift, k, k_scale, v, v_scale, v_mean)
    _check(operands, sinks, key_range, cu_q, cu_k, out_dtype)
    (batch, heads_q, sq, d), (_, heads_kv, skv, _) = q.shape, k.shape
    out, lse = q.new_empty((batch, sq, heads_q, d), dtype=out_dtype), q_scale.new_empty((batch, heads_q, sq))
    if sq == 0 or skv == 0 or batch == 0:
        return out.zero_(), lse.fill_(-torch.inf)
    problem = Problem(
        batch, heads_q, heads_kv, sq, skv, d, right == 0, left >= 0 or right > 0, softcap > 0, sinks is not None,
        key_range is not None, cu_q is not None, q.dtype, v.dtype, out_dtype, gpu_of(q).sm,
    )  # fmt: skip
    backend = BACKENDS.select(problem)
    with torch.cuda.device(q.device):
        backend.launch(
            problem, operands, Attributes(scale, left, right, softcap), sinks, key_range, cu_q, cu_k, out, lse
        )
    return out, lse


_OP = define(
    "attention_prefill(Tensor q, Tensor q_scale, Tensor q_shift, Tensor k, Tensor k_scale, Tensor v, Tensor v_scale,"
    " Tensor v_mean, float scale, int left, int right, float softcap, Tensor? sinks, Tensor? key_range,"
    " Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, ScalarType out_dtype) -> (Tensor, Tensor)",
    fake=_fake, cpu=_cpu, cuda=_cuda,
)  # fmt: skip
