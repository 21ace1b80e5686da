"""Decoding steps that the GPU does not wait for.

`generate` asks after every step whether all sequences have ended, and waits for the answer: the GPU idles while Python
prepares the next step, for about as long as a step of a quantized model of 8 billion weights takes. transformers can
read the answer one step late and undo the step too many (`DeferredStopCheck`), and does so on Apple's GPUs alone.
Models with our layers, attention or caches do it on CUDA.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from transformers.generation import GenerationMixin, utils

_LATE: ContextVar[bool] = ContextVar("quantlab_late_stops", default=False)


def stop_late(model: Any) -> None:
    """Let `model.generate` read whether it is to stop one step late; a model that cannot generate stays as it is."""
    check = getattr(utils, "DeferredStopCheck", None)  # no public name: another version may have none
    if check is None or not isinstance(model, GenerationMixin):
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
