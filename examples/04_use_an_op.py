"""Use an op of quantlab_kernels by itself: an FP8 matrix product with 1x128 by 128x128 scales, on plain tensors.

To be seen: the op computes the product of the *dequantized* operands, and every element lies within its bound: float32
sums on a CPU, on a GPU 128 products at a time in the FP8 tensor cores and float32 from there on. What is left is the
error of rounding the operands to FP8. FP8 is a floating-point format, so one channel that is 100 times larger than the
rest costs nothing even with one scale per token; at 100,000 times the other channels fall out of its range, and only a
scale per 128 channels keeps most of them.

Runs on a CPU, and on a GPU where there is one. Needs torch alone.

    python examples/04_use_an_op.py
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from quantlab_kernels import gemm_fp8_block, gemm_fp8_row, quantize_fp8_block, quantize_fp8_group, quantize_fp8_token
from quantlab_kernels.common.bounds import gemm_bound, worst

M, N, K = 64, 384, 1024


def operands(outlier: float, device: str) -> tuple[Tensor, Tensor]:
    """Activations x [M, K] with one channel `outlier` times larger than the rest, and weights w [N, K]; bf16."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(M, K, generator=generator)
    w = torch.randn(N, K, generator=generator) / K**0.5
    x[:, 77] *= outlier
    w[:, 77] = 0  # so that the large channel does nothing but take the range of the scale it shares with others
    return x.to(device, torch.bfloat16), w.to(device, torch.bfloat16)


def dequantized(codes: Tensor, scale: Tensor, rows: int) -> Tensor:
    """Scale times code in float64; one scale per `rows` x 128 values."""
    return codes.double() * scale.double().repeat_interleave(rows, 0).repeat_interleave(128, 1)


def relative(error: Tensor, exact: Tensor) -> float:
    return (error.norm() / exact.norm()).item()


def check_against_float64(x: Tensor, w: Tensor) -> None:
    """The op's result lies within its error bound, element by element."""
    a, a_scale = quantize_fp8_group(x)  # [M, K] float8_e4m3fn, [M, K/128] float32
    b, b_scale = quantize_fp8_block(w)  # [N, K] float8_e4m3fn, [N/128, K/128] float32
    out = gemm_fp8_block(a, a_scale, b, b_scale, out_dtype=torch.float32)
    print(f"{tuple(a.shape)} {a.dtype} x {tuple(b.shape)} {b.dtype} -> {tuple(out.shape)} {out.dtype} on {out.device}")

    a64, b64 = dequantized(a, a_scale, 1), dequantized(b, b_scale, 128)
    exact = a64 @ b64.t()
    bound = gemm_bound(exact, a64.abs() @ b64.abs().t(), K, out.dtype, "fp8" if out.is_cuda else "float32")
    nearest = worst(out, exact, bound)
    print(f"against float64: relative error {relative(out.double() - exact, exact):.1e}; {nearest}")
    assert nearest.ratio <= 1


def main(argv: list[str] | None = None) -> int:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    check_against_float64(*operands(1, device))

    print("error against the unquantized product, one channel of x being so many times larger than the others:")
    for outlier in (1, 100, 10_000, 100_000):
        x, w = operands(outlier, device)
        original = x.double() @ w.double().t()
        by_group = gemm_fp8_block(*quantize_fp8_group(x), *quantize_fp8_block(w), out_dtype=torch.float32)
        by_token = gemm_fp8_row(*quantize_fp8_token(x), *quantize_fp8_token(w), out_dtype=torch.float32)
        errors = [relative(out.double() - original, original) for out in (by_group, by_token)]
        print(
            "  {:7,} times: {:6.2%} with a scale per 128 channels, {:6.2%} with one per token".format(outlier, *errors)
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
