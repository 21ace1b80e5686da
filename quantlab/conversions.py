"""transformers' conversions of weights, for what lies beside quantized ones: scales are stacked, turned and split as
the weights are, loading and saving.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch
from transformers.core_model_loading import MergeModulelist, SplitModulelist, WeightConverter

from quantlab.checkpoint import STACK_SCALE


class StackScales(MergeModulelist):
    """Stacks the scales of a layer's experts. Its reverse keeps extents of 1, which transformers 5.17 drops."""

    @property
    def reverse_op(self) -> Any:
        return UnstackScales(self.dim)


class UnstackScales(SplitModulelist):
    def convert(self, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
        stacked = next(iter(input_dict.values()))
        shape = (stacked[0] if isinstance(stacked, list) else stacked).shape[1:]
        return {name: scale.reshape(shape) for name, scale in super().convert(input_dict, *args, **kwargs).items()}

    @property
    def reverse_op(self) -> Any:
        return StackScales(self.dim)


def with_scales(converter: Any, tensors: Iterable[str]) -> list[Any]:
    """The converter of some weights, preceded by its twins for what lies beside them or in their place.

    Loading tries converters in order and saving in reverse order; in transformers 5.17 a pattern also matches
    longer names. So the twins come first, and what the weights become is anchored at its end.
    """
    sources, targets = converter._original_source_patterns, converter._original_target_patterns
    if not all(re.search(r"\.weight\$?$", source) for source in sources):
        return [converter]  # the pattern ends before the tensor's name, so the scales match it as they are
    twins = [_twin(converter, name.removeprefix("weight")) for name in tensors]
    converter._original_target_patterns = [target.removesuffix("$") + "$" for target in targets]
    return [*twins, converter]


def with_turned_scales(converter: Any) -> list[Any]:
    """The converter of a stack of experts that lies the other way round, preceded by its twin for the scales. It turns
    them whatever their shape, and back when they are saved: transformers' own looks at the shape of the first, and from
    5.23 on does not turn the second."""
    converter.operations = [type(op)(op.dim0, op.dim1) for op in converter.operations]
    twin = _twin(converter, STACK_SCALE)
    converter._original_target_patterns = [target.removesuffix("$") + "$" for target in converter.target_patterns]
    return [twin, converter]


def _twin(converter: Any, added: str) -> Any:
    """The converter of the tensors whose names have `added` at their ends."""
    twin = WeightConverter(
        [re.sub(r"\$$", "", source) + added for source in converter._original_source_patterns],
        [re.sub(r"\$$", "", target) + added for target in converter._original_target_patterns],
        operations=[StackScales(op.dim) if type(op) is MergeModulelist else op for op in converter.operations],
        force_cpu=converter.force_cpu,
    )
    twin.scope_prefix, twin.base_model_prefix = converter.scope_prefix, converter.base_model_prefix
    return twin
