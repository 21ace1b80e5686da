"""Hopper backend: `sm90.cu` compiled at run time, one kernel per configuration."""

from __future__ import annotations

import functools
import struct
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from quantlab_kernels.common import driver, nvrtc
from quantlab_kernels.common.wgmma import wgmma_source

_FOLDER = Path(__file__).parent
_OUTPUT = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_OUTPUT_MAP = {torch.bfloat16: driver.BFLOAT16, torch.float16: driver.FLOAT16}
SHARED_LIMIT = 232448  # bytes a CTA may have on compute capability 9.0


@dataclass(frozen=True)
class Config:
    """How the kernel is built and launched; the macros of `sm90.cu` in lower case."""

    by: int = 128
    waves: int = 1
    math_groups: int = 2
    stages: int = 4
    cluster_x: int = 1
    cluster_y: int = 1
    split: int = 1
    stream: int = 0
    temps: int = 2
    ordered: int = 0
    output_tma: int = 1
    pieces: int = 2
    swap: int = 0
    group: int = 8
    early: int = 0

    @property
    def bx(self) -> int:
        return 64 * self.waves * self.math_groups

    @property
    def cluster(self) -> int:
        return self.cluster_x * self.cluster_y * self.split

    def shared_bytes(self) -> int:
        """Dynamic shared memory, as `sm90.cu` lays it out."""
        share = self.by // self.split
        tokens, channels = (share, self.bx) if self.swap else (self.bx, share)
        if self.output_tma:
            output = self.pieces * self.math_groups * 64 * (64 if share % 64 == 0 else 32) * 2
        else:
            output = tokens * (channels + (4 if self.swap else 8)) * 4
        output = _up(output, 128) + (self.split - 1) * share // 2 * 4 * 2 * self.bx
        tokens, channels = (self.by, self.bx) if self.swap else (self.bx, self.by)
        span = next(s for s in (128, 64, 32, 16, 8) if channels % s == 0)
        scales = _up(tokens * 4, 128) * self.stages + _up(self.stages * (channels // span) * 4, 8)
        return (self.bx + self.by) * 128 * self.stages + output + scales + 8 * (2 * self.stages + 2)


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def source(config: Config, out_dtype: torch.dtype, bias: torch.dtype | None, accumulate: bool) -> nvrtc.Source:
    """What is compiled for a configuration."""
    macros = {key.upper(): value for key, value in asdict(config).items() }
    macros |= {
        "OUTPUT": _OUTPUT[out_dtype], "BIAS": 0 if bias is None else 1 + _OUTPUT[bias], "ACCUMULATE": int(accumulate),
        "SHARED_LIMIT": SHARED_LIMIT,
    }  # fmt: skip
    headers = {"sm90.cuh": (_FOLDER.parent / "common/sm90.cuh").read_text(), "wgmma.cuh": wgmma_source(config.by)}
    return nvrtc.Source("gemm_fp8_block", (_FOLDER / "sm90.cu").read_text(), headers, macros)


@functools.cache
def kernel(config: Config, out_dtype: torch.dtype, bias: torch.dtype | None, accumulate: bool) -> driver.Kernel:
    return driver.Kernel(nvrtc.cubin(source(config, out_dtype, bias, accumulate)), "gemm_fp8_block")


def launch(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, bias: Tensor | None, out: Tensor, config: Config,
    accumulate: bool = False,
) -> None:  # fmt: skip
    """out [M, N] (+)= a @ b^T; see `op.gemm_fp8_block` for the layouts."""
    code = kernel(config, out.dtype, None if bias is None else bias.dtype, accumulate)
    device = a.get_device()
    m, k = a.shape
    n = b.shape[0]
    shape = _shape(config, m, n, device)
    partials = flags = 0
    if config.stream:
        workspace = torch.empty(shape.grid * config.bx * config.by, dtype=torch.float32, device=a.device)
        partials, flags = workspace.data_ptr(), _flags(device, shape.grid * config.math_groups)
    params = _params(
        config, out.dtype, m, n, k, a.data_ptr(), a.stride(0), a_scale.data_ptr(), a_scale.stride(1), b.data_ptr(),
        b.stride(0), b_scale.data_ptr(), 0 if bias is None else bias.data_ptr(), out.data_ptr(), out.stride(0),
        partials, flags,
    )  # fmt: skip
    code.launch(shape, params, device)


_FLAGS: dict[tuple[int, int], Tensor] = {}


def _flags(device: int, count: int) -> int:
    key = (device, torch._C._cuda_getCurrentRawStream(device))
    if key not in _FLAGS:
        _FLAGS[key] = torch.zeros(4096, dtype=torch.int32, device=f"cuda:{device}")
    return _FLAGS[key].data_ptr()


@functools.lru_cache(maxsize=4096)
def _shape(config: Config, m: int, n: int, device: int) -> driver.Launch:
    rows_x, rows_y = (n, m) if config.swap else (m, n)
    tiles = -(-rows_x // (config.bx * config.cluster_x)) * -(-rows_y // (config.by * config.cluster_y))
    sms = torch.cuda.get_device_properties(device).multi_processor_count
    clusters = sms if config.stream else min(tiles, sms // config.cluster)
    threads = 128 * (config.math_groups + 1)
    return driver.Launch(clusters * config.cluster, threads, config.cluster, config.shared_bytes(), bool(config.early))


@functools.lru_cache(maxsize=4096)
def _params(
    config: Config, out_dtype: torch.dtype, m: int, n: int, k: int, a: int, a_stride: int, a_scale: int,
    a_scale_stride: int, b: int, b_stride: int, b_scale: int, bias: int, out: int, out_stride: int, partials: int,
    flags: int,
) -> bytes:  # fmt: skip
    """The kernel's `Params`. A pure function of its arguments, so that a repeated call costs a look-up."""
    tokens_x = not config.swap
    operand_a, operand_b = (a, m, a_stride), (b, n, b_stride)
    x, y = (operand_a, operand_b) if tokens_x else (operand_b, operand_a)
    rows_x, rows_y = config.bx // config.cluster_y, config.by // config.cluster_x
    maps = [
        driver.tensor_map(driver.UINT8, pointer, k, rows, stride, 128, box, driver.SWIZZLE_128)
        for (pointer, rows, stride), box in ((x, rows_x), (y, rows_y))
    ]
    tokens = config.bx if tokens_x else config.by
    maps.append(
        driver.tensor_map(
            driver.FLOAT32, a_scale, m, k // 128, 4 * max(a_scale_stride, 4), tokens, 1, driver.NO_SWIZZLE
        )
    )
    if config.output_tma:
        columns = 64 if config.by // config.split % 64 == 0 else 32
        swizzle = driver.SWIZZLE_128 if columns == 64 else driver.SWIZZLE_64
        maps.append(driver.tensor_map(_OUTPUT_MAP[out_dtype], out, n, m, 2 * out_stride, columns, 64, swizzle))
    else:
        maps.append(bytes(128))
    return b"".join(maps) + struct.pack("<QQQqQQiii4x", b_scale, bias, out, out_stride, partials, flags, m, n, k // 128)
