"""The op: checks (which are also its fake), the CPU way, and dispatch to a GPU backend."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantlab_kernels.common.backends import Backends
from quantlab_kernels.common.hardware import device_of, gpu_of
from quantlab_kernels.common.ops import define, require
from quantlab_kernels.rope import reference

BACKENDS = Backends("rope", ("triton", "eager"), last_resort="eager")
_INPUTS = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Problem:
    """`tokens` (of all sequences) of `heads` (queries' and keys') of d channels, the first r of which turn."""

    tokens: int
    heads: int
    d: int
    r: int
    dtype: torch.dtype = torch.bfloat16
    sm: int = 90

    @property
    def bytes(self) -> int:
        """Least traffic: queries and keys read and written once, cosines and sines read once."""
        return self.dtype.itemsize * self.tokens * (2 * self.heads * self.d + 2 * self.r)


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys turned by their positions: ``x * cos + rotate_half(x) * sin``.

    q         [B, Hq, S, D]   bfloat16, float16 or float32; any strides
    k         [B, Hkv, S, D]  of the same dtype
    cos, sin  [B or 1, S, R]  of the same dtype, R even and at most D; channels from R on pass through

    Returns both in new tensors of the same shapes, whose memory is [B, S, H, D]. In 16 bits both products and the sum
    are rounded, as the same formula in torch does it: results are equal bit for bit. Raises RuntimeError for operands
    that do not fit together.
    """
    return _OP(q, k, cos, sin)


def check(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Refuse what no backend takes. Shapes may be symbolic."""
    require(
        q.dtype in _INPUTS and k.dtype == q.dtype and cos.dtype == q.dtype and sin.dtype == q.dtype,
        lambda: f"rope: q, k, cos, sin are {q.dtype}, {k.dtype}, {cos.dtype}, {sin.dtype}; needs one float dtype",
    )
    require(
        q.dim() == 4 and k.dim() == 4 and q.shape[0] == k.shape[0] and q.shape[2:] == k.shape[2:],
        lambda: f"rope: q {tuple(q.shape)}, k {tuple(k.shape)}; needs [B, Hq, S, D] and [B, Hkv, S, D]",
    )
    require(
        cos.dim() == 3 and cos.shape == sin.shape and (cos.shape[0] == 1 or cos.shape[0] == q.shape[0])
        and cos.shape[1] == q.shape[2] and cos.shape[2] <= q.shape[3] and cos.shape[2] % 2 == 0,
        lambda: f"rope: cos {tuple(cos.shape)}, sin {tuple(sin.shape)} do not fit q {tuple(q.shape)}; needs [B, S, R]",
    )  # fmt: skip


def _empty(x: Tensor) -> Tensor:
    batch, heads, length, d = x.shape
    return x.new_empty((batch, length, heads, d)).transpose(1, 2)


def _fake(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    check(q, k, cos, sin)
    return _empty(q), _empty(k)


def _cpu(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    q_out, k_out = _fake(q, k, cos, sin)
    return q_out.copy_(reference.rotate(q, cos, sin)), k_out.copy_(reference.rotate(k, cos, sin))


def _cuda(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    q_out, k_out = _fake(q, k, cos, sin)
    if q.numel() == 0:
        return q_out, k_out
    batch, heads, length, d = q.shape
    problem = Problem(batch * length, heads + k.shape[1], d, cos.shape[2], q.dtype, gpu_of(q).sm)
    backend = BACKENDS.select(problem)
    with device_of(q):
        backend.launch(problem, q, k, cos, sin, q_out, k_out, backend.config(problem))
    return q_out, k_out


_OP = define("rope(Tensor q, Tensor k, Tensor cos, Tensor sin) -> (Tensor, Tensor)", fake=_fake, cpu=_cpu, cuda=_cuda)
