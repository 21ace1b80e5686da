"""Hopper backend of both INT4 rooms: `sm90.cu`, compiled at run time by NVRTC, one kernel per configuration."""

from __future__ import annotations

import functools
import struct
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from quantlab_kernels.common import driver, nvrtc, tuning
from quantlab_kernels.common.backends import remembered
from quantlab_kernels.common.gemm import padded_rows
from quantlab_kernels.common.hardware import gpu
from quantlab_kernels.common.int4 import GROUP, Int4Problem
from quantlab_kernels.common.launches import address, aligned, handover_flags, settled
from quantlab_kernels.gemm_int4_fp8 import sm90_configs
from quantlab_kernels.gemm_int4_fp8.sm90_configs import Config, output_tma

_FOLDER = Path(__file__).parent
_FLOATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_X = {torch.float8_e4m3fn: 0, torch.bfloat16: 1, torch.float16: 2}
_MAP = {torch.float32: driver.FLOAT32, torch.bfloat16: driver.BFLOAT16, torch.float16: driver.FLOAT16}


def supports(problem: Int4Problem) -> str | None:
    if problem.sm != 90:
        return f"Hopper's instructions exist on sm_90 only, the GPU is sm_{problem.sm}"
    if not problem.tiles:
        return "the weight is in words; `prepare_int4` makes tiles of it"
    if problem.x not in _X:
        return f"takes activations of {', '.join(map(str, _X))}, these are {problem.x}"
    if problem.bias not in (None, *_FLOATS):
        return f"adds a bias of {', '.join(map(str, _FLOATS))}, this is {problem.bias}"
    return nvrtc.missing()


@remembered
def config(problem: Int4Problem) -> Config:
    """Tuned for this GPU and weight shape, else the default."""
    room = "gemm_int4_fp8" if problem.x.itemsize == 1 else "gemm_int4"
    tuned = tuning.lookup(room, "sm90", n=problem.n, k=problem.k, m=problem.m)
    if tuned is not None:
        chosen = sm90_configs.deepest(Config(**tuned), problem)
        if sm90_configs.reject(chosen, problem) is None:
            return chosen
    return sm90_configs.default(problem)


def source(config: Config, problem: Int4Problem) -> nvrtc.Source:
    """What is compiled for a configuration; of the problem only dtypes and `output_tma` matter."""
    macros = {
        "X": _X[problem.x], "GROUPED": int(problem.grouped), "SCALE": _FLOATS[problem.scale],
        "OUTPUT": _FLOATS[problem.out_dtype], "BIAS": 0 if problem.bias is None else 1 + _FLOATS[problem.bias],
        "OUTPUT_TMA": int(output_tma(problem)), "ROW_GROUPS": config.row_groups, "K_GROUPS": config.k_groups,
        "BY": config.by, "STAGES": config.stages, "PREFETCH": config.prefetch, "BAND": config.band,
        "SHARED": config.shared_bytes(problem), "EXPERTS": int(problem.experts > 0),
        "SPLIT": config.split, "TOKEN_SCALES": config.token_scales, "EARLY": config.early, "PARTS": config.parts,
    }  # fmt: skip
    headers = {name: (_FOLDER.parent / "common" / name).read_text() for name in ("sm90.cuh", "experts.cuh")}
    headers["wgmma.cuh"] = wgmma_source(config.by // config.parts, problem.x)
    return nvrtc.Source("gemm_int4", (_FOLDER / "sm90.cu").read_text(), headers, macros)


def wgmma_source(n: int, x: torch.dtype) -> str:
    """CUDA C++ of ``wgmma(d, a, b, accumulate)``: as in `common.wgmma`, but a is four registers of a fragment."""
    count, short = n // 2, x.itemsize > 1
    kind = {torch.float8_e4m3fn: "e4m3", torch.bfloat16: "bf16", torch.float16: "f16"}[x]
    sums = ", ".join(f"%{i}" for i in range(count))
    a = ", ".join(f"%{count + i}" for i in range(4))
    outputs = ", ".join(f'"+f"(d[{i}])' for i in range(count))
    inputs = ", ".join(f'"r"(a[{i}])' for i in range(4))
    return f"""
DEVICE void wgmma(float (&d)[{count}], const u32 (&a)[4], u64 b, int accumulate) {{
  asm volatile("{{\\n.reg .pred p;\\nsetp.ne.b32 p, %{count + 5}, 0;\\n"
               "wgmma.mma_async.sync.aligned.m64n{n}k{16 if short else 32}.f32.{kind}.{kind} "
               "{{{sums}}}, {{{a}}}, %{count + 4}, p, 1, 1{", 0" if short else ""};\\n}}"
               : {outputs}
               : {inputs}, "l"(b), "r"(accumulate));
}}
"""


@functools.cache
def kernel(config: Config, problem: Int4Problem) -> driver.Kernel:
    return driver.Kernel(nvrtc.cubin(source(config, problem)), "gemm_int4")


def warmup(problems: Iterable[Int4Problem], *, workers: int = 8) -> int:
    """Compile what the problems need into the disk cache; returns how many kernels that are. Needs no GPU."""
    return nvrtc.compile_all((source(config(p), p) for p in problems if supports(p) is None), workers=workers)


def launch(
    x: Tensor, token_scale: Tensor | None, b: Tensor, b_scale: Tensor, bias: Tensor | None, out: Tensor, config: Config
) -> None:
    """out [M, N] = x @ b^T + bias; see the ops for the layouts. token_scale: of E4M3 activations, [M, 1] or groups.

    Rows of x and out may be strided, by multiples of 16 bytes, and out starts at a multiple of 16 bytes.
    """
    x_at, b_at, scale_at, token_at = x.data_ptr(), b.data_ptr(), b_scale.data_ptr(), address(token_scale)
    if (x_at | b_at | scale_at) % 16 or (token_at % 16 and token_scale is not None and token_scale.shape[1] > 1):
        token_scale = None if token_scale is None else aligned(token_scale)
        return launch(aligned(x), token_scale, aligned(b), aligned(b_scale), bias, out, config)
    device = x.get_device()
    partials, flags = handover(config, x)
    dtypes = x.dtype, out.dtype, None if bias is None else bias.dtype, b_scale.dtype
    grouped = token_scale is not None and token_scale.shape[1] > 1
    code, shape, params = _prepared(
        config, dtypes, grouped, device, settled(b) & settled(b_scale), (x.shape[0], b_scale.shape[0], x.shape[1]),
        (x_at, x.stride(0)), token_at, b_at, scale_at, address(bias), (out.data_ptr(), out.stride(0)),
        address(partials), address(flags),
    )  # fmt: skip
    code.launch(shape, params, device)


def handover(config: Config, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Where CTAs leave sums for each other, a tile of each, and their flags."""
    if not config.stream:
        return None, None
    device = x.get_device()
    ctas = gpu(device).sm_count
    partials = torch.empty(ctas * config.bx * config.by, dtype=torch.float32, device=x.device)
    return partials, handover_flags(device, ctas * config.row_groups)


@remembered
def _prepared(
    config: Config, dtypes: tuple[torch.dtype, torch.dtype, torch.dtype | None, torch.dtype], grouped: bool,
    device: int, prefetch: bool, extents: tuple[int, int, int], x: tuple[int, int], token_scale: int, b: int,
    scale: int, bias: int, out: tuple[int, int], partials: int, flags: int,
) -> tuple[driver.Kernel, driver.Launch, bytes]:  # fmt: skip
    """Kernel, shape of the launch and the kernel's `Params`, for addresses and (address, stride) of the operands."""
    m, n, k = extents
    problem, blocks = Int4Problem(m, n, k, *dtypes, grouped), k // GROUP
    maps = operand_maps(config, problem, x, token_scale, scale)
    if output_tma(problem):
        dtype = _MAP[problem.out_dtype]
        maps.append(driver.tensor_map(dtype, out[0], n, m, 2 * out[1], 64, config.by, driver.SWIZZLE_128))
    else:
        maps.append(bytes(128))
    ctas, streamed = config.schedule(problem, gpu(device).sm_count)
    share, longer = divmod(streamed * blocks, ctas)
    scalars = struct.pack(
        "<QQQQqQQiiiiiii", b, token_scale, bias, *out, partials, flags, m, n, blocks, streamed, share, longer,
        int(prefetch),
    )  # fmt: skip
    shape = driver.Launch(ctas, config.threads, config.split, config.shared_bytes(problem), prefetch)
    params = b"".join(maps) + scalars
    return kernel(config, kind(problem)), shape, params + bytes(-len(params) % 64)


def operand_maps(config: Config, problem: Int4Problem, x: tuple[int, int], token_scale: int, scale: int) -> list[bytes]:
    """What the copy engine reads: activations (address, stride), the weight's scales, those of tokens."""
    (m, k), width = (problem.m, problem.k), problem.x.itemsize
    n, sorted_rows = problem.n * max(1, problem.experts), problem.experts > 0
    x_type = driver.UINT8 if width == 1 else _MAP[problem.x]
    scale_bytes = padded_rows(n, problem.scale) * problem.scale.itemsize
    maps = [
        driver.tensor_map(x_type, x[0], k, m, x[1] * width, 128 // width, config.by, driver.SWIZZLE_128),
        driver.tensor_map(_MAP[problem.scale], scale, n, k // GROUP, scale_bytes, config.bx, 1, driver.NO_SWIZZLE),
    ]
    if not problem.grouped:
        return [*maps, bytes(128)]
    column, box = 4 * padded_rows(m), config.by + 4 * sorted_rows
    return [*maps, driver.tensor_map(driver.FLOAT32, token_scale, m, k // GROUP, column, box, 1, driver.NO_SWIZZLE)]


def kind(problem: Int4Problem) -> Int4Problem:
    """What of the problem the compiled code depends on."""
    return replace(problem, m=1, n=8 if output_tma(problem) else 1, k=GROUP, experts=min(problem.experts, 1))
