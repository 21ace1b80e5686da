"""Attention modules turn their queries and keys in one launch instead of the dozen of transformers' formula.

A module's `forward` looks the function up among the globals of its file. A module that takes part gets a `forward` of
its own with the same code over other globals, in which that one name is ours; no class and no file of transformers is
changed. Whether a function is the embedding that our kernel computes is found by trying it, not from its name or a list
of models: interleaved or upcasting variants give other bits and are left alone.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from quantlab_kernels import rope
from quantlab_kernels.rope.reference import rotate

NAME = "apply_rotary_pos_emb"


def fuse_rotary(module: nn.Module) -> bool:
    """Bind a `forward` with the fused embedding to the module; False where its class has none that fits."""
    if "forward" in vars(module):
        return False
    forward = _with_fused(type(module).forward)
    if forward is None:
        return False
    module.forward = MethodType(forward, module)
    return True


@cache
def _with_fused(forward: Callable[..., Any]) -> Callable[..., Any] | None:
    if not isinstance(forward, FunctionType) or NAME not in forward.__code__.co_names:
        return None
    own = forward.__globals__.get(NAME)
    if not callable(own):
        return None
    turns_all, turns_part = (_is_rotary(own, r) for r in (8, 4))
    if not turns_all:
        return None
    # Without a name torch.compile does not take these globals for those of the module of that name.
    scope = {name: value for name, value in forward.__globals__.items() if name != "__name__"}
    scope[NAME] = _fused(own, turns_part)
    made = FunctionType(forward.__code__, scope, forward.__name__, forward.__defaults__, forward.__closure__)
    made.__kwdefaults__, made.__module__, made.__qualname__ = (
        forward.__kwdefaults__, forward.__module__, forward.__qualname__
    )  # fmt: skip
    return made


def _fused(own: Callable[..., Any], partial: bool) -> Callable[..., Any]:
    """`own` by one kernel where nothing asks for gradients or a graph; the compiler fuses `own` better by itself.

    partial  `own` lets channels beyond those of the cosines pass through
    """

    def apply_rotary_pos_emb(*args: Any, **kwargs: Any) -> Any:
        dim = kwargs.get("unsqueeze_dim", 1)
        plain = len(args) == 4 and kwargs.keys() <= {"unsqueeze_dim"} and dim in (1, 2)
        if not plain or torch.compiler.is_compiling() or torch.is_grad_enabled():
            return own(*args, **kwargs)
        q, k, cos, sin = args
        if dim == 2:  # [B, S, H, D]
            q, k = q.transpose(1, 2), k.transpose(1, 2)
        if not _fits(q, k, cos, sin, partial):
            if dim == 2:
                q, k = q.transpose(1, 2), k.transpose(1, 2)
            return own(q, k, cos, sin, **kwargs)
        q, k = rope(q, k, cos, sin)
        return (q, k) if dim == 1 else (q.transpose(1, 2), k.transpose(1, 2))

    return apply_rotary_pos_emb


def _fits(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, partial: bool) -> bool:
    if not (q.ndim == k.ndim == 4 and cos.ndim == 3 and cos.shape == sin.shape):
        return False
    batch, _, length, d = q.shape
    if k.shape[0] != batch or k.shape[2] != length or k.shape[3] != d:
        return False
    if cos.shape[0] not in (1, batch) or cos.shape[1] != length or cos.shape[2] % 2:
        return False
    turns = cos.shape[2] == d or (partial and cos.shape[2] < d)
    return turns and q.dtype == k.dtype == cos.dtype == sin.dtype and q.device == cos.device


@cache
def _is_rotary(function: Callable[..., Any], turning: int) -> bool:
    """Whether the function gives the bits of `rotate` for the first `turning` of eight channels, in 16 bits too."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for dtype in (torch.float32, torch.bfloat16):
            q, k = (torch.randn(2, heads, 4, 8, generator=generator).to(dtype) for heads in (3, 1))
            cos, sin = (torch.randn(2, 4, turning, generator=generator).to(dtype) for _ in range(2))
            try:
                found = function(q, k, cos, sin)
                same = len(found) == 2 and all(
                    torch.equal(out, rotate(x, cos, sin)) for out, x in zip(found, (q, k), strict=True)
                )
            except Exception:  # another function of that name: any error says that it is not this one
                return False
            if not same:
                return False
    return True
