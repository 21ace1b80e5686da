"""What a quantized KV cache would make of each layer's keys and values.

Keys are looked at as they leave their projection, before the rotary embedding: plainly, with one scale for each token
and head, and as our cache keeps them, less their mean and over the largest distance from it of each channel. Attention
does not see a constant that all keys share, so it is left out of the signal that errors are held against.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from quantlab.kinds import leaf_of, position
from quantlab_calib.observers import Ratio
from quantlab_kernels.common.kv import dequantize_rows, quantize_rows

CODES = {"fp8": "e4m3", "int8": "int8", "int4": "int4"}


class CacheErrors:
    """Hooks on a model's key and value projections; `rows()` after data ran through it."""

    def __init__(self, model: nn.Module) -> None:
        self.ratios: dict[tuple[str, str], Ratio] = {}
        self.extremes: dict[str, tuple[Tensor, Tensor]] = {}  # of keys, per channel: least and largest
        self.hooks = [
            module.register_forward_hook(self._hook(name, heads))
            for name, module in model.named_modules()
            if leaf_of(name) in ("k_proj", "v_proj") and (heads := _heads(model, name, module))
        ]

    def remove(self) -> None:
        for hook in self.hooks:
            hook.remove()

    def rows(self) -> list[dict[str, Any]]:
        """A row for each layer and form: depth, form ("keys, int4, centred"), sqnr_db."""
        found = []
        for (name, form), ratio in self.ratios.items():
            if ratio.decibels is not None:
                found.append({"module": name, "depth": position(name)[0], "form": form, "sqnr_db": ratio.decibels})
        return found

    def keys(self) -> list[dict[str, Any]]:
        """For each layer's keys: largest magnitude of each channel, plainly and around the middle of its range."""
        return [
            {
                "module": name,
                "channels": torch.maximum(low.abs(), high.abs()).tolist(),
                "centred": ((high - low) / 2).tolist(),
            }
            for name, (low, high) in self.extremes.items()
        ]

    def _hook(self, name: str, heads: int) -> Callable[..., None]:
        def look(_module: nn.Module, _args: Any, output: Tensor) -> None:
            x = output.detach().to(torch.float32).unflatten(-1, (heads, -1))  # [B, S, H, D]
            if x.ndim != 4 or not x.numel():
                return
            if leaf_of(name) == "v_proj":
                self._add(name, "values", x, torch.zeros(()), torch.ones(()), x)
                return
            mean = x.mean(dim=1, keepdim=True)
            spread = (x - mean).abs().amax(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
            self._add(name, "keys, plain", x, torch.zeros(()), torch.ones(()), x - mean)
            self._add(name, "keys, centred", x, mean, spread, x - mean)
            low, high = x.amin(dim=(0, 1)).flatten(), x.amax(dim=(0, 1)).flatten()
            before = self.extremes.get(name, (low, high))
            self.extremes[name] = torch.minimum(low, before[0]), torch.maximum(high, before[1])

        return look

    def _add(self, name: str, form: str, x: Tensor, mean: Tensor, spread: Tensor, signal: Tensor) -> None:
        for label, code in CODES.items():
            codes, scale = quantize_rows((x - mean) / spread, code, torch.bfloat16)  # type: ignore[arg-type]
            error = dequantize_rows(codes, scale, torch.float32) * spread + mean - x
            self.ratios.setdefault((name, f"{form}, {label}"), Ratio()).add(signal, error)


def _heads(model: nn.Module, name: str, module: nn.Module) -> int:
    """Number of heads that a projection writes; 0 where it is not known."""
    size = getattr(model.get_submodule(name.rpartition(".")[0]), "head_dim", None)
    features = getattr(module, "out_features", None)
    return features // size if isinstance(size, int) and isinstance(features, int) and features % size == 0 else 0
