"""Triton kernels launched again for a quarter of the time.

Triton binds, specialises and looks up a kernel anew in every call: about 15 us of Python, four times what the kernels
of a decoding step take on the GPU. The first call here goes that way; what it compiled is then launched through the
driver for every call with the same grid, numbers and dtypes. Kernels that need more than a plain launch (scratch
memory, clusters), operands that are not aligned to 16 bytes and Triton's interpreter keep Triton's own way. Triton's
launch hooks see the first call only.

A kernel of a few microseconds waits as long for its launch as it runs. One that calls `begin` first may be launched
while the kernel before it still runs (programmatic dependent launch, from sm_90 on), as our kernels in CUDA are: it
waits for that one's results by itself, and then lets the next one be launched.
"""

from __future__ import annotations

import ctypes
import threading
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantlab_kernels.common import driver
from quantlab_kernels.common.hardware import gpu

_MOST = 4096  # prepared launches of a thread; a model has a few dozen for each number of tokens
_SCALARS = {
    "i32": ctypes.c_int32, "u32": ctypes.c_uint32, "i64": ctypes.c_int64, "u64": ctypes.c_uint64,
    "fp32": ctypes.c_float,
}  # fmt: skip
_PLAIN = {"num_ctas": 1, "global_scratch_size": 0, "profile_scratch_size": 0, "launch_cooperative_grid": False}


@triton.jit
def begin(EARLY: tl.constexpr):
    """To be called before a kernel that is launched `early` touches memory. The next kernel may come once this one has
    waited: what it does before it waits itself then meets no kernel but this one."""
    if EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


class _PerThread(threading.local):
    """Buffers of a launch belong to one thread."""

    def __init__(self) -> None:
        self.prepared: dict[tuple, _Prepared | None] = {}


class Launcher:
    """Calls one `triton.jit` kernel whose parameters are tensors, then numbers, then constants.

    early    its last constant says whether it is launched while the kernel before it runs, for `begin`
    options  of Triton's compiler, the same for every launch. Products are added unrounded without enable_fp_fusion =
             False; that is always said, because Triton 3.9 warns where it is not and 3.10 rounds them.
    """

    def __init__(self, kernel: Any, *, early: bool = False, **options: Any) -> None:
        self.kernel = kernel
        self.early = early
        self.options = {"enable_fp_fusion": True} | options
        self._here = _PerThread()

    def __call__(
        self,
        grid: tuple[int, ...],
        tensors: tuple[Tensor, ...],
        numbers: tuple[int | float, ...],
        constants: tuple,
        num_warps: int,
    ) -> None:
        """Launch on torch's current stream of the tensors' device, which must be torch's current device."""
        addresses = [tensor.data_ptr() for tensor in tensors]
        device = tensors[0].get_device()
        early = self.early and device >= 0 and gpu(device).sm >= 90
        if self.early:
            constants = (*constants, early)
        key = (grid, numbers, constants, num_warps, device, *[tensor.dtype for tensor in tensors])
        prepared = self._here.prepared.get(key)
        if prepared is None or any(address % 16 for address in addresses):
            compiled = self.kernel[grid](*tensors, *numbers, *constants, num_warps=num_warps, **self.options)
            if key not in self._here.prepared and not any(address % 16 for address in addresses):
                if len(self._here.prepared) >= _MOST:
                    self._here.prepared.clear()
                self._here.prepared[key] = prepare(compiled, grid, (*tensors, *numbers, *constants), early)
            return
        prepared.launch(addresses, device)


class _Prepared:
    """A compiled kernel with its grid and numbers; only addresses change between launches."""

    def __init__(self, function: int, config: driver.LaunchConfig, values: list[Any], count: int) -> None:
        self._function, self._config, self._values = ctypes.c_void_p(function), config, values
        self._addresses = (ctypes.c_uint64 * count)()
        step = ctypes.sizeof(ctypes.c_uint64)
        start = ctypes.addressof(self._addresses)
        slots = iter(range(count))
        pointers = [start + step * next(slots) if value is None else ctypes.addressof(value) for value in values]
        self._params = (ctypes.c_void_p * len(pointers))(*pointers)
        self._config_address = ctypes.byref(config)
        self._launch = driver.driver().cuLaunchKernelEx

    def launch(self, addresses: list[int], device: int) -> None:
        self._addresses[:] = addresses  # type: ignore[assignment]
        self._config.stream = torch._C._cuda_getCurrentRawStream(device)
        status = self._launch(self._config_address, self._function, self._params, None)
        if status != 0:
            driver.check(status, "cuLaunchKernelEx of a Triton kernel")


def prepare(compiled: Any, grid: tuple[int, ...], arguments: tuple, early: bool = False) -> _Prepared | None:
    """What a later launch needs, or None where the kernel needs more than a plain launch or Triton has changed."""
    try:
        metadata, types = compiled.metadata, list(compiled.src.signature.values())
        if any(getattr(metadata, name, plain) != plain for name, plain in _PLAIN.items()):
            return None
        values: list[Any] = []
        for kind, argument in zip(types, arguments, strict=True):
            if kind != "constexpr":  # which includes numbers that are 1
                values.append(None if kind.startswith("*") else _SCALARS[kind](argument))
        tensors = sum(isinstance(argument, Tensor) for argument in arguments)
        if sum(value is None for value in values) != tensors:
            return None
        block, shared = 32 * metadata.num_warps, metadata.shared
        function = compiled.function
    except (AttributeError, KeyError, ValueError, TypeError):
        return None
    # Two scratch addresses that Triton passes behind the arguments; kernels that use none read none.
    values += [ctypes.c_uint64(0), ctypes.c_uint64(0)]
    extents = (ctypes.c_uint * 3)(*grid, *(1 for _ in range(3 - len(grid))))
    attributes, count = driver.launch_attributes(early=early)
    config = driver.LaunchConfig(extents, (ctypes.c_uint * 3)(block, 1, 1), shared, None, attributes, count)
    return _Prepared(function, config, values, tensors)
