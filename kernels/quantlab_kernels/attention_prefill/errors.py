"""``python -m quantlab_kernels.attention_prefill.errors``: error against float32 attention of the same inputs.

The distributions are those by which published kernels are compared: FlashAttention-3's (a normal one, and one element
in a thousand of deviation 10), a plain normal one, keys with a bias per channel, and long contexts whose values have a
mean.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from quantlab_kernels.attention_prefill.op import attention_8bit


def _normal(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda")


def outliers(heads: int, sq: int, skv: int) -> tuple[Tensor, Tensor, Tensor]:
    """FlashAttention-3, section 4.3."""

    def draw(tokens: int) -> Tensor:
        x = _normal(1, heads, tokens, 128)
        return x + 10 * torch.randn_like(x) * (torch.rand_like(x) < 0.001)

    return draw(sq), draw(skv), draw(skv)


def normal(heads: int, sq: int, skv: int, mean: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    return _normal(1, heads, sq, 128), _normal(1, heads, skv, 128), _normal(1, heads, skv, 128) + mean


def biased_keys(heads: int, sq: int, skv: int) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = normal(heads, sq, skv)
    return q, k + 8 * _normal(1, heads, 1, 128), v


def _exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """float32, in pieces that fit."""
    pieces = [F.scaled_dot_product_attention(x, k, v) for x in q.split(256, 2)]
    return torch.cat(pieces, 2)


def _error(out: Tensor, exact: Tensor) -> tuple[float, float]:
    """Root mean square, and relative to the result."""
    error = (out.float() - exact).square().mean().sqrt()
    return float(error), float(error / exact.square().mean().sqrt())


def report() -> Iterator[str]:
    """A line per distribution: RMSE / relative error of bf16, INT8 and E4M3."""
    torch.manual_seed(0)
    cases: list[tuple[str, tuple[Tensor, Tensor, Tensor]]] = [
        ("outliers 8x8k", outliers(8, 8192, 8192)),
        ("normal 8x8k", normal(8, 8192, 8192)),
        ("biased keys 8x8k", biased_keys(8, 8192, 8192)),
    ]
    cases += [
        (f"{length // 1024}k, mean of V {mean:g}", normal(1, 256, length, mean))
        for length in (4096, 32768, 131072)
        for mean in (0.0, 1.0)
    ]
    for name, inputs in cases:
        q, k, v = (x.to(torch.bfloat16) for x in inputs)
        exact = _exact(q.float(), k.float(), v.float())
        results = {"bf16": F.scaled_dot_product_attention(q, k, v)}
        for qk, pv in (("int8", "int8"), ("int8", "fp8"), ("fp8", "fp8")):
            results[f"{qk} {pv}"] = attention_8bit(q, k, v, qk=qk, pv=pv)[0].transpose(1, 2)  # type: ignore[arg-type]
        errors = {label: _error(out, exact) for label, out in results.items()}
        yield f"{name:20}" + "".join(f"  {label}: {rms:.2e} / {rel:.2%}" for label, (rms, rel) in errors.items())


if __name__ == "__main__":
    for line in report():
        print(line, flush=True)
