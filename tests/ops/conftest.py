"""A kernel that writes late, and kernels that do not wait for it: what shows that a test of early launches can fail."""

from __future__ import annotations

import functools
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import quantlab_kernels.common
from quantlab_kernels.common import driver, nvrtc

_WAIT = "griddepcontrol.wait;"
_LATE_US = 2000  # in which a host that is busy launches the next kernel too
_LATE_COPY = """
#include "sm90.cuh"
struct Params { const u32* from; u32* to; u64 words, nanoseconds; };
DEVICE u64 nanoseconds() {
  u64 now;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
  return now;
}
extern "C" __global__ void late_copy(const __grid_constant__ Params p) {
  let_next_kernel_start();
  const u64 begin = nanoseconds();
  while (nanoseconds() - begin < p.nanoseconds) {}
  for (u64 i = threadIdx.x; i < p.words; i += blockDim.x) p.to[i] = p.from[i];
}
"""


@pytest.fixture(scope="session")
def late_results() -> Callable[[Callable[[Tensor, Tensor], None], Tensor, Tensor], list[bool]]:
    """``late_results(launch, a, expected)``: whether ``launch(a, out)`` gives what is expected where it may start 2 ms
    before `a`, zeros until then, is written; five times."""
    header = (Path(quantlab_kernels.common.__file__).parent / "sm90.cuh").read_text()
    copy = driver.Kernel(nvrtc.cubin(nvrtc.Source("late_copy", _LATE_COPY, {"sm90.cuh": header})), "late_copy")

    def result(launch: Callable[[Tensor, Tensor], None], a: Tensor, expected: Tensor) -> bool:
        late, out = torch.zeros_like(a), torch.full_like(expected, torch.nan)
        words = a.numel() * a.element_size() // 4
        params = struct.pack("<QQQQ", a.data_ptr(), late.data_ptr(), words, 1000 * _LATE_US)
        torch.cuda.synchronize()
        copy.launch(driver.Launch(1, 256, 1, 0), params, a.get_device())
        launch(late, out)
        torch.cuda.synchronize()
        return torch.equal(out, expected)

    return lambda launch, a, expected: [result(launch, a, expected) for _ in range(5)]


@pytest.fixture(scope="session")
def without_wait() -> Callable[[Callable[..., nvrtc.Source], str], Callable[..., driver.Kernel]]:
    """``without_wait(source, name)``: a backend's `kernel` of the same sources, which waits for no kernel before."""

    def kernels(source: Callable[..., nvrtc.Source], name: str) -> Callable[..., driver.Kernel]:
        @functools.cache
        def kernel(*given: object) -> driver.Kernel:
            found = source(*given)
            header = found.headers["sm90.cuh"]
            assert header.count(_WAIT) == 1
            assert _WAIT not in found.text
            hasty = replace(found, headers={**found.headers, "sm90.cuh": header.replace(_WAIT, "")})
            return driver.Kernel(nvrtc.cubin(hasty), name)

        return kernel

    return kernels
