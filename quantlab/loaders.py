"""The rules of those who load quantized checkpoints, as a table: who, what, where it is written, and the test of it.

The engines are not needed to check them, and a checkpoint that breaks one does not fail here but on the server, often
without a message. Rules were read in transformers 5.17 and 5.23, vLLM 0.33 and SGLang 0.5.23.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

from quantlab import fused_experts, kinds
from quantlab.checkpoint import (
    KV_SCALES,
    ORDER,
    PACKED,
    SHAPE,
    STACK_SCALE,
    WEIGHT,
    Stored,
    config_of_quantization,
    module_of,
)
from quantlab.fused_experts import flat
from quantlab.shards import TAGS, TensorInfo, TensorSlot
from quantlab.source import Source

if TYPE_CHECKING:
    from quantlab.architecture import Architecture


# Architectures (`model_type`) whose experts readers take quantized in one tensor. transformers would for more, engines
# would not: they look for the scales of the others' experts one by one (Gemma 4) or under no name at all (GraniteMoE).
STACKED = {"qwen3_vl_moe"}


@dataclass(frozen=True)
class View:
    """A quantized checkpoint, as the rules look at it."""

    source: Source
    stored: Stored
    architecture: Architecture | None = None

    @cached_property
    def stacks(self) -> dict[str, TensorInfo]:
        """Name -> experts in one quantized tensor, [E, R, C]."""
        tensors = self.source.tensors if self.stored.layout == "fp8" else {}
        return {
            name: info
            for name, info in tensors.items()
            if info.dtype == "F8_E4M3" and len(info.shape) == 3 and not name.endswith(WEIGHT)
        }

    @cached_property
    def quantized(self) -> dict[str, TensorInfo]:
        """module -> quantized weight; `shape` is [N, K], also of packed ones; that of experts in one tensor, which go
        by its name, is [E * R, C]."""
        found = {name: flat(info) for name, info in self.stacks.items()}
        for name, info in self.source.tensors.items():
            if name.endswith(WEIGHT) and info.dtype == "F8_E4M3" and len(info.shape) == 2:
                found[module_of(name)] = info
            elif name.endswith(PACKED) and info.dtype == "I32" and len(info.shape) == 2:
                found[module_of(name)] = replace(info, shape=(info.shape[0], 8 * info.shape[1]))
        return found

    @cached_property
    def scales(self) -> dict[str, TensorInfo]:
        """module -> scale of its weight."""
        suffix, tensors = self.stored.scale_suffix, self.source.tensors  # the same of all kinds that mix
        stacks = {name: flat(tensors[name + STACK_SCALE]) for name in self.stacks if name + STACK_SCALE in tensors}
        return stacks | {n.removesuffix(suffix): t for n, t in tensors.items() if n.endswith(suffix)}

    @cached_property
    def kv_scales(self) -> dict[str, TensorInfo]:
        """Scales of an FP8 KV cache, by their names."""
        return {name: info for name, info in self.source.tensors.items() if name.endswith(KV_SCALES)}

    @cached_property
    def plain(self) -> dict[str, str]:
        """module -> kind, of the linear layers that are not quantized."""
        model = kinds.Model.of(self.source.config)
        known = self.architecture.kinds if self.architecture else {}
        found = {}
        for name, info in self.source.tensors.items():
            kind = known.get(name) or kinds.kind_of(info, model)
            scale = name.removesuffix(STACK_SCALE) in self.stacks
            if info.dtype in kinds.FLOATS and kind in ("linear", "expert", "head", "router") and not scale:
                found[module_of(name)] = kind
        return found

    def path_of(self, module: str) -> str:
        """The module's path in transformers."""
        known = self.architecture.modules if self.architecture else {}
        return known.get(module if module in self.stacks else module + WEIGHT, module)

    @cached_property
    def plain_linear(self) -> tuple[str, ...]:
        """Linear layers that are not quantized, by the names that transformers has for them: tied heads too."""
        if self.architecture is None:
            return tuple(self.plain)
        linear = self.architecture.linear_modules
        quantized = {self.path_of(module) for module in self.quantized}
        named = [path for path in map(self.path_of, self.plain) if path in linear]
        return tuple(dict.fromkeys([*named, *sorted(linear - quantized)]))

    def scheme_of(self, module: str) -> str | None:
        """ "quantized", "plain", or None for a module that has no weight here."""
        return "quantized" if module in self.quantized else "plain" if module + WEIGHT in self.source.tensors else None


@dataclass(frozen=True)
class LoaderRule:
    reader: str
    says: str
    where: str
    broken: Callable[[View], Iterator[str]]
    advice: str = "leave it with --ignore"


def _weights_have_scales(view: View) -> Iterator[str]:
    for module, weight in view.quantized.items():
        scale = view.scales.get(module)
        stored = view.stored.kind(module)
        wanted = stored.weight.scale_shape(weight.shape)
        if scale is None:
            yield f"{module}: quantized weight without {view.stored.scale_suffix[1:]}"
        elif weight.dtype != TAGS[stored.weight.format.dtype] and stored.layout != "pack-quantized":
            yield f"{module}: weight is {weight.dtype}, config.json says {stored.layout}"
        elif scale.shape != wanted and not (stored.weight.block == (-1, -1) and scale.elements == 1):
            yield f"{module}: scale has shape {list(scale.shape)}, needs {list(wanted)}"
        elif scale.dtype not in kinds.FLOATS or (view.stored.layout == "fp8" and scale.dtype != "F32"):
            yield f"{module}: scale is {scale.dtype}, needs F32"


def _packed_have_shapes(view: View) -> Iterator[str]:
    for module, weight in view.quantized.items():
        if not weight.name.endswith(PACKED):
            continue
        shape = view.source.tensors.get(module + SHAPE)
        if shape is None or (shape.dtype, shape.shape) != ("I64", (2,)):
            yield f"{module}: packed weight without {SHAPE[1:]}, two integers"
        elif shape.end > shape.begin and tuple(view.source.read(shape.name).tolist()) != weight.shape:
            yield f"{module}: {SHAPE[1:]} says {view.source.read(shape.name).tolist()}, packed are {list(weight.shape)}"


def _columns_in_order(view: View) -> Iterator[str]:
    """With another order, which the config does not speak of, scales would go to columns of other groups."""
    for module in view.quantized:
        if module + ORDER in view.source.tensors:
            yield f"{module}: has {ORDER[1:]}, but config.json has no actorder"


def _scales_have_weights(view: View) -> Iterator[str]:
    for module in view.scales:
        if module not in view.quantized:
            found = view.source.tensors.get(module + WEIGHT)
            yield f"{module}: has a scale, but its weight is {found.dtype if found else 'missing'}"


def _kv_scales_fit(view: View) -> Iterator[str]:
    model = kinds.Model.of(view.source.config)
    modules = {module_of(name) for name in view.kv_scales}
    if view.stored.kv:
        keys = (m for m in (*view.quantized, *view.plain) if kinds.leaf_of(m) in ("k_proj", "qkv_proj"))
        modules |= {module_of(m) for m in keys if not kinds.in_tower(m, model) and not kinds.is_mtp(m, model)}
    elif modules and view.stored.layout != "fp8":  # vLLM reads them beside `fp8` too
        yield f"{min(modules)}: has scales of the KV cache, but config.json has no kv_cache_scheme of FP8 per tensor"
    for name in (module + suffix for module in sorted(modules) for suffix in KV_SCALES):
        info = view.kv_scales.get(name)
        if info is None:
            yield f"{name}: is missing"
        elif info.elements != 1 or info.dtype not in kinds.FLOATS:
            yield f"{name}: is {info.dtype} {list(info.shape)}, needs one floating-point number"


class SkipList:
    """Which modules a skip list matches, by the most generous of transformers' readings.

    5.17 takes a listed name as the beginning of a path, whatever follows; 5.23 up to a dot; both also as its end, and
    both as a regular expression, if it is one (`_skips_are_read`).
    """

    def __init__(self, names: Iterable[str]) -> None:
        names = [name.removeprefix("re:") for name in names]
        self._plain = {name for name in names if re.fullmatch(r"[\w.-]+", name) or _unreadable(name)}
        self._lengths = sorted({len(name) for name in self._plain})
        self._patterns = [re.compile(name) for name in names if name not in self._plain]

    def matches(self, module: str) -> bool:
        plain = self._plain
        return any(module[:length] in plain or module[-length:] in plain for length in self._lengths) or any(
            pattern.match(module) for pattern in self._patterns
        )


def _unreadable(pattern: str) -> str | None:
    """What is wrong with a regular expression, or None."""
    try:
        re.compile(pattern)
    except re.error as error:
        return str(error)
    return None


def _skips_are_read(view: View) -> Iterator[str]:
    """Names of `fp8` checkpoints as regular expressions within others, those of compressed-tensors after `re:`."""
    for name in view.stored.skip:
        pattern = f"(?:{name})" if view.stored.layout == "fp8" else name.removeprefix("re:")
        if (view.stored.layout == "fp8" or name.startswith("re:")) and (error := _unreadable(pattern)):
            yield f"{name}: is in the skip list and no regular expression ({error}); loading stops there"


def _skips_no_quantized(view: View) -> Iterator[str]:
    skip = SkipList(view.stored.skip)
    for module in view.quantized:
        if skip.matches(module) or skip.matches(view.path_of(module)):
            yield f"{module}: is quantized, but the skip list matches it"


def _skips_all_plain(view: View) -> Iterator[str]:
    skip = SkipList(view.stored.skip)
    heads = {view.path_of(module) for module, kind in view.plain.items() if kind == "head"} | {"lm_head"}
    found = config_of_quantization(view.source.config) or {}
    listed = view.stored.skip or view.stored.layout != "fp8" or found.get("modules_to_not_convert") is not None
    for module in view.plain_linear:  # without a list the output layer is skipped
        if not skip.matches(module) and (listed or module not in heads):
            yield f"{module}: is a 16-bit linear layer, but the skip list does not name it"


def _experts_one_by_one(view: View) -> Iterator[str]:
    known = view.architecture
    if known is None or view.stored.layout == "fp8":
        return
    for name, info in view.source.tensors.items():
        if len(info.shape) == 3 and known.modules.get(name) in known.unstacked:
            yield f"{name}: holds all experts, and would be ignored"


def _stacks_are_told_apart(view: View) -> Iterator[str]:
    model = kinds.Model.of(view.source.config)
    for name, info in view.stacks.items():
        wanted = view.architecture.stacks.get(name) if view.architecture else None
        if model.model_type not in STACKED:
            yield f"{name}: holds all experts of a {model.model_type or 'model'}"
        elif wanted is None or fused_experts.stack(info, wanted) is None:
            yield f"{name}: shape {list(info.shape)}, needs {list(wanted or ())} or its transpose, and not both"


def _stacks_hold_whole_blocks(view: View) -> Iterator[str]:
    for name, info in view.stacks.items():
        known = view.architecture
        stack = fused_experts.stack(info, known.stacks[name]) if known and name in known.stacks else None
        if stack is not None and any(size % 128 for _, part in stack.parts for size in part.shape):
            yield f"{name}: its matrices are {list(stack.parts[0][1].shape)}, not in multiples of 128"


def _whole_blocks(view: View) -> Iterator[str]:
    """Its `dequantize=True` takes the size of the shape over the grid of scales as the size of a block."""
    for module, scale in view.scales.items():
        weight = view.quantized.get(module)
        if weight and any(s and size % s for size, s in zip(weight.shape, scale.shape, strict=False)):
            yield f"{module}: {list(weight.shape)} is not divisible by its grid of scales {list(scale.shape)}"


def _exact_names(view: View) -> Iterator[str]:
    if any(name.startswith("re:") for name in view.stored.skip):
        return
    listed, model = set(view.stored.skip), kinds.Model.of(view.source.config)
    for module, kind in view.plain.items():
        if kind in ("linear", "expert") and module not in listed and not kinds.is_mtp(module, model):
            yield f"{module}: is a 16-bit layer, but not in the skip list under its full name"


def _fused_agree(view: View) -> Iterator[str]:
    for group, members in _fused(view):
        if len({view.scheme_of(member) for member in members}) > 1:
            yield f"{group}: fused into one layer, but only some members are quantized"
        elif len({view.stored.kind(member) for member in members}) > 1:
            yield f"{group}: fused into one layer, but its members are quantized in different ways"


def _merged_whole_blocks(view: View, *, but_last: bool) -> Iterator[str]:
    for group, members in _fused(view):
        rows = view.stored.kind(members[0]).weight.block[0]
        for member in members[: len(members) - but_last]:
            weight = view.quantized.get(member)
            if weight and rows > 1 and weight.shape[0] % rows:
                yield f"{group}: {kinds.leaf_of(member)} has {weight.shape[0]} rows, not a multiple of {rows}"


def _fused(view: View) -> Iterator[tuple[str, list[str]]]:
    """Fused groups of layers with more than one member here, and lists of experts."""
    groups: dict[tuple[str, ...], None] = {}
    experts: dict[str, list[str]] = defaultdict(list)
    for module in (*view.quantized, *(m for m, kind in view.plain.items() if kind in ("linear", "expert"))):
        path = kinds.experts_of(module)
        if path:
            experts[path].append(module)
        groups.setdefault(kinds.fused_group(module))
    for group in groups:
        members = [member for member in group if view.scheme_of(member)]
        if len(members) > 1:
            yield "+".join((members[0], *map(kinds.leaf_of, members[1:]))), members
    for path, members in experts.items():
        yield path, sorted(members)


def _head_is_plain(view: View) -> Iterator[str]:
    for module in view.quantized:
        if kinds.leaf_of(module) in ("lm_head", "embed_tokens"):
            yield f"{module}: is quantized; the engine knows no quantized head or embedding"


RULES = (
    LoaderRule("all", "every quantized weight has its scale", "checkpoint.py", _weights_have_scales),
    LoaderRule("all", "every scale has its quantized weight", "checkpoint.py", _scales_have_weights),
    LoaderRule("all", "columns of a quantized weight are in order", "checkpoint.py", _columns_in_order),
    LoaderRule(
        "compressed-tensors", "packed weights have their shape", "compressors/pack_quantized", _packed_have_shapes
    ),
    LoaderRule(
        "vLLM",
        "every layer has its scales of an FP8 KV cache",
        "quantization/kv_cache.py: BaseKVCacheMethod",
        _kv_scales_fit,
    ),
    LoaderRule(
        "transformers",
        "the skip list can be read",
        "quantizers/quantizers_utils.py: should_convert_module",
        _skips_are_read,
    ),
    LoaderRule(
        "transformers",
        "the skip list matches no quantized layer",
        "quantizers/quantizers_utils.py: should_convert_module",
        _skips_no_quantized,
    ),
    LoaderRule(
        "transformers",
        "the skip list matches every 16-bit nn.Linear",
        "quantizers/quantizers_utils.py: should_convert_module",
        _skips_all_plain,
    ),
    LoaderRule(
        "transformers",
        "experts that it takes one by one from compressed-tensors checkpoints are not one tensor",
        "quantizers/base.py: MODULES_TO_PATCH_FOR_QUANTIZATION",
        _experts_one_by_one,
        "use --scheme fp8-block, which leaves them as they are",
    ),
    LoaderRule(
        "vLLM",
        "experts in one quantized tensor are of an architecture that it knows so, their shape tells how they lie",
        "models/qwen3_vl_moe.py: is_fused_checkpoint_transposed",
        _stacks_are_told_apart,
    ),
    LoaderRule(
        "vLLM",
        "matrices of experts in one tensor hold whole blocks",
        "layers/fused_moe/routed_experts.py: load_weights",
        _stacks_hold_whole_blocks,
    ),
    LoaderRule(
        "transformers",
        "shapes are multiples of the grid of scales",
        "integrations/finegrained_fp8.py: Fp8Dequantize",
        _whole_blocks,
    ),
    LoaderRule(
        "vLLM",
        "16-bit layers are listed under their full names",
        "quantization/utils/quant_utils.py: is_layer_skipped",
        _exact_names,
    ),
    LoaderRule(
        "vLLM",
        "layers that it fuses have one scheme",
        "quantization/utils/quant_utils.py: is_layer_skipped",
        _fused_agree,
    ),
    LoaderRule(
        "vLLM",
        "members of a fused layer, but the last, hold whole blocks",
        "quantization/utils/fp8_utils.py: validate_fp8_block_shape",
        lambda view: _merged_whole_blocks(view, but_last=True),
    ),
    LoaderRule("vLLM", "the output head is not quantized", "quantization/fp8.py: get_quant_method", _head_is_plain),
    LoaderRule(
        "SGLang",
        "every member of a fused layer holds whole blocks",
        "quantization/fp8.py: create_weights",
        lambda view: _merged_whole_blocks(view, but_last=False),
    ),
)


def broken_rules(view: View) -> Iterator[tuple[str, str]]:
    """(one line, what to do about it before quantizing) for everything that a loader would stumble over."""
    for rule in RULES:
        for problem in rule.broken(view):
            yield f"{problem} ({rule.reader}: {rule.says})", rule.advice


def not_written_yet(view: View, slots: Iterable[TensorSlot]) -> View:
    """A view of the checkpoint that will hold these tensors."""
    nowhere = {slot.name: TensorInfo(slot.name, slot.dtype, slot.shape, view.source.folder, 0, 0) for slot in slots}
    return replace(view, source=replace(view.source, tensors=nowhere))
