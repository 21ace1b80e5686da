"""The Triton INT4 kernel in Triton's interpreter: float16 and E4M3 activations, splits, ragged tiles, codes of -8."""

from __future__ import annotations

from collections.abc import Callable

SCRIPT = """
import torch
from quantlab_kernels import quantize_fp8_group, quantize_fp8_token
from quantlab_kernels.common import triton_int4
from quantlab_kernels.common.bounds import gemm_bound, worst
from quantlab_kernels.common.gemm import as_group_scale
from quantlab_kernels.common.gemm_configs import Config
from quantlab_kernels.common.int4 import decode
from quantlab_kernels.packing import pack_int4

torch.manual_seed(0)
m, n, k = 9, 72, 384
words = pack_int4(torch.randint(-8, 8, (n, k), dtype=torch.int8))
b_scale = as_group_scale((torch.rand(n, 3) + 0.1).half())
x, bias = torch.randn(m, k), torch.randn(n)
cases = [(x.half(), None), quantize_fp8_token(x), quantize_fp8_group(x)]
for a, a_scale in cases:
    for config in (Config(16, 32), Config(16, 64, split_k=2)):
        out = torch.full((m, n), torch.nan)
        triton_int4.launch(a, a_scale, words, b_scale, bias, out, config, native=False)
        wide = a.double()
        if a_scale is not None:
            wide = wide * a_scale.double().repeat_interleave(k // a_scale.shape[1], 1)
        w = decode(words, b_scale)
        magnitude = wide.abs() @ w.abs().t() + bias.abs()
        exact = wide @ w.t() + bias
        found = worst(out, exact, gemm_bound(exact, magnitude, k, torch.float32, "float32"))
        assert found.ratio <= 1, (config, found)
"""


def test_the_kernel_in_the_interpreter(interpreted: Callable[[str], str]):
    interpreted(SCRIPT)
