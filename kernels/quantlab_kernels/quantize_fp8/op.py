"""The three quantization ops: checks (which are also the fakes), the CPU way, and dispatch to a GPU backend."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantlab_kernels.common.backends import Backends
from quantlab_kernels.common.gemm import empty_group_scale
from quantlab_kernels.common.hardware import device_of, gpu_of
from quantlab_kernels.common.ops import define, require
from quantlab_kernels.quantize_fp8 import reference

BACKENDS = Backends("quantize_fp8", ("triton", "eager"), last_resort="eager")
_INPUTS = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Problem:
    """granularity "group", "token" or "block"; x [m, k] of `dtype`; `given`: the scale comes from the caller."""

    granularity: str
    m: int
    k: int
    dtype: torch.dtype = torch.bfloat16
    power2: bool = False
    given: bool = False
    sm: int = 90

    @property
    def bytes(self) -> int:
        """Least traffic: the input read once, codes and scales written once."""
        scales = {"group": self.m * -(-self.k // 128), "token": self.m, "block": -(-self.m // 128) * -(-self.k // 128)}
        return self.m * self.k * (self.dtype.itemsize + 1) + 4 * scales[self.granularity]


def quantize_fp8_group(x: Tensor, *, scale: Tensor | None = None, power2: bool = False) -> tuple[Tensor, Tensor]:
    """E4M3 codes with one scale per row and 128 columns (DeepSeek-V3's 1x128 activations, arXiv 2412.19437 §3.3).

    x      [M, K]  bfloat16, float16 or float32, any strides; K may be ragged
    scale  None: ``amax / 448`` of each group (1 for a group of zeros). Given, float32, [ceil(K/128)] or
           [M, ceil(K/128)]: used as it is, codes saturate at ±448
    power2 rounds the scale up to a power of two

    Returns codes [M, K] float8_e4m3fn, contiguous, and scale [M, ceil(K/128)] float32 with strides
    (1, round_up(M, 4)): the layout that `gemm_fp8_block`, cuBLASLt and TMA read. ``x ~ scale * codes``, equal bit for
    bit to `qtensor.quantize`. NaN and Inf make the scale of their group NaN or Inf, so that the group dequantizes to
    NaN and nothing is hidden. Raises RuntimeError for other dtypes, ranks and shapes.
    """
    return _GROUP(x, scale, power2)


def quantize_fp8_token(x: Tensor) -> tuple[Tensor, Tensor]:
    """E4M3 codes [M, K] with one scale per row, [M, 1] float32. Otherwise as `quantize_fp8_group`."""
    return _TOKEN(x)


def quantize_fp8_block(w: Tensor, *, scale: Tensor | None = None, power2: bool = True) -> tuple[Tensor, Tensor]:
    """E4M3 codes [N, K] with one scale per 128x128 block, [ceil(N/128), ceil(K/128)] float32 row-major.

    Power-of-two scales are the default for weights: engines that requantize to them at load then lose nothing. A given
    `scale` (calibrated) is used as it is and codes saturate. Otherwise as `quantize_fp8_group`.
    """
    return _BLOCK(w, scale, power2)


def check(granularity: str, x: Tensor, scale: Tensor | None) -> None:
    """Refuse what no backend takes. Shapes may be symbolic."""
    name = f"quantize_fp8_{granularity}"
    require(x.dim() == 2, lambda: f"{name}: got shape {tuple(x.shape)}, needs two dimensions; flatten the tokens")
    require(x.dtype in _INPUTS, lambda: f"{name}: got {x.dtype}, needs bfloat16, float16 or float32")
    if scale is None:
        return
    require(scale.dtype == torch.float32, lambda: f"{name}: scale is {scale.dtype}, needs float32")
    rows, groups = x.shape[0], (x.shape[1] + 127) // 128
    if granularity == "block":
        rows = (rows + 127) // 128
    fits = tuple(scale.shape) == (rows, groups) or (granularity == "group" and tuple(scale.shape) == (groups,))
    require(fits, lambda: f"{name}: scale {tuple(scale.shape)} does not fit, needs {(rows, groups)}")


def _empty(granularity: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """Uninitialised codes and scale of the right layout."""
    m, k = x.shape
    codes = x.new_empty((m, k), dtype=torch.float8_e4m3fn)
    if granularity == "group":
        return codes, empty_group_scale(x, m, (k + 127) // 128)
    shape = (m, 1) if granularity == "token" else ((m + 127) // 128, (k + 127) // 128)
    return codes, x.new_empty(shape, dtype=torch.float32)


def _launch(granularity: str, x: Tensor, given: Tensor | None, power2: bool) -> tuple[Tensor, Tensor]:
    check(granularity, x, given)
    codes, scale = _empty(granularity, x)
    if x.numel() == 0:
        return codes, scale.fill_(1.0)
    m, k = x.shape
    problem = Problem(granularity, m, k, x.dtype, power2, given is not None, gpu_of(x).sm)
    backend = BACKENDS.select(problem)
    with device_of(x):
        backend.launch(problem, x, given, codes, scale, backend.config(problem))
    return codes, scale


def _group_fake(x: Tensor, scale: Tensor | None, power2: bool) -> tuple[Tensor, Tensor]:
    check("group", x, scale)
    return _empty("group", x)


def _group_cpu(x: Tensor, scale: Tensor | None, power2: bool) -> tuple[Tensor, Tensor]:
    check("group", x, scale)
    return reference.group(x, scale, power2)


def _group_cuda(x: Tensor, scale: Tensor | None, power2: bool) -> tuple[Tensor, Tensor]:
    return _launch("group", x, scale, power2)


def _token_fake(x: Tensor) -> tuple[Tensor, Tensor]:
    check("token", x, None)
    return _empty("token", x)


def _token_cpu(x: Tensor) -> tuple[Tensor, Tensor]:
    check("token", x, None)
    return reference.token(x)


def _token_cuda(x: Tensor) -> tuple[Tensor, Tensor]:
    return _launch("token", x, None, False)


def _block_fake(w: Tensor, scale: Tensor | None, power2: bool) -> tuple[Tensor, Tensor]:
    check("block", w, scale)
    return _empty("block", w)


def _block_cpu(w: Tensor, scale: Tensor | None, power2: bool) -> tuple[Tensor, Tensor]:
    check("block", w, scale)
    return reference.block(w, scale, power2)


def _block_cuda(w: Tensor, scale: Tensor | None, power2: bool) -> tuple[Tensor, Tensor]:
    return _launch("block", w, scale, power2)


_GROUP = define(
    "quantize_fp8_group(Tensor x, Tensor? scale, bool power2) -> (Tensor, Tensor)",
    fake=_group_fake, cpu=_group_cpu, cuda=_group_cuda,
)  # fmt: skip
_TOKEN = define("quantize_fp8_token(Tensor x) -> (Tensor, Tensor)", fake=_token_fake, cpu=_token_cpu, cuda=_token_cuda)
_BLOCK = define(
    "quantize_fp8_block(Tensor w, Tensor? scale, bool power2) -> (Tensor, Tensor)",
    fake=_block_fake, cpu=_block_cpu, cuda=_block_cuda,
)  # fmt: skip
