"""What a module of a model computes: found by trying it on random input, not from a list of models."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn


def alike(ours: Tensor, theirs: Tensor, within: float) -> bool:
    """Whether two results of one formula differ by so small a share of their norm; False for other shapes and NaN."""
    if ours.shape != theirs.shape:
        return False
    ours, theirs = ours.double(), theirs.double()
    return bool((ours - theirs).norm() <= within * theirs.norm())


def is_silu(act: Any) -> bool:
    """Whether a module computes ``x * sigmoid(x)``."""
    return isinstance(act, nn.SiLU) or type(act).__name__ == "SiLUActivation"


def untouched(module: nn.Module, forward: Any = None) -> bool:
    """Whether calling a module is nothing but its `forward`: its class's, or the one that it was given."""
    return vars(module).get("forward") is forward and not (module._forward_hooks or module._forward_pre_hooks)


def epsilon(norm: Any) -> float | None:
    """What a norm adds to the mean of squares; None where it does not say."""
    eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    return None if eps is None else float(eps)


@torch.no_grad()
def norm_offset(norm: nn.Module) -> float | None:
    """0 for ``weight * x / rms(x)``, 1 for ``(1 + weight) * x / rms(x)``, None for anything else."""
    weight, eps = getattr(norm, "weight", None), epsilon(norm)
    if not isinstance(weight, Tensor) or weight.ndim != 1 or weight.is_meta or len(list(norm.parameters())) != 1:
        return None
    if eps is None or len(inspect.signature(norm.forward).parameters) != 1:  # state-space models gate theirs
        return None
    x = torch.randn(4, len(weight), generator=torch.Generator().manual_seed(0)).to(weight) + 1
    found, plain = norm(x).float(), nn.functional.rms_norm(x.float(), weight.shape, eps=eps)
    for offset in (0.0, 1.0):
        if torch.allclose(found, plain * (offset + weight.float()), rtol=2e-2, atol=1e-3):
            return offset
    return None
