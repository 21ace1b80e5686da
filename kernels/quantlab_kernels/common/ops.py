"""The one operator library of the project.

`define` beats `torch.library.custom_op` by a factor of three in overhead per call, and one namespace that is defined
once makes a second import of the package under another name fail loudly instead of registering twice.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

LIBRARY = torch.library.Library("quantlab", "DEF")


def define(
    schema: str,
    *,
    fake: Callable[..., Any],
    cpu: Callable[..., Any],
    cuda: Callable[..., Any],
    tags: tuple[torch.Tag, ...] = (),
) -> Any:
    """Register ``quantlab::<schema>`` and return the callable operator.

    schema  "name(Tensor x, int n) -> Tensor"
    fake    shapes and dtypes of the result without data; makes all checks of the arguments, `cpu` and `cuda` call the
            same checks
    cpu     the reference implementation
    cuda    launches a kernel; never synchronizes
    tags    in addition to the two that hold for all
    """
    name = schema.split("(", 1)[0]
    LIBRARY.define(schema, tags=[torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order, *tags])
    LIBRARY.impl(name, without_autocast(cpu), "CPU")
    LIBRARY.impl(name, on_one_device(name, cuda), "CUDA")
    torch.library.register_fake(f"quantlab::{name}", fake, lib=LIBRARY)
    return getattr(torch.ops.quantlab, name).default


def without_autocast(reference: Callable[..., Any]) -> Callable[..., Any]:
    """`reference` in the dtypes that it names, also where its caller asks torch to choose others."""

    @functools.wraps(reference)
    def exact(*args: Any) -> Any:
        if not torch.is_autocast_enabled("cpu"):
            return reference(*args)
        with torch.autocast("cpu", enabled=False):
            return reference(*args)

    return exact


def on_one_device(name: str, launch: Callable[..., Any]) -> Callable[..., Any]:
    """`launch` for tensors that are all where the first one is; RuntimeError for others, whose addresses a kernel would
    take for its own device's. Tensors without elements may be anywhere."""

    @functools.wraps(launch)
    def checked(*args: Any) -> Any:
        here = args[0].get_device()
        for x in args:
            if isinstance(x, Tensor) and x.get_device() != here and x.numel():
                devices = f"{args[0].device} and another on {x.device}"
                raise RuntimeError(f"{name}: a tensor is on {devices}; needs all on one device")
        return launch(*args)

    return checked


def require(condition: Any, message: Callable[[], str]) -> None:
    """`torch._check` for conditions that mostly are plain True: that one costs a microsecond each time.

    Raises RuntimeError with the message; a condition on symbolic shapes becomes an assumption of the graph.
    """
    if condition is not True:
        torch._check(condition, message)
