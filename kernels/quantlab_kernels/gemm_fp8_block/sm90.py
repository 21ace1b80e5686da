"""Hopper backend: `sm90.cu`, compiled at run time by NVRTC, one kernel per configuration.

A launch costs a few microseconds of Python: what the kernel is told is a pure function of shapes and addresses and is
looked up when they come again, as they do in a model.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from quantlab_kernels.common import driver, nvrtc, tuning
from quantlab_kernels.common.backends import Mendable
from quantlab_kernels.common.gemm import GemmProblem, round_up
from quantlab_kernels.common.wgmma import wgmma_source
from quantlab_kernels.gemm_fp8_block import sm90_configs
from quantlab_kernels.gemm_fp8_block.sm90_configs import Config

_FOLDER = Path(__file__).parent
_OUTPUT = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_OUTPUT_MAP = {torch.bfloat16: driver.BFLOAT16, torch.float16: driver.FLOAT16}
_SWIZZLE = {64: driver.SWIZZLE_128, 32: driver.SWIZZLE_64, 16: driver.SWIZZLE_32}


def supports(problem: GemmProblem) -> str | None:
    if problem.sm != 90:
        return f"Hopper's instructions exist on sm_90 only, the GPU is sm_{problem.sm}"
    if problem.k % 128:
        return f"needs K in multiples of 128, this is K = {problem.k}"
    if problem.bias not in (None, *_OUTPUT):
        return f"adds a bias of {', '.join(map(str, _OUTPUT))}, this is {problem.bias}"
    try:
        nvrtc.library()
    except nvrtc.CompilerMissingError as error:
        return Mendable(str(error))
    return None


def config(problem: GemmProblem) -> Config:
    """Tuned for this GPU and weight shape, else the model's choice."""
    return _config(problem, torch.cuda.current_device() if torch.cuda.is_available() else -1)


@functools.cache
def _config(problem: GemmProblem, device: int) -> Config:
    tuned = tuning.lookup("gemm_fp8_block", "sm90", n=problem.n, k=problem.k, m=problem.m)
    if tuned is not None:
        chosen = Config(**tuned)
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
    headers = {"sm90.cuh": (_FOLDER.parent / "common/sm90.cuh").read_text(), "wgmma.cuh": wgmma_source(config.by)}
    return nvrtc.Source("gemm_fp8_block", (_FOLDER / "sm90.cu").read_text(), headers, macros)


@functools.cache
def kernel(config: Config, out_dtype: torch.dtype, bias: torch.dtype | None, accumulate: bool) -> driver.Kernel:
    return driver.Kernel(nvrtc.cubin(source(config, out_dtype, bias, accumulate)), "gemm_fp8_block")


def warmup(problems: Iterable[GemmProblem], *, workers: int = 8) -> int:
    """Compile what the problems need into the disk cache; returns how many kernels that are. Needs no GPU."""
    wanted = {(config(p), p.out_dtype, p.bias, False) for p in problems if supports(p) is None}
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(lambda key: nvrtc.cubin(source(*key)), wanted))
    return len(wanted)


def launch(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, bias: Tensor | None, out: Tensor, config: Config,
    accumulate: bool = False,
) -> None:  # fmt: skip
    """out [M, N] (+)= a @ b^T + bias; see `op.gemm_fp8_block` for the layouts.

    Rows of a, b and out may be strided, by multiples of 16 bytes, and out starts at a multiple of 16 bytes.
    """
    a, a_scale, b = _aligned(a), _aligned(a_scale), _aligned(b)
    code = kernel(config, out.dtype, None if bias is None else bias.dtype, accumulate)
    device = a.get_device()
    m, k = a.shape
    n = b.shape[0]
    prefetch = _settled(b)
    shape = _shape(config, m, n, device, prefetch)
    partials = flags = None
    if config.tail > 1:
        partials = torch.empty(shape.grid * config.bx * config.by, dtype=torch.float32, device=a.device)
        flags = _flags(device, shape.grid * config.math_groups)
    params = _params(
        config, out.dtype, m, n, k, a.data_ptr(), a.stride(0), a_scale.data_ptr(), a_scale.stride(1), b.data_ptr(),
        b.stride(0), b_scale.data_ptr(), _address(bias), out.data_ptr(), out.stride(0), _address(partials),
        _address(flags), prefetch,
    )  # fmt: skip
    code.launch(shape, params, device)


def _aligned(operand: Tensor) -> Tensor:
    """The operand, or a copy of it where the copy engine can read it: from a multiple of 16 bytes."""
    if operand.data_ptr() % 16 == 0:
        return operand
    return torch.empty_strided(operand.shape, operand.stride(), dtype=operand.dtype, device=operand.device).copy_(
        operand
    )


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _settled(weight: Tensor) -> bool:
    """Whether an earlier launch has read this tensor as it is now, so that the kernel just before cannot be writing it.

    Then its loads may start while that kernel still runs, which hides most of a small problem's latency.
    """
    if weight.is_inference():  # these do not count their versions
        return False
    version = weight._version
    if getattr(weight, "_quantlab_read", None) == version:
        return True
    weight._quantlab_read = version  # type: ignore[attr-defined]
    return False


@functools.lru_cache(maxsize=4096)
def _shape(config: Config, m: int, n: int, device: int, early: bool) -> driver.Launch:
    sms = torch.cuda.get_device_properties(device).multi_processor_count
    tiles, at_once = config.grid(m, n, sms)
    clusters = at_once if config.tail > 1 else min(tiles // (config.cluster_x * config.cluster_y), at_once)
    threads = 128 * (config.math_groups + 1)
    return driver.Launch(clusters * config.cluster, threads, config.cluster, config.shared_bytes(), early)


@functools.lru_cache(maxsize=4096)
def _params(
    config: Config, out_dtype: torch.dtype, m: int, n: int, k: int, a: int, a_stride: int, a_scale: int,
    a_scale_stride: int, b: int, b_stride: int, b_scale: int, bias: int, out: int, out_stride: int, partials: int,
    flags: int, prefetch: bool,
) -> bytes:  # fmt: skip
    """The kernel's `Params`. A pure function of its arguments."""
    operand_a, operand_b = (a, m, a_stride), (b, n, b_stride)
    x, y = (operand_b, operand_a) if config.swap else (operand_a, operand_b)
    boxes = (x, config.bx // config.cluster_y), (y, config.by // config.cluster_x)
    maps = [
        driver.tensor_map(driver.UINT8, pointer, k, rows, stride, 128, box, driver.SWIZZLE_128)
        for (pointer, rows, stride), box in boxes
    ]
    tokens = config.by if config.swap else config.bx
    column = round_up(4 * max(a_scale_stride, 4), 16)  # a single column of scales may report any stride
    maps.append(driver.tensor_map(driver.FLOAT32, a_scale, m, k // 128, column, tokens, 1, driver.NO_SWIZZLE))
    if config.output_tma:
        columns = config.piece_columns
        swizzle = _SWIZZLE[columns]
        maps.append(driver.tensor_map(_OUTPUT_MAP[out_dtype], out, n, m, 2 * out_stride, columns, 64, swizzle))
    else:
        maps.append(bytes(128))
    scalars = struct.pack("<QQQqQQiiii", b_scale, bias, out, out_stride, partials, flags, m, n, k // 128, int(prefetch))
    return b"".join(maps) + scalars


# Flags of hand-over, zeros which a launch leaves as zeros. Launches of one stream cannot overlap and share theirs. A
# captured launch may be replayed beside anything, so it takes its own out of a pool, for good; a graph's own memory
# would do as well, but has to be cleared by one more node.
_POOL = 1 << 18
_STREAM_FLAGS: dict[tuple[int, int], Tensor] = {}
_CAPTURE_FLAGS: dict[int, Tensor] = {}


def _flags(device: int, count: int) -> Tensor:
    """At least `count` zeros for one launch on the current stream."""
    if torch.cuda.is_current_stream_capturing():
        pool = _CAPTURE_FLAGS.get(device)
        if pool is None or pool.numel() < count:
            return torch.zeros(count, dtype=torch.int32, device=f"cuda:{device}")
        _CAPTURE_FLAGS[device] = pool[count:]
        return pool[:count]
    if device not in _CAPTURE_FLAGS:
        _CAPTURE_FLAGS[device] = torch.zeros(_POOL, dtype=torch.int32, device=f"cuda:{device}")
    key = device, torch._C._cuda_getCurrentRawStream(device)
    flags = _STREAM_FLAGS.get(key)
    if flags is None or flags.numel() < count:
        flags = _STREAM_FLAGS[key] = torch.zeros(max(count, 1024), dtype=torch.int32, device=f"cuda:{device}")
    return flags
