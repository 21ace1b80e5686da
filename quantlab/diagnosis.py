"""What runs here and why: the answers of `quantlab doctor` and `quantlab explain`."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
from collections.abc import Hashable, Iterator
from typing import TYPE_CHECKING, Any

from quantlab.errors import UsageError
from quantlab.scheme import SCHEMES, did_you_mean
from quantlab_kernels.common.int4 import GROUP, Int4Problem, scales_by_group
from quantlab_kernels.formats import INT4

if TYPE_CHECKING:
    from quantlab_kernels.common.backends import Backends

PACKAGES = (
    "quantlab-toolkit",
    "torch",
    "triton",
    "transformers",
    "safetensors",
    "accelerate",
    "compressed-tensors",
    "lm-eval",
)


def explain(m: int, n: int, k: int, scheme: str, sm: int | None) -> list[dict[str, Any]]:
    """Every backend of the rooms a layer [n, k] of this scheme goes through at m tokens: room, backend, reason, chosen.

    `sm` is the compute capability to answer for (90 for 9.0), by default that of the GPU present. Raises UsageError
    for an unknown scheme, a layer that it does not take, and where there is no GPU and `sm` is not given.
    """
    import torch

    if scheme not in SCHEMES:
        raise UsageError(f"unknown scheme {scheme!r}; {did_you_mean(scheme, SCHEMES)}")
    if SCHEMES[scheme].weight.format is INT4 and k % GROUP:
        raise UsageError(f"K = {k}: {scheme} has a scale for every {GROUP} of K, so K needs to be a multiple of it")
    if sm is None:
        if not torch.cuda.is_available():
            raise UsageError(
                "there is no GPU here: layers run the CPU reference. Give --sm (90 for an H100 or H200) to ask for one"
            )
        major, minor = torch.cuda.get_device_capability()
        sm = 10 * major + minor
    return [
        {"room": backends.room, "backend": v.backend, "chosen": v.chosen, "reason": v.reason}
        for backends, problem in _problems(m, n, k, scheme, sm)
        for v in backends.explain(problem)
    ]


def _problems(m: int, n: int, k: int, scheme: str, sm: int) -> Iterator[tuple[Backends, Hashable]]:
    """What a layer asks of which room: to quantize its input, and the product."""
    import torch

    from quantlab_kernels.common.gemm import GemmProblem
    from quantlab_kernels.gemm_fp8_block.op import BACKENDS as BLOCK
    from quantlab_kernels.gemm_fp8_row.op import BACKENDS as ROW
    from quantlab_kernels.gemm_int4.op import BACKENDS as INT4_16
    from quantlab_kernels.gemm_int4_fp8.op import BACKENDS as INT4_8
    from quantlab_kernels.quantize_fp8.op import BACKENDS as QUANTIZE
    from quantlab_kernels.quantize_fp8.op import Problem

    grouped = scheme == "fp8-block" or (scheme == "int4-fp8" and scales_by_group(m))
    if scheme != "int4":
        yield QUANTIZE, Problem("group" if grouped else "token", m, k, sm=sm)
    tiles = sm == 90  # as `prepare_int4` lays them out
    match scheme:
        case "fp8-block":
            yield BLOCK, GemmProblem(m, n, k, sm=sm)
        case "fp8-dynamic":
            yield ROW, GemmProblem(m, n, k, sm=sm)
        case "int4":
            yield INT4_16, Int4Problem(m, n, k, torch.bfloat16, tiles=tiles, sm=sm)
        case "int4-fp8":
            yield INT4_8, Int4Problem(m, n, k, grouped=grouped, tiles=tiles, sm=sm)


def doctor() -> list[tuple[str, str]]:
    """(what, found) pairs: versions, the GPU, compilers, and what transformers will use."""
    found = [("python", platform.python_version()), ("system", platform.platform())]
    found += [(name, _version(name)) for name in PACKAGES]
    found += _gpu()
    found.append(("run-time compiler", _nvrtc()))
    found.append(("disk free here", f"{shutil.disk_usage('.').free / 1e9:.0f} GB"))
    found.append(("transformers integration", _integration()))
    return found


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _gpu() -> list[tuple[str, str]]:
    import torch

    if not torch.cuda.is_available():
        built = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is a CPU build"
        return [("GPU", f"none; {built}; layers run the CPU reference: slow, right")]
    lines = []
    for index in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(index)
        native = (
            "FP8 in hardware"
            if (p.major, p.minor) >= (8, 9)
            else "no FP8 unit: weights stay FP8, products run in 16 bits"
        )
        lines.append((f"GPU {index}", f"{p.name}, sm_{p.major}{p.minor}, {p.total_memory / 1e9:.0f} GB; {native}"))
    return [*lines, ("CUDA", str(torch.version.cuda))]


def _nvrtc() -> str:
    from quantlab_kernels.common import nvrtc

    try:
        return f"{nvrtc.compiler_version()}: the Hopper kernels can be built"
    except nvrtc.CompilerMissingError as error:
        return f"none: {error}"


def _integration() -> str:
    from quantlab import hf

    hf.enable()
    return hf.status()
