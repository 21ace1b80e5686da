"""A model spread over several GPUs: what accelerate's hooks are needed for, and where they are in the way.

`device_map` puts a hook on every module that moves its inputs to the module's device. Within a block on one device only
the block's own hook ever moves anything; the others cost time in each call and keep layers from being joined.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def device_of(module: Any) -> torch.device:
    """Where a module computes: where its weights lie, or where they are brought from the host's memory or a disk."""
    device: torch.device = next(module.parameters()).device
    brought = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
    return _as_device(brought) if device.type == "meta" and brought is not None else device


def unhook_blocks(model: nn.Module) -> int:
    """Take the hooks off all modules inside blocks that lie on one device; returns how many that were.

    A block keeps its own hook. Offloaded blocks, whose hooks bring weights, and hooks of other kinds stay as they are.
    """
    return sum(_unhook_below(child) if _device(child) else unhook_blocks(child) for child in model.children())


def _device(block: nn.Module) -> Any:
    """Where every module of a hooked block computes, its weights lying there; None where that is not one place."""
    if not hasattr(block, "_hf_hook"):
        return None
    places = {_place(module) for module in block.modules() if hasattr(module, "_hf_hook")}
    weights = {tensor.device for tensor in (*block.parameters(), *block.buffers())}
    one = places.pop()
    return one if not places and weights <= {one} else None


def _place(module: Any) -> torch.device | None:
    from accelerate.hooks import AlignDevicesHook

    hook = module._hf_hook
    if type(hook) is not AlignDevicesHook or hook.offload or hook.execution_device is None:
        return None
    return _as_device(hook.execution_device)


def _as_device(device: Any) -> torch.device:
    """As accelerate names it, GPUs by numbers."""
    return torch.device("cuda", device) if isinstance(device, int) else torch.device(device)


def _unhook_below(block: nn.Module) -> int:
    from accelerate.hooks import remove_hook_from_module

    inner = [module for module in block.modules() if module is not block and hasattr(module, "_hf_hook")]
    for module in inner:
        remove_hook_from_module(module)
        if getattr(vars(module).get("forward"), "__func__", None) is type(module).forward:
            del module.forward  # the class's own, which accelerate leaves bound to the module
    return len(inner)
