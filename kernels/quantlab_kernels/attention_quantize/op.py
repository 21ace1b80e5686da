"""The op: checks (which are also its fake), the CPU way, and dispatch to a GPU backend."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from quantlab_kernels.attention_quantize import reference
from quantlab_kernels.attention_quantize.reference import Rotary
from quantlab_kernels.common.backends import Backends
from quantlab_kernels.common.hardware import gpu_of
from quantlab_kernels.common.ops import define

Format = Literal["int8", "fp8"]

BACKENDS = Backends("attention_quantize", ("sm90", "triton", "eager"), last_resort="eager")
HEAD_DIMS = (64, 80, 96, 128, 192, 256)
CODES: dict[str, torch.dtype] = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
_INPUTS = (torch.bfloat16, torch.float16, torch.float32)


class Quantized(NamedTuple):
    """Operands of `attention_prefill`. NB = ceil(Skv / 128); codes are int8 or float8_e4m3fn, the rest float32.

    q        [B, Hq, Sq, D] codes of the rotated queries       q_scale  [B, Hq, Sq]
    q_shift  [B, Hq, Sq] query times mean key, which all scores of the row lack
    k        [B, Hkv, Skv, D] codes, centred and rotated       k_scale  [B, Hkv, NB, 4], key i has scale i // 2 % 4
    v        [B, Hkv, D, NB * 128] codes, centred and rotated, keys in `reference.key_order`, 0 beyond Skv
    v_scale  [B, Hkv, NB]                                      v_mean   [B, Hkv, D], not rotated
    """

    q: Tensor
    q_scale: Tensor
    q_shift: Tensor
    k: Tensor
    k_scale: Tensor
    v: Tensor
    v_scale: Tensor
    v_mean: Tensor


@dataclass(frozen=True)
class Problem:
    """Shapes and dtypes of one call; `rotary`: channels that a rotary embedding turns."""

    batch: int
    heads_q: int
    heads_kv: int
    sq: int
    skv: int
    d: int
    dtype: torch.dtype = torch.bfloat16
    qk: Format = "int8"
    pv: Format = "int8"
    sm: int = 90
    rotary: int = 0
    interleaved: bool = False

    @property
    def bytes(self) -> int:
        """Least traffic: all inputs read once, all codes written once."""
        elements = self.batch * self.d * (self.heads_q * self.sq + 2 * self.heads_kv * self.skv)
        return elements * (self.dtype.itemsize + 1) + 2 * self.sq * self.rotary * self.dtype.itemsize


def attention_quantize(
    q: Tensor, k: Tensor, v: Tensor, *, key_range: Tensor | None = None, qk: Format = "int8", pv: Format = "int8",
    cos: Tensor | None = None, sin: Tensor | None = None, interleaved: bool = False,
) -> Quantized:  # fmt: skip
    """Queries, keys and values in 8 bits, as `attention_prefill` reads them.

    q          [B, Hq, Sq, D] bfloat16, float16 or float32, any strides with unit stride along D
    k, v       [B, Hkv, Skv, D] of the same dtype; Hq a multiple of Hkv; D one of 64, 80, 96, 128, 192, 256
    key_range  [B, 2] int32: keys start .. end - 1 of each sequence are real, the rest padding whose content does not
               matter (NaN included)
    qk, pv     codes of queries and keys, and of values: "int8", or "fp8" (E4M3)
    cos, sin   [B or 1, S, R] of the same dtype, R even and at most D: the rotary embedding that queries and keys, as
               many of both, are still to get in their first R channels. Without them q and k have had theirs
    interleaved
               channels 2 i and 2 i + 1 turn together (GPT-J), else i and i + R / 2 (GPT-NeoX)

    With cos and sin the codes are those of `rope`'s result, rounded to 16 bits as there. Raises RuntimeError for other
    shapes and dtypes.
    """
    return Quantized(*_OP(q, k, v, key_range, CODES[qk], CODES[pv], cos, sin, interleaved))


def _rotary(q: Tensor, k: Tensor, cos: Tensor | None, sin: Tensor | None, interleaved: bool) -> Rotary | None:
    """Refuses cosines and sines that do not fit."""
    if cos is None or sin is None:
        torch._check(
            cos is None and sin is None, lambda: "attention_quantize: cos and sin go together, one of them is missing"
        )
        return None
    torch._check(
        cos.dtype == q.dtype and sin.dtype == q.dtype and cos.dim() == 3 and cos.shape == sin.shape
        and (cos.shape[0] == 1 or cos.shape[0] == q.shape[0]) and cos.shape[1] == q.shape[2]
        and q.shape[2] == k.shape[2] and cos.shape[2] <= q.shape[3] and cos.shape[2] % 2 == 0 and cos.shape[2] > 0,
        lambda: (
            f"attention_quantize: cos {cos.dtype} {tuple(cos.shape)}, sin {sin.dtype} {tuple(sin.shape)} do not fit q "
            f"{q.dtype} {tuple(q.shape)} and k {tuple(k.shape)}; needs [B or 1, S, R] of the same dtype, R even, and "
            "as many queries as keys"
        ),
    )  # fmt: skip
    return Rotary(cos, sin, interleaved)


def check(q: Tensor, k: Tensor, v: Tensor, key_range: Tensor | None) -> None:
    """Refuse what no backend takes. Shapes may be symbolic."""
    torch._check(
        q.dtype in _INPUTS and k.dtype == q.dtype and v.dtype == q.dtype,
        lambda: f"attention: q, k, v are {q.dtype}, {k.dtype}, {v.dtype}; needs one of bfloat16, float16, float32",
    )
    torch._check(
        q.dim() == 4 and k.dim() == 4 and v.dim() == 4,
        lambda: f"attention: q, k, v have {q.dim()}, {k.dim()}, {v.dim()} dimensions; needs [batch, heads, tokens, D]",
    )
    torch._check(
        k.shape == v.shape and q.shape[0] == k.shape[0] and q.shape[3] == k.shape[3] and q.shape[1] % k.shape[1] == 0,
        lambda: (
            f"attention: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}; needs [B, Hq, Sq, D] and twice "
            "[B, Hkv, Skv, D], Hq a multiple of Hkv"
        ),
    )
    torch._check(q.shape[3] in HEAD_DIMS, lambda: f"attention: head dimension {q.shape[3]}, needs one of {HEAD_DIMS}")
    check_key_range(key_range, q.shape[0])


def check_key_range(key_range: Tensor | None, batch: int) -> None:
    """[B, 2] int32 or None."""
    if key_range is not None:
        torch._check(
            key_range.dtype == torch.int32 and key_range.dim() == 2 and key_range.shape[0] == batch
            and key_range.shape[1] == 2,
            lambda: f"attention: key_range {key_range.dtype} {tuple(key_range.shape)}, needs int32 [{batch}, 2]",
        )  # fmt: skip


def _fake(
    q: Tensor, k: Tensor, v: Tensor, key_range: Tensor | None, qk: torch.dtype, pv: torch.dtype,
    cos: Tensor | None = None, sin: Tensor | None = None, interleaved: bool = False,
) -> tuple[Tensor, ...]:  # fmt: skip
    check(q, k, v, key_range)
    _rotary(q, k, cos, sin, interleaved)
    (batch, heads_q, sq, d), (_, heads_kv, skv, _) = q.shape, k.shape
    blocks = (skv + reference.BLOCK - 1) // reference.BLOCK

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return q.new_empty(shape, dtype=dtype)

    return (
        empty(batch, heads_q, sq, d, dtype=qk), empty(batch, heads_q, sq), empty(batch, heads_q, sq),
        empty(batch, heads_kv, skv, d, dtype=qk), empty(batch, heads_kv, blocks, reference.GROUPS),
        empty(batch, heads_kv, d, blocks * reference.BLOCK, dtype=pv), empty(batch, heads_kv, blocks),
        empty(batch, heads_kv, d),
    )  # fmt: skip


def _cpu(
    q: Tensor, k: Tensor, v: Tensor, key_range: Tensor | None, qk: torch.dtype, pv: torch.dtype,
    cos: Tensor | None = None, sin: Tensor | None = None, interleaved: bool = False,
) -> tuple[Tensor, ...]:  # fmt: skip
    check(q, k, v, key_range)
    return reference.quantize(q, k, v, key_range, qk, pv, _rotary(q, k, cos, sin, interleaved))


def _cuda(
    q: Tensor, k: Tensor, v: Tensor, key_range: Tensor | None, qk: torch.dtype, pv: torch.dtype,
    cos: Tensor | None = None, sin: Tensor | None = None, interleaved: bool = False,
) -> tuple[Tensor, ...]:  # fmt: skip
    out = _fake(q, k, v, key_range, qk, pv, cos, sin, interleaved)
    (batch, heads_q, sq, d), (_, heads_kv, skv, _) = q.shape, k.shape
    names: dict[torch.dtype, Format] = {torch.int8: "int8", torch.float8_e4m3fn: "fp8"}
    rotary = _rotary(q, k, cos, sin, interleaved)
    turning = 0 if cos is None else cos.shape[2]
    problem = Problem(
        batch, heads_q, heads_kv, sq, skv, d, q.dtype, names[qk], names[pv], gpu_of(q).sm, turning, interleaved
    )
    backend = BACKENDS.select(problem)
    with torch.cuda.device(q.device):
        backend.launch(q, k, v, key_range, out, rotary)
    return out


_OP = define(
    "attention_quantize(Tensor q, Tensor k, Tensor v, Tensor? key_range, ScalarType qk, ScalarType pv,"
    " Tensor? cos=None, Tensor? sin=None, bool interleaved=False)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_fake, cpu=_cpu, cuda=_cuda,
)  # fmt: skip
