"""What runs here and why: the answers of `quantlab doctor` and `quantlab explain`."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
from typing import Any

from quantlab.errors import UsageError
from quantlab.scheme import SCHEMES, did_you_mean

# Rooms that a layer of each scheme goes through: (room of the activation, granularity), room of the product.
ROOMS = {"fp8-block": ("group", "gemm_fp8_block"), "fp8-dynamic": ("token", "gemm_fp8_row")}
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
    for an unknown scheme, and where there is no GPU and `sm` is not given.
    """
    import torch

    from quantlab_kernels.common.gemm import GemmProblem
    from quantlab_kernels.gemm_fp8_block.op import BACKENDS as BLOCK
    from quantlab_kernels.gemm_fp8_row.op import BACKENDS as ROW
    from quantlab_kernels.quantize_fp8.op import BACKENDS as QUANTIZE
    from quantlab_kernels.quantize_fp8.op import Problem

    if scheme not in ROOMS:
        raise UsageError(f"unknown scheme {scheme!r}; {did_you_mean(scheme, SCHEMES)}")
    if sm is None:
        if not torch.cuda.is_available():
            raise UsageError(
                "there is no GPU here: layers run the CPU reference. Give --sm (90 for an H100 or H200) to ask for one"
            )
        major, minor = torch.cuda.get_device_capability()
        sm = 10 * major + minor
    granularity, room = ROOMS[scheme]
    product = {"gemm_fp8_block": BLOCK, "gemm_fp8_row": ROW}[room]
    asked = ((QUANTIZE, Problem(granularity, m, k, sm=sm)), (product, GemmProblem(m, n, k, sm=sm)))
    return [
        {"room": backends.room, "backend": v.backend, "chosen": v.chosen, "reason": v.reason}
        for backends, problem in asked
        for v in backends.explain(problem)
    ]


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
