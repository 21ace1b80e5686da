"""``python -m quantlab_kernels.attention_prefill.errors``: error against float32 attention of the same inputs.

The distributions are those by which published kernels are compared: FlashAttention-3's (a normal one, and one element
in a thousand of deviation 10), a plain normal one, keys with a bias per channel, and long contexts whose values have a
mean.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from quantlab_kernels.attention_prefill.op import attention_8bit

Inputs = tuple[Tensor, Tensor, Tensor]
HEADS = 8  # of the short distributions
QUERIES = 256  # of the long contexts
LENGTHS = (4096, 32768, 131072)
TOKENS = 8192  # of the inputs with other distributions


class Error(NamedTuple):
    """inputs: the distribution; operands: "bf16", or the codes of Q and K and those of V; relative: to the result."""

    inputs: str
    operands: str
    rms: float
    relative: float


def _normal(heads: int, tokens: int, device: str) -> Tensor:
    return torch.randn(1, heads, tokens, 128, device=device)


def _outliers(tokens: int, device: str) -> Inputs:
    """FlashAttention-3, section 4.3."""
    q, k, v = (_normal(HEADS, tokens, device) for _ in range(3))
    q, k, v = (x + 10 * torch.randn_like(x) * (torch.rand_like(x) < 0.001) for x in (q, k, v))
    return q, k, v


def _biased(tokens: int, device: str, bias: float) -> Inputs:
    q, k, v = (_normal(HEADS, tokens, device) for _ in range(3))
    return q, k + bias * _normal(HEADS, 1, device), v


def _long(length: int, device: str, mean: float) -> Inputs:
    return _normal(1, QUERIES, device), _normal(1, length, device), _normal(1, length, device) + mean


def distributions(tokens: int, lengths: Sequence[int], device: str) -> dict[str, Callable[[], Inputs]]:
    """By name what draws float32 q, k, v."""
    return {
        f"outliers {tokens}": partial(_outliers, tokens, device),
        f"normal {tokens}": partial(_biased, tokens, device, 0),
        f"keys with a bias {tokens}": partial(_biased, tokens, device, 8),
        **{
            f"{length} keys, values of mean {mean}": partial(_long, length, device, mean)
            for length in lengths
            for mean in (0, 1)
        },
    }


def _exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """float32, in pieces that fit."""
    pieces = [F.scaled_dot_product_attention(x, k, v) for x in q.split(256, 2)]
    return torch.cat(pieces, 2)


def report(
    device: str = "cuda", tokens: int = TOKENS, lengths: Sequence[int] = LENGTHS, only: str = ""
) -> Iterator[Error]:
    """bf16, INT8, INT8 with E4M3 values, and E4M3 on each distribution whose name contains `only`."""
    for name, draw in distributions(tokens, lengths, device).items():
        if only not in name:
            continue
        torch.manual_seed(0)  # the same inputs whichever others there are
        q, k, v = (x.to(torch.bfloat16) for x in draw())
        exact = _exact(q.float(), k.float(), v.float())
        results = {"bf16": F.scaled_dot_product_attention(q, k, v)}
        for qk, pv in (("int8", "int8"), ("int8", "fp8"), ("fp8", "fp8")):
            results[f"{qk} {pv}"] = attention_8bit(q, k, v, qk=qk, pv=pv)[0].transpose(1, 2)  # type: ignore[arg-type]
        for operands, out in results.items():
            rms = (out.float() - exact).square().mean().sqrt()
            yield Error(name, operands, float(rms), float(rms / exact.square().mean().sqrt()))


if __name__ == "__main__":
    for error in report():
        print(f"{error.inputs:32} {error.operands:10} RMSE {error.rms:.2e}, relative {error.relative:.2%}", flush=True)
