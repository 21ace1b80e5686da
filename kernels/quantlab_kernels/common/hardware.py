"""Facts about GPUs that dispatch, tuning and rooflines need. Importing it touches no CUDA.

Rates for rooflines: where we measured, the measured one; else the vendor's datasheet (dense, without sparsity, boost
clock), which no kernel reaches. A GPU that is not listed has no roofline, and the benchmarks say so.
"""

from __future__ import annotations

import contextlib
import functools
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Rates:
    """Peak rates. hbm in bytes/s; fp8 and bf16 in FLOP/s of dense matrix products; fp8 None where there is no unit."""

    hbm: float
    bf16: float
    fp8: float | None
    source: str


# HBM of the H200: best large copies and sums on one H200, torch 2.11: 4.3e12 (datasheet 4.8e12).
RATES: dict[str, Rates] = {
    "NVIDIA H200": Rates(4.3e12, 989e12, 1979e12, "HBM measured (large copy), matrix rates from the datasheet"),
    "NVIDIA H100 80GB HBM3": Rates(3.35e12, 989e12, 1979e12, "datasheet"),
    "NVIDIA A100-SXM4-80GB": Rates(2.04e12, 312e12, None, "datasheet"),
    "NVIDIA L40S": Rates(0.864e12, 362e12, 733e12, "datasheet"),
    "NVIDIA GeForce RTX 4090": Rates(1.008e12, 165e12, 330e12, "datasheet"),
}


@dataclass(frozen=True)
class Gpu:
    """One device as CUDA describes it; `rates` is None for a GPU without an entry in `RATES`."""

    name: str
    sm: int
    sm_count: int
    smem_bytes: int
    l2_bytes: int

    @property
    def rates(self) -> Rates | None:
        return RATES.get(self.name)

    @property
    def slug(self) -> str:
        """Name of the GPU in file names: ``NVIDIA_H200``."""
        return self.name.replace(" ", "_").replace("/", "_")


@functools.cache
def gpu(index: int = 0) -> Gpu:
    """The CUDA device with this index. Initialises CUDA."""
    properties = torch.cuda.get_device_properties(index)
    smem = getattr(properties, "shared_memory_per_block_optin", 48 * 1024)
    sm = 10 * properties.major + properties.minor
    return Gpu(properties.name, sm, properties.multi_processor_count, smem, properties.L2_cache_size)


def present_sm() -> int:
    """Compute capability of the first GPU; 90 where there is none, so that problems can still be posed."""
    return gpu().sm if torch.cuda.is_available() else 90


def gpu_of(tensor: torch.Tensor) -> Gpu:
    """The GPU that holds the tensor."""
    return gpu(tensor.device.index or 0)


_HERE = contextlib.nullcontext()


def device_of(tensor: torch.Tensor) -> contextlib.AbstractContextManager[None]:
    """A context in which the GPU of the tensor is torch's current device; costs nothing where it is that already."""
    return _HERE if torch._C._cuda_getDevice() == tensor.get_device() else torch.cuda.device(tensor.device)
