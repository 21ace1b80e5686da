"""Hopper backend: `sm90.cu`, compiled at run time by NVRTC, one kernel per configuration.

A launch costs a few microseconds of Python: what the kernel is told is a pure function of shapes and addresses and is
looked up when they come again, as they do in a model.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from quantlab_kernels.common import driver, nvrtc, tuning
from quantlab_kernels.common.backends import remembered
from quantlab_kernels.common.gemm import GemmProblem, round_up
from quantlab_kernels.common.hardware import gpu
from quantlab_kernels.common.launches import address, aligned, handover_flags, settled
from quantlab_kernels.common.wgmma import wgmma_source
from quantlab_kernels.gemm_fp8_block import sm90_configs
from quantlab_kernels.gemm_fp8_block.sm90_configs import Config

_FOLDER = Path(__file__).parent
_OUTPUT = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_OUTPUT_MAP = {torch.bfloat16: driver.BFLOAT16, torch.float16: driver.FLOAT16}
NO_MAP = bytes(128)
PARAMS_BYTES = 640  # of `Params` at the most; its tensor maps align it to 64
_SWIZZLE = {64: driver.SWIZZLE_128, 32: driver.SWIZZLE_64, 16: driver.SWIZZLE_32}


def supports(problem: GemmProblem) -> str | None:
    if problem.sm != 90:
        return f"Hopper's instructions exist on sm_90 only, the GPU is sm_{problem.sm}"
    if problem.k % 128:
        return f"needs K in multiples of 128, this is K = {problem.k}"
    if problem.bias not in (None, *_OUTPUT):
        return f"adds a bias of {', '.join(map(str, _OUTPUT))}, this is {problem.bias}"
    return nvrtc.missing()


def config(problem: GemmProblem) -> Config:
    """Tuned for this GPU and weight shape, else the model's choice."""
    return _config(problem, torch.cuda.current_device() if _has_gpu() else -1)


@functools.cache
def _has_gpu() -> bool:
    return torch.cuda.is_available()


@remembered
def _config(problem: GemmProblem, device: int) -> Config:
    tuned = tuning.lookup("gemm_fp8_block", "sm90", n=problem.n, k=problem.k, m=problem.m)
    if tuned is not None:
        chosen = sm90_configs.shallow(Config(**tuned), problem)
        if sm90_configs.reject(chosen, problem) is None:
            return chosen
    return sm90_configs.default(problem)


def source(config: Config, out_dtype: torch.dtype, bias: torch.dtype | None, accumulate: bool) -> nvrtc.Source:
    """What is compiled for a configuration."""
    macros = {key.upper(): value for key, value in asdict(config).items()}
    macros |= {
        "OUTPUT": _OUTPUT[out_dtype], "BIAS": 0 if bias is None else 1 + _OUTPUT[bias], "ACCUMULATE": int(accumulate),
        "SHARED": config.shared_bytes(),
    }  # fmt: skip
    headers = {name: (_FOLDER.parent / "common" / name).read_text() for name in ("sm90.cuh", "experts.cuh")}
    headers["wgmma.cuh"] = wgmma_source(config.by)
    return nvrtc.Source("gemm_fp8_block", (_FOLDER / "sm90.cu").read_text(), headers, macros)


@functools.cache
def kernel(config: Config, out_dtype: torch.dtype, bias: torch.dtype | None, accumulate: bool) -> driver.Kernel:
    return driver.Kernel(nvrtc.cubin(source(config, out_dtype, bias, accumulate)), "gemm_fp8_block")


def warmup(problems: Iterable[GemmProblem], *, workers: int = 8) -> int:
    """Compile what the problems need into the disk cache; returns how many kernels that are. Needs no GPU."""
    wanted = (source(config(p), p.out_dtype, p.bias, False) for p in problems if supports(p) is None)
    return nvrtc.compile_all(wanted, workers=workers)


def launch(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, bias: Tensor | None, out: Tensor, config: Config,
    accumulate: bool = False,
) -> None:  # fmt: skip
    """out [M, N] (+)= a @ b^T + bias; see `op.gemm_fp8_block` for the layouts, and `gemm_fp8_row` where config.row.

    Rows of a, b and out may be strided, by multiples of 16 bytes, and out starts at a multiple of 16 bytes. Raises
    ValueError for a configuration that `sm90_configs.reject` refuses.
    """
    a_at, a_scale_at, b_at = a.data_ptr(), a_scale.data_ptr(), b.data_ptr()
    if (a_at | a_scale_at | b_at) % 16:
        return launch(aligned(a), aligned(a_scale), aligned(b), b_scale, bias, out, config, accumulate)
    device = a.get_device()
    m, k = a.shape
    partials, flags = handover(config, a)
    code, shape, params = _prepared(
        config, out.dtype, None if bias is None else bias.dtype, accumulate, device, settled(b) & settled(b_scale),
        (m, b.shape[0], k), (a_at, a.stride(0)), (a_scale_at, a_scale.stride(1)), (b_at, b.stride(0)),
        b_scale.data_ptr(), address(bias), (out.data_ptr(), out.stride(0)), address(partials), address(flags),
    )  # fmt: skip
    code.launch(shape, params, device)


def handover(config: Config, a: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Where CTAs leave sums for each other, a tile of each, and their flags."""
    if not config.hands_over:
        return None, None
    device = a.get_device()
    ctas = gpu(device).sm_count
    partials = torch.empty(ctas * config.bx * config.by, dtype=torch.float32, device=a.device)
    return partials, handover_flags(device, ctas * config.math_groups)


@remembered
def _prepared(
    config: Config, out_dtype: torch.dtype, bias_dtype: torch.dtype | None, accumulate: bool, device: int,
    prefetch: bool, extents: tuple[int, int, int], a: tuple[int, int], a_scale: tuple[int, int], b: tuple[int, int],
    b_scale: int, bias: int, out: tuple[int, int], partials: int, flags: int,
) -> tuple[driver.Kernel, driver.Launch, bytes]:  # fmt: skip
    """Kernel, shape of the launch and the kernel's `Params`, for addresses and (address, stride) of the operands."""
    m, n, k = extents
    reason = sm90_configs.reject(config, GemmProblem(m, n, k, out_dtype, bias_dtype))
    if reason is not None:  # such a launch would hang, or write beside its result
        raise ValueError(f"gemm_fp8_block: {config} cannot run M={m} N={n} K={k}: {reason}")
    maps = _operand_maps(config, extents, a, b)
    tokens = config.by if config.swap else config.bx
    column = round_up(4 * max(a_scale[1], 4), 16)  # a single column of scales may report any stride
    scales = driver.FLOAT32, a_scale[0], m, k // 128, column, tokens, 1, driver.NO_SWIZZLE
    maps.append(NO_MAP if config.row else driver.tensor_map(*scales))
    maps.append(output_map(config, extents, out, out_dtype) if config.output_tma else NO_MAP)
    scalars = struct.pack("<QQQqQQiiii", b_scale, bias, *out, partials, flags, m, n, k // 128, int(prefetch))
    scalars += struct.pack("<Q", a_scale[0]) if config.row else b""
    params = (b"".join(maps) + scalars).ljust(PARAMS_BYTES, b"\0")
    code = kernel(config, out_dtype, bias_dtype, accumulate)
    return code, _shape(config, m, n, gpu(device).sm_count, prefetch), params


def _operand_maps(config: Config, extents: tuple[int, int, int], a: tuple[int, int], b: tuple[int, int]) -> list[bytes]:
    """Of the MMA's M side and its N side; a CTA of a cluster fetches its share of a common tile."""
    m, n, k = extents
    x, y = ((*b, n), (*a, m)) if config.swap else ((*a, m), (*b, n))
    boxes = (x, config.bx), (y, config.by // config.cluster_x)
    return [
        driver.tensor_map(driver.UINT8, pointer, k, rows, stride, 128, box, driver.SWIZZLE_128)
        for (pointer, stride, rows), box in boxes
    ]


def output_map(config: Config, extents: tuple[int, ...], out: tuple[int, int], dtype: torch.dtype) -> bytes:
    """Of the result [M, N, ...] for stores through the copy engine."""
    columns = config.piece_columns
    kind, swizzle = _OUTPUT_MAP[dtype], _SWIZZLE[columns]
    return driver.tensor_map(kind, out[0], extents[1], extents[0], 2 * out[1], columns, 64, swizzle)


def _shape(config: Config, m: int, n: int, sms: int, early: bool) -> driver.Launch:
    threads = 128 * (config.math_groups + 1)
    return driver.Launch(config.ctas(m, n, sms), threads, config.cluster, config.shared_bytes(), early)
