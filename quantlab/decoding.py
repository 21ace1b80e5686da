"""Decoding steps that the GPU does not wait for: what Python does around each step of `generate`, for models of ours.

**Stopping.** `generate` asks after every step whether all sequences have ended, and waits for the answer: the GPU idles
while Python prepares the next step. transformers can read the answer one step late and undo the step too many
(`DeferredStopCheck`), and does so on Apple's GPUs alone; our models do it on CUDA.

**Guards.** A compiled step begins by comparing thousands of attributes of modules and parameters with what they were
when it was compiled, more than a millisecond for a model of 32 layers. Inside `generate` they stay as they are, so they
are compared when it begins (`_structure`), and guards stay on what does change: inputs and caches.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.generation import GenerationMixin, utils

_COMPILED = "_quantlab_compiled"  # of a model: its structure when the step was compiled, and the step
_LATE: ContextVar[bool] = ContextVar("quantlab_late_stops", default=False)


def prepare(model: Any) -> None:
    """Take both costs off the decoding steps of a model; one that cannot generate stays as it is."""
    if not isinstance(model, GenerationMixin):
        return
    _stop_late(model)
    if hasattr(type(model), "get_compiled_call"):
        model.get_compiled_call = types.MethodType(_compiled_call, model)


def _stop_late(model: Any) -> None:
    check = getattr(utils, "DeferredStopCheck", None)  # transformers before 5.16 has none
    if check is None:
        return
    if not hasattr(check.is_supported, "__wrapped__"):
        check.is_supported = staticmethod(_also_on_cuda(check.is_supported))
    model.generate = types.MethodType(_generate, model)


@functools.wraps(GenerationMixin.generate)
def _generate(self: Any, *args: Any, **kwargs: Any) -> Any:
    with _late_stops():
        return type(self).generate(self, *args, **kwargs)


@contextmanager
def _late_stops() -> Iterator[None]:
    token = _LATE.set(True)
    try:
        yield
    finally:
        _LATE.reset(token)


def _also_on_cuda(is_supported: Any) -> Any:
    """transformers' own answer, and on CUDA, inside `_generate`, the one that it gives on Apple's GPUs."""

    @functools.wraps(is_supported)
    def wrapped(device: torch.device, cache: Any, cache_is_returned: bool, is_assistant: bool) -> bool:
        if _LATE.get() and device.type == "cuda" and not cache_is_returned:  # one that is has to be cropped every step
            device = torch.device("mps")
        return is_supported(device, cache, cache_is_returned, is_assistant)

    return wrapped


def _compiled_call(self: Any, compile_config: Any) -> Any:
    """`get_compiled_call` of a model: a step without guards on modules while they are what they were."""
    usual = type(self).get_compiled_call(self, compile_config)
    chosen = compile_config is not None or self.generation_config.compile_config is not None
    if chosen or usual == self.__call__ or _changes_as_it_goes(self):
        return usual
    known = self.__dict__.pop(_COMPILED, None)
    structure = _structure(self)
    if known is None or known[0] != structure:
        step = torch.compile(self.__call__, backend=_Graphs(), options={"guard_filter_fn": _on_inputs})
        known = structure, step
    self.__dict__[_COMPILED] = known
    return known[1]


def _changes_as_it_goes(model: nn.Module) -> bool:
    """Whether steps change modules: rotary embeddings that depend on the length replace their frequencies."""
    kinds = (str(getattr(module, "rope_type", "")) for module in model.modules())
    return any("dynamic" in kind or "longrope" in kind for kind in kinds)


class _Graphs:
    """Inductor with CUDA graphs, as in the mode "reduce-overhead". A backend of one model's own: steps are looked up by
    backend and guards, and without guards on modules another model of the class would find this one's."""

    def __call__(self, graph: Any, inputs: Any) -> Any:
        from torch._inductor.compile_fx import compile_fx

        return compile_fx(graph, inputs, config_patches={"triton.cudagraphs": True})

    def reset(self) -> None:
        from torch._inductor.cudagraph_trees import reset_cudagraph_trees

        reset_cudagraph_trees()

    def __deepcopy__(self, memo: Any) -> _Graphs:
        return _Graphs()


def _on_inputs(guards: Any) -> list[bool]:
    """Which guards stay: those that do not pass through a module."""
    return [not any(part in guard.name for part in ("_modules", "_parameters", "_buffers")) for guard in guards]


def _structure(model: Any) -> list[Any]:
    """Everything about modules, parameters, buffers and the configuration that a compiled step takes for granted."""
    config = model.config
    parts: list[Any] = [_identity(vars(c)) for c in (config, *(getattr(config, name) for name in config.sub_configs))]
    for module in model.modules():
        parts.append((id(module), *((name, _identity(value)) for name, value in vars(module).items())))
    return parts


def _identity(value: Any) -> Any:
    """Numbers and texts by value, tensors by what code was generated for, collections by what is in them, other
    objects by being the same. Caches are looked at in every step."""
    if isinstance(value, int | float | str | torch.dtype | None):
        return value
    if isinstance(value, Tensor):
        return id(value), value.dtype, value.device, value.shape, value.stride()
    if isinstance(value, dict):
        return tuple((key, _identity(item)) for key, item in value.items())
    if isinstance(value, list | tuple | set):
        return tuple(map(_identity, value))
    return None if isinstance(value, Cache) else id(value)
