"""The plan of a conversion: what becomes of every tensor and why, from the config and the headers alone.

All that can be refused is refused here, before work: errors found after hours are the most common complaint about
quantization tools. Decisions are values; `stream` carries them out and adds none of its own.

What is quantized: linear layers of language models, of encoders (BERT) and of models that only see or hear (ViT,
RT-DETR, Whisper), and routed experts. What stays, each with its reason: embeddings, output layers, routers, norms,
convolutions, multi-token prediction, the vision and audio towers of a multimodal model (a rule of the recipe may ask
for them), shapes that are no whole blocks, and all that engines fuse with something that stays.
"""

from __future__ import annotations

import difflib
from collections import Counter, defaultdict
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from quantlab import fused_experts, kinds, remarks
from quantlab.checkpoint import (
    WEIGHT,
    Stored,
    config_of_quantization,
    describe_quantization,
    module_of,
    slots,
    stack_slots,
)
from quantlab.errors import PreflightError, UsageError, one_line
from quantlab.loaders import STACKED, SkipList, View, broken_rules
from quantlab.parallel import largest_tensor_parallel
from quantlab.scheme import Recipe, Rule, Scheme, scheme_named
from quantlab.shards import TensorInfo, TensorSlot
from quantlab.source import Source
from quantlab.summary import Shown, Table, size, sizes

if TYPE_CHECKING:
    from quantlab.architecture import Architecture

UNEXPLAINED_LIMIT = 0.01


@dataclass(frozen=True)
class Decision:
    """What becomes of one tensor of the source.

    tensor  name in the checkpoint
    module  path of its module by the checkpoint's names
    kind    of `architecture.KINDS`
    scheme  None: copied byte for byte, and then `reason` says why; "" is no known reason
    parts   (module, weight [N, K]) that are quantized in its place: itself, or the matrices of fused experts
    stack   of fused experts that stay one tensor
    """

    tensor: str
    module: str
    kind: str
    scheme: Scheme | None
    reason: str
    info: TensorInfo
    parts: tuple[tuple[str, TensorInfo], ...] = ()
    stack: fused_experts.Stack | None = None

    def left(self, reason: str) -> Decision:
        return replace(self, scheme=None, reason=reason, parts=(), stack=None)

    def slots(self, stored: Stored) -> tuple[TensorSlot, ...]:
        """The tensors that it becomes on disk, if it is quantized."""
        if self.stack is not None:
            return stack_slots(self.info.name, self.info.shape, stored)
        return tuple(slot for module, part in self.parts for slot in slots(module, part.shape, part.dtype, stored))


@dataclass(frozen=True)
class Plan(Shown):
    """All decisions, and what follows from them.

    skip_modules     fully qualified names of unquantized linear layers, in the checkpoint's and in transformers' names
    bytes_*          size of all weights
    tensor_parallel  largest size that every engine loads
    paths            tensor -> path of its module in transformers' tree, where that is known
    """

    source: Source
    recipe: Recipe
    decisions: tuple[Decision, ...]
    skip_modules: tuple[str, ...]
    bytes_before: int
    bytes_after: int
    tensor_parallel: int
    warnings: tuple[str, ...] = ()
    architecture: str | None = None
    paths: dict[str, str] = field(default_factory=dict, compare=False)

    @property
    def quantized(self) -> tuple[Decision, ...]:
        return tuple(d for d in self.decisions if d.scheme is not None)

    @cached_property
    def stored(self) -> Stored:
        """How the quantized weights are stored."""
        return stored_as(self.decisions, self.skip_modules, self.paths)

    def by_reason(self) -> dict[str, tuple[int, int]]:
        """What happens -> (tensors, bytes in the source), the largest first."""
        groups: dict[str, list[int]] = defaultdict(lambda: [0, 0])
        for decision in self.decisions:
            what = f"quantized: {decision.scheme.name}" if decision.scheme else decision.reason or "no known reason"
            groups[what][0] += 1
            groups[what][1] += decision.info.nbytes
        return {what: (n, size) for what, (n, size) in sorted(groups.items(), key=lambda item: -item[1][1])}

    def to_dict(self) -> dict[str, Any]:
        return {
            "model": self.source.model,
            "architecture": self.architecture,
            "recipe": self.recipe.to_dict(),
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "tensor_parallel": self.tensor_parallel,
            "decisions": [
                {"tensor": d.tensor, "kind": d.kind, "scheme": d.scheme.name if d.scheme else None, "reason": d.reason}
                for d in self.decisions
            ],
            "skip_modules": list(self.skip_modules),
            "warnings": list(self.warnings),
        }

    def tables(self) -> list[Table]:
        rows = [(what, n, size(nbytes)) for what, (n, nbytes) in self.by_reason().items()]
        facts: list[tuple[Any, ...]] = [
            ("weights", sizes(self.bytes_before, self.bytes_after)),
            ("largest tensor-parallel size", self.tensor_parallel),
            *(("warning", text) for text in self.warnings),
        ]
        return [
            (f"{self.source.model}: what happens to its tensors", ("what", "tensors", "bytes"), rows),
            ("result", ("", ""), facts),
        ]


def plan(source: Source, recipe: Recipe, *, trust_remote_code: bool = False) -> Plan:
    """Decide about every tensor, or refuse.

    Raises PreflightError for a source that is quantized already or has gaps, where nothing can be quantized, and where
    more than 1 % of what should be quantized would be left alone without a known reason; UsageError for a pattern of
    the recipe that matches nothing.
    """
    _refuse_quantized(source)
    model = kinds.Model.of(source.config)
    architecture, doubts = known_architecture(source, trust_remote_code=trust_remote_code)
    _check_shapes(source, architecture)
    _check_gaps(source, architecture)
    decisions = [_decide(info, source, recipe, model, architecture) for info in source.tensors.values()]
    _check_patterns(recipe.rules, decisions, architecture)
    decisions = _drop_together(decisions)
    decisions = _drop_what_skip_lists_confuse(decisions, model, architecture)
    _check_coverage(decisions, source)
    skip = _skip_modules(decisions, model, architecture)
    _check_rules(source, decisions, skip, architecture)
    return Plan(
        source,
        recipe,
        tuple(decisions),
        skip,
        source.weight_bytes,
        sum(bytes_after(decision) for decision in decisions),
        largest_tensor_parallel([d for d in decisions if d.scheme], source.config),
        (*doubts, *remarks.on(decisions, source, recipe, architecture)),
        architecture.class_name if architecture else None,
        architecture.modules if architecture else {},
    )


def stored_as(decisions: Iterable[Decision], skip: Iterable[str], paths: dict[str, str]) -> Stored:
    """How the weights of a plan are stored: the scheme of most of them, and the others by the names of their modules,
    the checkpoint's and transformers'."""
    modules: dict[str, list[str]] = defaultdict(list)
    weights: Counter[str] = Counter()
    schemes: dict[str, Scheme] = {}
    for decision in decisions:
        if decision.scheme is not None:
            name = decision.scheme.name
            schemes[name] = decision.scheme
            weights[name] += decision.info.elements
            modules[name] += [module for module, _ in decision.parts]
            modules[name] += [paths[decision.tensor]] if decision.kind == "linear" and decision.tensor in paths else []
    main, *others = (name for name, _ in weights.most_common())
    exceptions = tuple((tuple(sorted(set(modules[name]))), Stored.of(schemes[name])) for name in others)
    return replace(Stored.of(schemes[main], skip), others=exceptions)


def _refuse_quantized(source: Source) -> None:
    advice, found = "start from the original model", config_of_quantization(source.config)
    if found is not None:
        with suppress(PreflightError):  # of formats that are not read
            advice += ", or write it back to bf16 with `quantlab convert --to bf16`" if source.stored else ""
        raise PreflightError(f"{source.model}: is already quantized ({describe_quantization(found)}); {advice}")
    for info in source.tensors.values():
        low_precision = info.dtype.startswith(("F8", "F4", "F6_")) or (
            info.dtype in ("I8", "U8", "I32") and len(info.shape) == 2 and info.name.endswith(("weight", "_packed"))
        )
        if low_precision and info.elements > 1:
            raise PreflightError(f"{source.model}: is already quantized ({info.name} is {info.dtype}); {advice}")


def known_architecture(
    source: Source, *, trust_remote_code: bool = False
) -> tuple[Architecture | None, tuple[str, ...]]:
    """What transformers knows, unless its names are not those of this checkpoint; and why it knows nothing."""
    from quantlab.architecture import architecture

    plain = [name.removesuffix("_packed") for name in source.tensors]  # of INT4 checkpoints, as they were before
    names = [*plain, *fused_experts.probes(source.tensors)]
    try:
        found = architecture(source.folder, names, trust_remote_code=trust_remote_code)
    except Exception as error:  # what transformers makes of a config that it does not like
        why = error if isinstance(error, PreflightError) else f"transformers cannot read it ({one_line(error)})"
        return None, (f"{why}; layers are told by names and shapes",)
    if found is None:
        return None, ()
    covered = sum(i.nbytes for name, i in source.tensors.items() if name.removesuffix("_packed") in found.kinds)
    return (found, ()) if covered > source.weight_bytes / 2 else (None, ())


def _check_shapes(source: Source, architecture: Architecture | None) -> None:
    for name, wanted in (architecture.shapes if architecture else {}).items():
        info = source.tensors.get(name)
        if info is not None and len(wanted) > 1 and info.shape != wanted:
            raise PreflightError(
                f"{source.model}: {name} has shape {list(info.shape)}, by config.json it has {list(wanted)}; "
                "weights and config are not of one model"
            )


def _check_gaps(source: Source, architecture: Architecture | None) -> None:
    """Refuse to carry them into an output at which loaders stop. What else a model lacks is for `remarks` to tell."""
    gaps = architecture.gaps if architecture else tuple(kinds.missing_experts(source.tensors))
    if gaps:
        more = f" and {len(gaps) - 1} more" if gaps[1:] else ""
        raise PreflightError(
            f"{source.model}: its files lack {gaps[0]}{more}, which other layers or experts have; "
            "get the checkpoint again, or its own config.json if they are whole"
        )


def _decide(
    info: TensorInfo, source: Source, recipe: Recipe, model: kinds.Model, architecture: Architecture | None
) -> Decision:
    """The decision about one tensor as if it were alone."""
    module = module_of(info.name)
    known = architecture.kinds.get(info.name) if architecture else None
    kind = known or kinds.kind_of(info, model)
    if kind == "linear" and kinds.PREDICTION.search(module):
        kind = "head"
    decision = Decision(info.name, module, kind, None, "", info)
    if kinds.is_mtp(info.name, model):
        return decision.left("multi-token prediction: carried over as it is")
    path = architecture.modules[info.name] if architecture and known else ""
    names = (info.name, module, path)
    rule = next((rule for rule in recipe.rules if any(rule.matches(name) for name in names if name)), None)
    if kind not in ("linear", "expert"):
        special = bool(path) and architecture is not None and path in architecture.linear_modules
        reason = kinds.STAY.get(kind) or _other(info, module, model, known, special)
        return decision.left(reason or (f"recipe: {rule.match}" if rule and rule.scheme == "none" else ""))
    if rule is None and kinds.in_tower(info.name, model):
        return decision.left("vision or audio tower: the language model is quantized")
    scheme = scheme_named(rule.scheme if rule else recipe.scheme)
    if scheme is None:
        return decision.left(f"recipe: {rule.match if rule else 'scheme none'}")
    named = rule is not None and "experts" in rule.match
    stack = _stack(info, scheme, model, architecture)
    parts = ((module, info),) if len(info.shape) == 2 else stack.parts if stack else ()
    parts = parts or _one_by_one(info, source, scheme, architecture, named)
    misfit = _misfit(decision, parts, scheme, architecture)
    return decision.left(misfit) if misfit else replace(decision, scheme=scheme, parts=parts, stack=stack)


def _one_by_one(
    info: TensorInfo, source: Source, scheme: Scheme, architecture: Architecture | None, named: bool
) -> tuple[tuple[str, TensorInfo], ...]:
    """The matrices of fused experts, if transformers takes them where it takes the tensor, or in compressed-tensors
    checkpoints. If not, engines and our loader do, which is enough where a recipe names experts. Else none."""
    home = architecture.modules.get(info.name) if architecture else None
    parts = fused_experts.matrices(info, source.tensors)
    if home is None or architecture is None or not parts:
        return ()
    if home in architecture.unstacked:
        return parts if scheme.layout != "fp8" else ()
    taken = all(architecture.modules.get(module + WEIGHT) == home for module, _ in parts)
    ours = parts[0][0] + WEIGHT in architecture.ours
    return parts if taken and (not ours or (named and home not in architecture.foreign)) else ()


def _stack(
    info: TensorInfo, scheme: Scheme, model: kinds.Model, architecture: Architecture | None
) -> fused_experts.Stack | None:
    """Fused experts as one quantized tensor, where readers know those of the model so."""
    wanted = architecture.stacks.get(info.name) if architecture else None
    if wanted is None or architecture is None or scheme.layout != "fp8" or model.model_type not in STACKED:
        return None
    return None if architecture.modules[info.name] in architecture.foreign else fused_experts.stack(info, wanted)


def _other(info: TensorInfo, module: str, model: kinds.Model, known: str | None, special: bool) -> str:
    """Why a tensor that is no plain layer's weight stays; "" where nothing is known about it."""
    leaf = kinds.leaf_of(module)
    if leaf in kinds.USED_DIRECTLY:
        return "weight that its model uses directly, not through a linear layer"
    if leaf in kinds.TRANSPOSED and model.model_type in kinds.TRANSPOSED_MODELS:
        return "transposed weight (Conv1D): no reader has a quantized layer for it"
    if len(info.shape) < 2 or not info.elements:
        return "bias, scale or other vector"
    if info.dtype not in kinds.FLOATS:
        return "not a 16 or 32 bit float"
    if special:
        return "linear layer that transformers rearranges, keeps in 32 bits, reads the weight of or has a class for"
    return "parameter that is no linear layer's" if known else ""


def _misfit(
    decision: Decision,
    parts: tuple[tuple[str, TensorInfo], ...],
    scheme: Scheme,
    architecture: Architecture | None,
) -> str | None:
    """Why this weight cannot have this scheme."""
    if not parts:
        return _why_whole(decision, scheme, architecture)
    wanted = [max(kinds.ENGINE_ALIGNMENT, step) for step in scheme.alignment]
    if any(size % step for _, part in parts for size, step in zip(part.shape, wanted, strict=True)):
        return f"shape: N and K are not multiples of {wanted[0]} and {wanted[1]}"
    return None


def _why_whole(decision: Decision, scheme: Scheme, architecture: Architecture | None) -> str:
    """Why experts that are fused in one tensor are neither taken apart nor quantized as one."""
    home = architecture.modules.get(decision.tensor) if architecture else None
    if architecture is not None and home in architecture.unstacked and scheme.layout == "fp8":
        return "experts fused in one 3-D tensor: fp8-dynamic and int4 store them one by one, for fp8 no reader has them"
    if architecture is not None and home in architecture.foreign:
        return f"experts fused in one 3-D tensor: {architecture.foreign[home]}"
    why = "experts fused in one 3-D tensor: transformers takes them in no other, engines "
    if kinds.leaf_of(decision.tensor) not in (fused_experts.GATE_UP, fused_experts.DOWN):
        return why + "look for no scales of theirs"
    return why + "one by one; a recipe that names *.experts stores them so"


def _check_patterns(rules: Iterable[Rule], decisions: list[Decision], architecture: Architecture | None) -> None:
    """A pattern that matches nothing is a typing error; silence would quantize what the user wanted to keep."""
    names = {name for d in decisions for name in (d.module, d.tensor)}
    names.update(architecture.modules.values() if architecture else ())
    layers = [d.module for d in decisions if d.kind in ("linear", "expert", "head", "router")]
    for rule in rules:
        if any(map(rule.matches, names)):
            continue
        leaves = sorted({kinds.leaf_of(layer) for layer in layers})
        close = difflib.get_close_matches(kinds.leaf_of(rule.match.removeprefix("re:")), leaves, n=1, cutoff=0.5)
        hint = f"did you mean '*.{close[0]}'?" if close else f"layers end in: {', '.join(leaves)}"
        raise UsageError(f"pattern {rule.match!r} matches no module; patterns match whole names; {hint}")


def _drop_together(decisions: list[Decision]) -> list[Decision]:
    """Layers that engines fuse have one scheme: where one member stays in 16 bits, all do."""
    groups: dict[tuple[str, ...] | str, list[Decision]] = defaultdict(list)
    for decision in decisions:
        if decision.kind in ("linear", "expert", "other") and len(decision.info.shape) in (2, 3):
            groups[kinds.experts_of(decision.module) or kinds.fused_group(decision.module)].append(decision)
    dropped: dict[str, Decision] = {}
    for members in groups.values():
        stays = next((d for d in members if d.scheme is None), None)
        if stays is None or all(d.scheme is None for d in members):
            continue
        reason = (
            f"fused by engines with {kinds.leaf_of(stays.module)}, which stays ({stays.reason or 'no known reason'})"
        )
        dropped |= {d.tensor: d.left(reason) for d in members if d.scheme is not None}
    return [dropped.get(d.tensor, d) for d in decisions]


def _drop_what_skip_lists_confuse(
    decisions: list[Decision], model: kinds.Model, architecture: Architecture | None
) -> list[Decision]:
    """Readers take a skipped name also as a beginning or an end of names: `mlp.gate` would skip `mlp.gate_proj`."""
    paths = architecture.modules if architecture else {}
    while True:
        skip = SkipList(_skip_modules(decisions, model, architecture))
        confused = {
            d.tensor
            for d in decisions
            if d.scheme
            and any(skip.matches(name) for name in (paths.get(d.tensor, d.module), *(m for m, _ in d.parts)))
        }
        if not confused:
            return decisions
        reason = "name begins or ends like that of a layer that stays: skip lists cannot tell them apart"
        decisions = _drop_together([d.left(reason) if d.tensor in confused else d for d in decisions])


def _check_rules(
    source: Source, decisions: list[Decision], skip: tuple[str, ...], architecture: Architecture | None
) -> None:
    """What would be written has to pass the rules of all loaders; the same ones that `verify` uses afterwards."""
    tensors = {d.tensor: d.info for d in decisions if d.scheme is None}
    stored = stored_as(decisions, skip, architecture.modules if architecture else {})
    for decision in decisions:
        for slot in decision.slots(stored):
            tensors[slot.name] = TensorInfo(slot.name, slot.dtype, slot.shape, decision.info.shard, 0, 0)
    for problem, advice in broken_rules(View(replace(source, tensors=tensors), stored, architecture)):
        raise PreflightError(f"{source.model}: the result would not load everywhere: {problem}; {advice}")


def _check_coverage(decisions: list[Decision], source: Source) -> None:
    quantized = [d for d in decisions if d.scheme]
    if not quantized:
        layers = [d for d in decisions if len(d.info.shape) == 2 and d.kind in ("linear", "expert", "other")]
        reasons = Counter(d.reason or "no known reason" for d in layers)
        why = f"all layers stay, most of them: {reasons.most_common(1)[0][0]}" if layers else "it has no linear layer"
        why += "".join(f"; {advice}" for advice in remarks.about_shapes(decisions))
        raise PreflightError(f"{source.model}: nothing can be quantized; {why}")
    unexplained = [d for d in decisions if not d.scheme and not d.reason]
    lost, done = (sum(d.info.elements for d in group) for group in (unexplained, quantized))
    if lost > UNEXPLAINED_LIMIT * (lost + done):
        names = ", ".join(d.tensor for d in unexplained[:3])
        raise PreflightError(
            f"{source.model}: {100 * lost / (lost + done):.1f} % of the weights would be left alone without a known "
            f"reason, in {len(unexplained)} tensors ({names}{', ...' if len(unexplained) > 3 else ''}); "
            "accept it with --ignore PATTERN"
        )


def _skip_modules(decisions: list[Decision], model: kinds.Model, architecture: Architecture | None) -> tuple[str, ...]:
    """Every linear layer that is not quantized, by every name a reader may know it under.

    A reader that does not find a layer here takes its 16-bit weight for a quantized one. That also holds for a head
    that is tied to the embedding and has no tensor of its own.
    """
    skip = {d.module for d in decisions if d.scheme is None and _may_be_linear(d)}
    if architecture is None:
        return tuple(sorted(skip | ({"lm_head"} if model.tied else set())))
    of_tensor = architecture.modules
    quantized = {of_tensor[d.tensor] for d in decisions if d.scheme and d.tensor in of_tensor}
    skip |= {of_tensor[d.tensor] for d in decisions if d.module in skip and d.tensor in of_tensor}
    whole = {path for path in architecture.expert_modules if not any(f"{q}.".startswith(f"{path}.") for q in quantized)}
    return tuple(sorted((skip | architecture.linear_modules | whole) - quantized - {""}))


def _may_be_linear(decision: Decision) -> bool:
    """A bare parameter is none: its module is a whole block, which would be skipped with all layers in it."""
    if decision.kind in ("embedding", "conv", "norm"):
        return False
    is_weight = len(decision.info.shape) == 2 and decision.tensor.endswith(WEIGHT)
    return decision.kind in ("linear", "expert", "head", "router") or is_weight


def bytes_after(decision: Decision) -> int:
    """Size on disk of what a tensor becomes."""
    if decision.scheme is None:
        return decision.info.nbytes
    return sum(slot.nbytes for slot in decision.slots(Stored.of(decision.scheme)))
