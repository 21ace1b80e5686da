"""What transformers would build from a config, and which of its modules each tensor of a checkpoint belongs to.

The model is built on the meta device, and checkpoint names go through transformers' own conversion mapping, so the
answer agrees with the loader of the installed version. Guessing modules from tensor names alone (the alternative, and
what is left for architectures transformers does not know) cannot tell a router or a tied head from a layer.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quantlab.errors import PreflightError, one_line
from quantlab.source_patterns import weights_read, weights_written

KINDS = ("linear", "expert", "router", "embedding", "head", "conv", "norm", "other")


@dataclass(frozen=True)
class Architecture:
    """A checkpoint's tensors as transformers sees them. Tensors that it would ignore are in neither mapping.

    kinds           checkpoint tensor -> one of `KINDS`. "expert" is the weight of routed experts, one matrix per
                    expert or all of them in one 3-D tensor; "head" is the output layer and every linear layer that
                    shares its weight; biases, scalars, layers that transformers keeps in 32 bits and weights that it
                    rearranges while loading or uses without calling their layer are "other"
    modules         checkpoint tensor -> path of the module that owns it in transformers' tree
    linear_modules  paths of every `nn.Linear`, tied heads included
    class_name      the model class
    shapes          checkpoint tensor -> shape that the model has for it, where loading does not change the shape
    unstacked       paths of experts that are one tensor here, and one by one in compressed-tensors checkpoints
    foreign         paths of experts that our layers cannot replace -> why
    stacks          checkpoint tensor -> shape [E, N, K] of the parameter of experts that it is all of
    ours            checkpoint tensors of single experts that our loader takes and transformers does not: it knows the
                    experts in one tensor only
    expert_modules  paths of modules called `experts`, each of which transformers replaces in an `fp8` checkpoint that
                    does not skip it
    missing         parameters that no tensor of the checkpoint goes to, and tensors of single experts that a parameter
                    of all of them lacks: loading would make the former up, and stop at the latter
    gaps            those of `missing` that other layers or experts have. The rest may be so by intent: checkpoints come
                    without the head of the class in their config, without poolers, without what only training uses
    """

    kinds: dict[str, str]
    modules: dict[str, str]
    linear_modules: frozenset[str]
    class_name: str
    shapes: dict[str, tuple[int, ...]]
    unstacked: frozenset[str] = frozenset()
    foreign: dict[str, str] = field(default_factory=dict)
    stacks: dict[str, tuple[int, ...]] = field(default_factory=dict)
    ours: frozenset[str] = frozenset()
    expert_modules: frozenset[str] = frozenset()
    missing: tuple[str, ...] = ()
    gaps: tuple[str, ...] = ()


def architecture(
    folder: str | Path, tensor_names: Iterable[str], *, trust_remote_code: bool = False
) -> Architecture | None:
    """Look a checkpoint up in transformers: from `config.json` and names alone, no weights are read.

    None where transformers cannot build the model: an unknown `model_type`, an unknown class in `architectures`, or
    code in the repository that is not trusted. Raises PreflightError for a config that transformers refuses.
    """
    from transformers.quantizers.quantizers_utils import should_convert_module

    from quantlab.experts import unsupported
    from quantlab.kinds import EXPERT, missing_experts  # torch, which `import quantlab` does not wait for
    from quantlab.scaled_inputs import stand_in

    model = meta_model(Path(folder), trust_remote_code)
    if model is None:
        return None
    names = list(tensor_names)
    targets = load_targets(model, names)
    apart = load_targets(model, [name for name in names if name not in targets], one_by_one())
    targets |= apart
    modules = dict(model.named_modules(remove_duplicate=False))
    heads = _heads(model, modules)
    float32 = [*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())]
    kinds, paths = {}, {}
    for name, target in targets.items():
        path, _, leaf = target.parameter.rpartition(".")
        kind = _kind(modules, path, leaf)
        if kind == "linear" and path in heads:
            kind = "head"
        elif kind == "linear" and (target.rearranged or not should_convert_module(path, float32)):
            kind = "other"
        kinds[name], paths[name] = kind, path
    state = model.state_dict()
    shapes = {name: tuple(state[target.parameter].shape) for name, target in targets.items() if not target.patterns}
    experts = {paths[name] for name, kind in kinds.items() if kind == "expert"}
    foreign = {path: why for path in sorted(experts) if (why := unsupported(stand_in(modules[path]))) is not None}
    stacks = {
        name: tuple(state[target.parameter].shape)
        for name, target in targets.items()
        if kinds[name] == "expert" and name.rpartition(".")[2] == target.parameter.rpartition(".")[2]
    }
    linear, class_name = _linear_modules(modules), type(model).__name__
    called = frozenset(path for path in modules if path.endswith(".experts"))
    found = {target.parameter for target in targets.values()}
    counts: dict[str, int] = {}  # of experts; one of LongCat's parameters has more, which it never uses
    for name, target in targets.items():
        if kinds[name] == "expert" and (match := EXPERT.fullmatch(name)):
            count = len(state[target.parameter])
            counts[match["list"]] = min(count, counts.get(match["list"], count))
    missing = (*_missing(model, found), *missing_experts(targets, counts))
    elsewhere = {_unnumbered(name) for name in (*found, *targets)}
    gaps = tuple(name for name in missing if _unnumbered(name) in elsewhere)
    unstacked, ours = _unstacked(modules), frozenset(apart)
    return Architecture(
        kinds, paths, linear, class_name, shapes, unstacked, foreign, stacks, ours, called, missing, gaps
    )


def _missing(model: Any, found: set[str]) -> tuple[str, ...]:
    """Parameters that are not found, nor tied to one that is, nor said by the model to come from elsewhere."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter

    converters = [entry for entry in get_model_conversion_mapping(model) if isinstance(entry, WeightConverter)]
    if any(len(converter.target_patterns) > 1 for converter in converters):
        return ()  # one tensor becomes several parameters, of which only the first is known here
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    found = found.union(*(pair for pair in tied.items() if not found.isdisjoint(pair)))
    elsewhere = model._keys_to_ignore_on_load_missing or ()
    names = (name for name, _ in model.named_parameters())
    return tuple(name for name in names if name not in found and not any(re.search(e, name) for e in elsewhere))


def _unnumbered(name: str) -> str:
    """The same for all layers and experts of a list."""
    return re.sub(r"\.\d+(?=\.)", ".*", name)


def meta_model(folder: Path, trust_remote_code: bool = False) -> Any:
    """The model of `folder` without data, or None where transformers does not know it.

    Raises PreflightError for one that it knows, and whose config it refuses.
    """
    try:
        return _meta_model(folder, trust_remote_code)
    except Exception as error:  # whatever a model's constructor makes of a config that it does not like
        raise PreflightError(f"{folder}: transformers cannot build this model ({one_line(error)})") from None


def _meta_model(folder: Path, trust_remote_code: bool) -> Any:
    import torch
    from transformers import AutoConfig

    options = {"trust_remote_code": trust_remote_code, "local_files_only": True}
    try:
        config = AutoConfig.from_pretrained(folder, **options)
        model_class = _model_class(folder, config, trust_remote_code)
    except (KeyError, ValueError, ImportError, OSError):
        return None
    if model_class is None:
        return None
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        return model_class._from_config(config)


def _model_class(folder: Path, config: Any, trust_remote_code: bool) -> Any:
    import transformers

    name = next(iter(getattr(config, "architectures", None) or []), None)
    remote = {ref.rpartition(".")[2]: ref for ref in getattr(config, "auto_map", {}).values() if isinstance(ref, str)}
    if name in remote and trust_remote_code:
        from transformers.dynamic_module_utils import get_class_from_dynamic_module

        return get_class_from_dynamic_module(remote[name], folder)
    if name is not None:
        return getattr(transformers, name, None)
    return transformers.AutoModel._model_mapping.get(type(config), None)


@dataclass(frozen=True)
class LoadTarget:
    """Where transformers puts one checkpoint tensor: the parameter or buffer of the model (several tensors may share
    one), whether its rows or columns are rearranged on the way so that scales would not follow, and the patterns of
    the conversion that it goes through, if any."""

    parameter: str
    rearranged: bool = False
    patterns: tuple[str, ...] = ()


def one_by_one() -> list[Any]:
    """Conversions of a checkpoint's single experts, for architectures of which transformers has none."""
    from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter

    gate_up = [".experts.*.gate_proj.weight", ".experts.*.up_proj.weight"]
    return [
        WeightConverter(gate_up, ".experts.gate_up_proj", operations=[MergeModulelist(dim=0), Concatenate(dim=1)]),
        WeightConverter(".experts.*.down_proj.weight", ".experts.down_proj", operations=[MergeModulelist(dim=0)]),
    ]


def load_targets(model: Any, names: Iterable[str], more: Iterable[Any] = ()) -> dict[str, LoadTarget]:
    """Checkpoint tensor -> where `model` takes it, with `more` conversions than it has. Tensors that the model does not
    take are left out."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    mapping = [*get_model_conversion_mapping(model), *more]
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    state = model.state_dict()
    targets = {}
    for name in names:
        renamed, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        if renamed not in state and name in state:
            renamed, pattern = rename_source_key(name, [], [], model.base_model_prefix, state)
        if renamed in state and pattern is None:
            targets[name] = LoadTarget(renamed)
        elif renamed in state:
            converter = by_pattern[pattern]
            targets[name] = LoadTarget(renamed, not keeps_rows_together(converter), tuple(converter.source_patterns))
    return targets


def counterpart(path: str, modules: Iterable[tuple[str, str]]) -> str | None:
    """What a module is called elsewhere, in a model or a checkpoint, from names of modules below it (here, there)."""
    for here, there in modules:
        below = here.removeprefix(path)
        if here.startswith(f"{path}.") and there.endswith(below):
            return there.removesuffix(below)
    return None


def keeps_rows_together(converter: Any) -> bool:
    """Whether a conversion only joins rows, and into one parameter: then it holds for the scales as well. One tensor
    that several layers share out would have to become several quantized ones."""
    joins = all(type(op).__name__ == "Concatenate" and op.dim == 0 for op in converter.operations)
    return joins and len(converter.target_patterns) == 1


def _heads(model: Any, modules: dict[str, Any]) -> set[str]:
    """Paths of the output layer and of the modules whose weights are tied to others. Models for speech recognition
    call theirs by no other way than its name."""
    output = model.get_output_embeddings()
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    paths = {name.rpartition(".")[0] for pair in tied.items() for name in pair}
    return paths | {
        path for path, module in modules.items() if module is output or path.rpartition(".")[2] == "lm_head"
    }


def _linear_modules(modules: dict[str, Any]) -> frozenset[str]:
    from torch import nn

    return frozenset(path for path, module in modules.items() if isinstance(module, nn.Linear))


def _unstacked(modules: dict[str, Any]) -> frozenset[str]:
    from transformers.quantizers import base

    patched = getattr(base, "MODULES_TO_PATCH_FOR_QUANTIZATION", {})
    kinds = {name for name, patch in patched.items() if "compressed-tensors" in patch["quantization_methods"]}
    return frozenset(path for path, module in modules.items() if type(module).__name__ in kinds)


def _kind(modules: dict[str, Any], path: str, leaf: str) -> str:
    from torch import nn

    module = modules[path]
    class_name = type(module).__name__
    tensor = getattr(module, leaf)
    if isinstance(module, nn.modules.conv._ConvNd):
        return "conv"
    if "Norm" in class_name:
        return "norm"
    if isinstance(module, nn.Embedding):
        return "embedding"
    if tensor.ndim == 3 and re.search(r"(^|\.)\w*experts$", path):
        return "expert"
    if leaf != "weight" or tensor.ndim != 2:
        return "other"
    if _is_router(modules, path):
        return "router"
    parent, _, name = path.rpartition(".")
    used_elsewhere = type(module) is not nn.Linear or name in weights_read(modules[parent].__class__)
    return "other" if used_elsewhere or _is_written(modules, path) else "linear"


def _is_written(modules: dict[str, Any], path: str) -> bool:
    """Whether a module above changes the layer's weight in place."""
    parts = path.split(".")
    above = (modules[".".join(parts[:end])] for end in range(len(parts)))
    return any(path.endswith(f".{end}") for module in above for end in weights_written(module.__class__))


def _is_router(modules: dict[str, Any], path: str) -> bool:
    """A layer of what decides which experts run: of a module called so, or beside the experts, named or as wide as
    their number."""
    parts = path.split(".")
    for end in range(len(parts), 0, -1):
        above, name, here = ".".join(parts[: end - 1]), parts[end - 1], ".".join(parts[:end])
        if "router" in name or "Router" in type(modules[here]).__name__:
            return True
        if name == "gate" and f"{above}.experts" in modules:
            return True
    if type(modules[path]).__name__.endswith("Gate"):
        return True
    experts = modules.get(f"{path.rpartition('.')[0]}.experts")
    counts = {p.shape[0] for p in experts.parameters(recurse=False) if p.ndim == 3} if experts is not None else set()
    return modules[path].weight.shape[0] in counts
