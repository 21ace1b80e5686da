"""Small calls of the rooms under a checker: ``compute-sanitizer --tool racecheck python tools/sanitize.py [ROOM ...]``.

Shapes are ragged and small, since the sanitizer runs each instruction through a checker. Results are compared with the
same call on the CPU, so that a kernel which does nothing does not pass. `make sanitize` runs memcheck and racecheck.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable

import torch
from torch import Tensor

import quantlab_kernels as ql
from quantlab_kernels.common.gemm import as_group_scale
from quantlab_kernels.common.latent import LatentFormat
from quantlab_kernels.moe_route.op import Rule
from quantlab_kernels.packing import pack_int4

ROWS = (1, 17, 70, 200)  # by way of the configurations for few, some and many tokens
N, K = 264, 512
DEVICE = "cuda"


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.bfloat16)


def fp8_block(m: int) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    return ql.gemm_fp8_block, (*ql.quantize_fp8_group(randn(m, K)), *ql.quantize_fp8_block(randn(N, K)))


def fp8_row(m: int) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    return ql.gemm_fp8_row, (*ql.quantize_fp8_token(randn(m, K)), *ql.quantize_fp8_token(randn(N, K)))


def fp8_grouped(m: int) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    codes, scale = ql.quantize_fp8_block(randn(3 * 256, K))
    counts = torch.tensor([m // 3, 0, m - m // 3])
    weights = codes.view(3, 256, K), scale.view(3, 2, -1)
    return ql.gemm_fp8_grouped, (*ql.quantize_fp8_group(randn(m, K)), *weights, counts)


def int4_weight() -> tuple[Tensor, Tensor]:
    codes = torch.randint(-7, 8, (N, K), dtype=torch.int8)
    return pack_int4(codes), torch.rand(N, K // 128).add(0.5).bfloat16()


def int4_fp8(m: int) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    def call(a: Tensor, a_scale: Tensor, words: Tensor, scale: Tensor) -> Tensor:
        return ql.gemm_int4_fp8(a, a_scale, ql.prepare_int4(words, activation_bits=8), as_group_scale(scale))

    return call, (*ql.quantize_fp8_token(randn(m, K)), *int4_weight())


def int4(m: int) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    def call(x: Tensor, words: Tensor, scale: Tensor) -> Tensor:
        return ql.gemm_int4(x, ql.prepare_int4(words, activation_bits=16), as_group_scale(scale))

    return call, (randn(m, K), *int4_weight())


def absorbed(m: int) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    def call(x: Tensor, w: Tensor, scale: Tensor) -> Tensor:
        latent = ql.bmm_fp8(x, w, scale, first=0, count=128)
        return ql.bmm_fp8(latent, w, scale, first=128, count=96, transposed=True)

    return call, (randn(m, 3, 128), *ql.quantize_fp8_block(randn(3 * 224, K)))


def prefill(m: int) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ql.attention_8bit(q, k, v, causal=True)[0]

    return call, (randn(1, 4, m, 128), randn(1, 2, m, 128), randn(1, 2, m, 128))


def decode(m: int) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        cache = ql.PackedKV.empty("int4", 2, 2, 256, 128, device=q.device)
        length = torch.full((2,), m, dtype=torch.int32, device=q.device)
        ql.kv_append(k, v, cache, length)
        return ql.attention_decode(q, cache, length)[0]

    return call, (randn(2, 8, 1, 128), randn(2, 2, m, 128), randn(2, 2, m, 128))


def int4_grouped(m: int) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    def call(a: Tensor, a_scale: Tensor, words: Tensor, scale: Tensor, counts: Tensor) -> Tensor:
        tiles = ql.prepare_int4(words, activation_bits=8).unflatten(0, (2, -1))
        return ql.gemm_int4_grouped(a, a_scale, tiles, as_group_scale(scale).unflatten(0, (2, -1)), counts)

    codes = torch.randint(-7, 8, (2 * 256, K), dtype=torch.int8)
    weights = pack_int4(codes), torch.rand(2 * 256, K // 128).add(0.5).bfloat16()
    return call, (*ql.quantize_fp8_group(randn(m, K)), *weights, torch.tensor([m // 3, m - m // 3]))


def route(m: int) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    def call(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        rule = Rule(4, sigmoid=True, groups=8, kept=4, best=2, normalized=True, shared=1)
        return ql.moe_route(x, weight, rule, bias=bias)[1]

    return call, (randn(m, K), randn(64, K) * 0.05, torch.rand(64))


def latents(m: int, heads: int = 20, format: LatentFormat = "int4") -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    def call(q_latent: Tensor, q_rope: Tensor, latent: Tensor, rope: Tensor) -> Tensor:
        cache = ql.PackedLatent.empty(format, 2, 256, 512, 64, device=latent.device)
        length = torch.full((2,), m, dtype=torch.int32, device=latent.device)
        ql.mla_append(latent, rope, cache, length)
        return ql.mla_decode(q_latent, q_rope, cache, length, scale=0.1)[0]

    return call, (randn(2, 1, heads, 512), randn(2, 1, heads, 64), randn(2, m, 512), randn(2, m, 64))


FORMATS: tuple[LatentFormat, ...] = ("16bit", "fp8", "int4")
ROOMS = (fp8_block, fp8_row, fp8_grouped, int4_fp8, int4, int4_grouped, absorbed, prefill, decode, route)
CALLS = {
    **{room.__name__: room for room in ROOMS},
    **{
        f"latents_{format}_{heads}": functools.partial(latents, heads=heads, format=format)
        for format in FORMATS
        for heads in (16, 20, 40, *((80,) if format == "16bit" else ()))  # 80: CTAs in pairs
    },
}


def main() -> int:
    torch.manual_seed(0)
    wrong = False
    for name in sys.argv[1:] or CALLS:
        for m in ROWS:
            call, inputs = CALLS[name](m)
            exact = call(*inputs).float()
            # Blocks of their own for all operands: a read beyond the end is then beyond an allocation.
            found = call(*(x.to(DEVICE) for x in inputs)).float().cpu()
            error = ((found - exact).norm() / exact.norm()).item()
            wrong |= not error < 0.02  # NaN too
            print(f"{name:16s} {m:4d} rows: {error:.1e} from the CPU's result", flush=True)
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
