"""The CUDA driver calls that torch does not offer: loading machine code, tensor maps, launches with clusters.

Through ctypes, because a launch must cost little: a kernel is launched with one foreign call on buffers that are
prepared once per thread. Kernels are loaded as libraries, which belong to no context: one handle serves every GPU.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from dataclasses import dataclass
from typing import Any

import torch

_CLUSTER_DIMENSION = 4  # CUlaunchAttributeID
_PROGRAMMATIC_STREAM_SERIALIZATION = 6
_MAX_DYNAMIC_SHARED = 8  # CUfunction_attribute
_CAPTURE_RELAXED = 2  # CUstreamCaptureMode
_INVALID_CONTEXT = 201

UINT8, FLOAT16, FLOAT32, BFLOAT16 = 0, 6, 7, 9  # CUtensorMapDataType
NO_SWIZZLE, SWIZZLE_32, SWIZZLE_64, SWIZZLE_128 = 0, 1, 2, 3  # CUtensorMapSwizzle
_PROMOTE_256 = 3  # CUtensorMapL2promotion


class DriverError(RuntimeError):
    """A driver call failed; the text names the call and the driver's reason."""


class _Attribute(ctypes.Structure):
    _fields_ = (("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_uint * 16))


class LaunchConfig(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3), ("block", ctypes.c_uint * 3), ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p), ("attributes", ctypes.POINTER(_Attribute)), ("count", ctypes.c_uint),
    )  # fmt: skip


@functools.cache
def driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def check(status: int, call: str) -> None:
    """Raise DriverError unless the driver call succeeded."""
    if status == 0:
        return
    text = ctypes.c_char_p()
    driver().cuGetErrorString(status, ctypes.byref(text))
    raise DriverError(f"{call}: {text.value.decode() if text.value else 'unknown error'} ({status})")


@functools.lru_cache(maxsize=16384)  # weights stay where they are, and activations come back to a few addresses
def tensor_map(
    kind: int, pointer: int, columns: int, rows: int, row_bytes: int, box_columns: int, box_rows: int, swizzle: int
) -> bytes:
    """The 128 bytes that describe a 2-D tensor to the copy engine; what lies outside is read as 0 and not written.

    kind       UINT8, FLOAT16, ...
    pointer    address, a multiple of 16;  row_bytes  distance of two rows, a multiple of 16
    box        extents of one copy, at most 256 each; with a swizzle a box row is at most the swizzle's bytes
    """
    storage = (ctypes.c_uint64 * 24)()
    address = (ctypes.addressof(storage) + 63) // 64 * 64
    status = driver().cuTensorMapEncodeTiled(
        ctypes.c_void_p(address), kind, 2, ctypes.c_void_p(pointer), (ctypes.c_uint64 * 2)(columns, rows),
        (ctypes.c_uint64 * 1)(row_bytes), (ctypes.c_uint32 * 2)(box_columns, box_rows), (ctypes.c_uint32 * 2)(1, 1),
        0, swizzle, _PROMOTE_256, 0,
    )  # fmt: skip
    if status != 0:
        described = f"[{rows}, {columns}] at {pointer:#x}, rows {row_bytes} bytes apart, box {box_rows}x{box_columns}"
        check(status, f"cuTensorMapEncodeTiled of {described}")
    return ctypes.string_at(address, 128)


@dataclass(frozen=True)
class Launch:
    """Shape of a launch. grid and block in x; cluster CTAs; shared bytes of dynamic shared memory; early: the kernel
    may start while the one before it ends (it waits itself for that one's results)."""

    grid: int
    block: int
    cluster: int
    shared: int
    early: bool = False


def launch_attributes(cluster: int = 1, early: bool = False) -> tuple[Any, int]:
    """Attributes of a launch, and how many there are."""
    attributes, count = (_Attribute * 2)(), 0
    if cluster > 1:
        attributes[count].id = _CLUSTER_DIMENSION
        attributes[count].value[0:3] = [cluster, 1, 1]
        count += 1
    if early:
        attributes[count].id = _PROGRAMMATIC_STREAM_SERIALIZATION
        attributes[count].value[0] = 1
        count += 1
    return attributes, count


class Kernel:
    """A loaded kernel that takes one struct as its only parameter."""

    def __init__(self, code: bytes, name: str) -> None:
        self._code = code  # the driver may read it lazily
        library, self._handle = ctypes.c_void_p(), ctypes.c_void_p()
        with _RelaxedCapture():
            check(
                driver().cuLibraryLoadData(ctypes.byref(library), code, None, None, 0, None, None, 0),
                "cuLibraryLoadData",
            )
            check(driver().cuLibraryGetKernel(ctypes.byref(self._handle), library, name.encode()), "cuLibraryGetKernel")
        self._shared: dict[int, int] = {}
        self._thread = threading.local()

    def launch(self, shape: Launch, params: bytes, device: int) -> None:
        """Launch on torch's current stream of the device, which must be torch's current device."""
        if self._shared.get(device, 0) < shape.shared:
            self._allow_shared(device, shape.shared)
        try:
            config, buffer, address, pointers = self._thread.prepared[shape, len(params)]
        except (AttributeError, KeyError):
            config, buffer, address, pointers = self._prepare(shape, len(params))
        ctypes.memmove(buffer, params, len(params))
        config.stream = torch._C._cuda_getCurrentRawStream(device)
        status = driver().cuLaunchKernelEx(address, self._handle, pointers, None)
        if status == _INVALID_CONTEXT:  # a thread that has not used CUDA yet
            torch.empty(1, device=f"cuda:{device}")
            status = driver().cuLaunchKernelEx(address, self._handle, pointers, None)
        if status != 0:
            check(status, f"cuLaunchKernelEx {shape}")

    def _prepare(self, shape: Launch, size: int) -> tuple:
        attributes, count = launch_attributes(shape.cluster, shape.early)
        config = LaunchConfig((shape.grid, 1, 1), (shape.block, 1, 1), shape.shared, None, attributes, count)
        buffer = ctypes.create_string_buffer(size)
        pointers = (ctypes.c_void_p * 1)(ctypes.addressof(buffer))
        prepared = (config, buffer, ctypes.byref(config), pointers)
        if not hasattr(self._thread, "prepared"):
            self._thread.prepared = {}
        self._thread.prepared[shape, size] = prepared
        return prepared

    def _allow_shared(self, device: int, size: int) -> None:
        handle = ctypes.c_int()
        check(driver().cuDeviceGet(ctypes.byref(handle), device), "cuDeviceGet")
        status = driver().cuKernelSetAttribute(_MAX_DYNAMIC_SHARED, size, self._handle, handle)
        check(status, f"cuKernelSetAttribute: {size} bytes of shared memory")
        self._shared[device] = size


class _RelaxedCapture:
    """Loading code is allowed while this thread captures a CUDA graph."""

    def __enter__(self) -> None:
        self._mode = ctypes.c_int(_CAPTURE_RELAXED)
        driver().cuThreadExchangeStreamCaptureMode(ctypes.byref(self._mode))

    def __exit__(self, *_: object) -> None:
        driver().cuThreadExchangeStreamCaptureMode(ctypes.byref(self._mode))
