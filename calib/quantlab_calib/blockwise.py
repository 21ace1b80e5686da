"""Quantize a model block by block: every layer is rounded for the inputs that the quantized layers before it give it.

Two streams of hidden states run through the model side by side: the original's, and ours, where linear layers compute
what the deployed kernels will: activations quantized, weights as their codes decode. Layers that read one input form a
stage; the stages of a block are rounded in the order in which they run, each after the ones before it. What the
quantized part has got wrong so far is thus seen, and partly made up for, by all that comes later.

Weights and activations are quantized at the one function that all linear layers call (see `capture`), so nothing here
knows a module of any model, and fused experts are covered.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from quantlab_calib.capture import LeaveError, LinearCalls, Walk, Weights, alike, linear_weights, loading_when_called
from quantlab_calib.gptq import Gptq, SingularError
from quantlab_calib.observers import GROUP, MomentObserver
from quantlab_calib.rotate import RotationError, hadamard, rotate_block, rotate_ends
from quantlab_calib.rounding import decode_int4, round_int4
from quantlab_calib.smooth import apply, find_folds, search, trace
from quantlab_calib.tune import Latent, Tune, tune
from quantlab_kernels.packing import pack_int4, unpack_int4
from quantlab_kernels.qtensor import TensorSpec, quantize

T = TypeVar("T")
U = TypeVar("U")
Product = Callable[[str, Tensor, Tensor, Tensor | None], Tensor | None]

FEWEST_TOKENS = GROUP  # a layer that saw fewer tokens than a group has channels is rounded without data
MATRIX_ELEMENTS = 1 << 28  # of second moments that are factored at a time
WEIGHT_ELEMENTS = 1 << 27  # of weights that are rounded at a time
BATCH_TOKENS = 8192
SAMPLE_TOKENS = 1024  # on which scales are chosen
PROBE_TOKENS, PROBE_SIZE = 32, 0.01  # of the hidden states on which it is tried what folds
KEPT = 0.4  # of a GPU's free memory, for hidden states; above that they wait on the CPU


@dataclass(frozen=True)
class Steps:
    """What is done to each block.

    input     spec of quantized activations; None leaves them
    gptq      how codes are chosen; None rounds each weight for itself
    original  aim at the original model's outputs, not at those of the layer itself on the inputs that it gets
    rotate    turn the residual stream, and the values of each head (`rotate`)
    smooth    exponents to try for scales that are folded into norms and layers before (`smooth`); empty folds none
    tune      how codes are tuned for the block's output afterwards; None does not
    """

    input: TensorSpec | None = None
    gptq: Gptq | None = field(default_factory=Gptq)
    original: bool = True
    smooth: tuple[tuple[float, float], ...] = ()
    tune: Tune | None = None
    rotate: bool = False


@dataclass
class Block:
    """A block that has been quantized.

    path     of the block in the model
    rounded  words of codes (`packing.pack_int4`) int32 [N, K / 8] and scales float32 [N, K / 128] by name of the
             weight, on the CPU
    changed  parameters that scales were folded into, as they are now, on the CPU
    scaled   the exponents chosen for each fold, by its producer
    tokens   how many each layer saw
    error    of the block's output relative to the original's, on held-out rows, before and after tuning
    notes    what went another way than planned
    """

    path: str
    rounded: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    changed: dict[str, Tensor] = field(default_factory=dict)
    scaled: dict[str, tuple[float, float]] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    error: tuple[float, float] | None = None
    notes: list[str] = field(default_factory=list)

    def codes(self, name: str, device: torch.device) -> tuple[Tensor, Tensor]:
        """Codes int8 [N, K] and scales of a weight, on a device."""
        words, scale = (tensor.to(device) for tensor in self.rounded[name])
        return unpack_int4(words, scale.shape[1] * GROUP), scale


@dataclass
class Stream:
    """Hidden states that enter a block, [samples, length, hidden]; None while it is the model's own first input."""

    device: torch.device
    states: Tensor | None = None

    def rows(self, part: slice | Tensor) -> Tensor | None:
        return None if self.states is None else self.states[part]


class Blockwise:
    """Runs `tokens` (int64 [samples, length]) through the blocks at `path` of a model, quantizing the layers `wanted`.

    model    its parameters may be on the meta device
    weights  loads parts of it to `device` and releases them
    done     block path -> what an earlier run made of it: then it is only run, not rounded again
    stored   dtype in which a parameter that is not wanted is stored, None where it may not change
    loaded   is shown each block's path and its wanted layers as they were loaded
    """

    def __init__(
        self,
        model: nn.Module,
        tokens: Tensor,
        weights: Weights,
        path: str,
        wanted: Callable[[str], bool],
        steps: Steps,
        *,
        device: torch.device,
        done: Callable[[str], Block | None] = lambda path: None,
        loaded: Callable[[str, dict[str, Tensor]], None] = lambda path, layers: None,
        stored: Callable[[str], torch.dtype | None] = lambda name: torch.float32,
    ) -> None:
        self.model, self.tokens, self.weights, self.path = model.eval(), tokens, weights, path
        self.wanted, self.steps, self.done, self.loaded, self.device = wanted, steps, done, loaded, device
        self.stored, self.ends = stored, dict[str, Tensor]()
        self.walk = Walk(model, path, device)
        self.at_once = max(1, BATCH_TOKENS // tokens.shape[1])
        self.ours, self.theirs = Stream(device), Stream(device)
        self.originals: dict[str, Tensor] = {}  # what the original's layers read, see `_targets`

    @torch.no_grad()
    def run(self) -> Iterator[Block]:
        """Yield each block, its original weights still in memory."""
        with loading_when_called(self.model, self.path, self.weights):
            if self.steps.rotate:
                self._rotate_ends()
            for index in range(len(self.walk.blocks)):
                yield self._block(index)

    def _block(self, index: int) -> Block:
        path = f"{self.path}.{index}"
        self.weights.load(path)
        layers = {n: w for n, w in linear_weights(self.walk.blocks[index], path).items() if self.wanted(n)}
        self.loaded(path, layers)
        turned = self._rotate(index, path) if self.steps.rotate else {}
        block = self.done(path)
        if block is None:
            block = Block(path, changed=turned)
            self.quantized = _Quantized(layers, self.steps.input)
            if self.steps.smooth:
                self._smooth(index, block)
            early = self.steps.original and self.at_once >= len(self.tokens)
            targets = self._backing_off(partial(self._targets, index)) if early else None
            for stage in self._stages(index):
                self._backing_off(partial(self._stage, index, stage, block))
            unseen = [name for name in layers if name not in block.rounded]
            for name in unseen:
                self._keep(block, [name], *round_int4(layers[name]))
            if unseen:
                block.notes.append(f"{len(unseen)} layers saw no data and are rounded without: {unseen[0]}")
            targets = targets if early else self._backing_off(partial(self._targets, index))
            if self.steps.tune is not None and targets is not None:
                self._backing_off(partial(self._tune, index, block, targets, self.steps.tune))
        else:
            self.quantized = _Quantized(layers, self.steps.input)
            targets = self._backing_off(partial(self._targets, index))
            for name in block.rounded:
                self.quantized.set(name, *block.codes(name, self.device))
            for name, value in block.changed.items():
                self.model.get_parameter(name).data.copy_(value)
        self.ours.states = self._backing_off(partial(self._through, index, self.ours, self.quantized.product))
        self.theirs.states = targets
        self.weights.release(path)
        return block

    @property
    def _both(self) -> bool:
        """Whether the original's hidden states are wanted."""
        return self.steps.original or self.steps.tune is not None

    def _targets(self, index: int) -> Tensor | None:
        """The original's hidden states after the block, where they are wanted. What its layers read on the way is kept
        where all rows run at once: else every stage runs the block again to see it."""
        self.originals = {}
        if not self._both:
            return None
        once = self.steps.original and self.at_once >= len(self.tokens)

        def see(name: str, x: Tensor, *_: Tensor | None) -> None:
            if once and not _is_expert(name):
                self.originals[name] = x

        return self._through(index, self.theirs, see)

    def _rotate_ends(self) -> None:
        """Turn the embedding and what computes logits; `ends` are their parameters as they are now."""
        self.weights.load(f"{self.path}.0")
        self._call_on(0, self.probe)  # from now on it is known what blocks return
        tokens = self.tokens[:1, : self.probe.shape[1]]
        names = rotate_ends(self.walk, tokens, self.probe, self.turn, self.weights.load)
        self.ends = {name: self._copy(name) for name in sorted(names)}

    def _rotate(self, index: int, path: str) -> dict[str, Tensor]:
        """Turn a block; the parameters that changed and are not wanted."""
        block = self.walk.blocks[index]
        names = rotate_block(block, path, partial(self._call_on, index), self.probe, self.turn, self.head)
        return {name: self._copy(name) for name in names if not self._is_wanted(name)}

    def _copy(self, name: str) -> Tensor:
        if self.stored(name) is None:
            raise RotationError(f"the checkpoint keeps no {name} in 16 bits")
        return self.model.get_parameter(name).data.to("cpu", copy=True)

    def _is_wanted(self, name: str) -> bool:
        return self.wanted(name) or self.wanted(f"{name}[0]")

    @cached_property
    def turn(self) -> Tensor:
        return hadamard(self.probe.shape[-1]).to(self.device)

    @property
    def head(self) -> int | None:
        """Channels of values in a head, where the config says it."""
        config: Any = getattr(self.model, "config", None)
        config = config.get_text_config() if hasattr(config, "get_text_config") else config
        for name in ("v_head_dim", "head_dim"):
            if getattr(config, name, None):
                return int(getattr(config, name))
        heads = getattr(config, "num_attention_heads", None)
        return self.probe.shape[-1] // heads if heads else None

    def _smooth(self, index: int, block: Block) -> None:
        """Fold scales into what produces the inputs of quantized layers, where it pays and changes nothing else."""
        module, layers = self.walk.blocks[index], self.quantized.layers
        few = slice(0, max(1, SAMPLE_TOKENS // self.tokens.shape[1]))
        folds, notes = find_folds(module, block.path, lambda: self._call_on(index, self.probe))
        block.notes += notes
        inputs = trace(module, block.path, lambda: self._run(index, few)).inputs
        for fold in folds:
            touched = {f"{fold.producer}.weight", *(re.sub(r"\[\d+\]$", "", name) for name in fold.consumers)}
            changed = {name for name in touched if not self._is_wanted(name)}
            changed |= {
                name for name, _ in module.named_parameters(prefix=block.path) if name == f"{fold.producer}.bias"
            }
            readers = [name for name in fold.consumers if name in layers and name in inputs]
            stuck = next((name for name in sorted(changed) if self.stored(name) is None), None)
            if stuck is not None or not readers:
                block.notes += (
                    [f"{fold.producer}: not scaled, the checkpoint keeps no {stuck} in 16 bits"] if stuck else []
                )
                continue
            scale, exponents = search(fold, readers, layers, inputs, self.quantized.input, self.steps.smooth)
            if exponents != (0.0, 0.0):
                apply(fold, scale, module, block.path, self.stored(f"{fold.producer}.weight"))
                block.scaled[fold.producer] = exponents
                block.changed |= {name: self._copy(name) for name in changed}

    def _run(self, index: int, part: slice) -> Tensor:
        """The output of a block for some rows of ours."""
        output = self.walk.call(index, self.ours.rows(part), self.tokens[part])
        assert output is not None  # nobody leaves
        return output

    def _call_on(self, index: int, hidden: Tensor) -> Tensor:
        """The output of a block for hidden states of one's own making."""
        output = self.walk.call(index, hidden, self.tokens[:1, : hidden.shape[1]])
        assert output is not None  # nobody leaves
        return output

    @cached_property
    def probe(self) -> Tensor:
        """Hidden states on which it is tried what a block may be turned into: random, and so small that what a block
        adds to them is not lost beside them."""
        generator = torch.Generator().manual_seed(0)
        shape = 1, min(PROBE_TOKENS, self.tokens.shape[1]), self.walk.entry(self.tokens[:1, :1]).shape[-1]
        dtype = next(p.dtype for p in self.walk.blocks[0].parameters() if p.is_floating_point())
        return (torch.randn(shape, generator=generator) * PROBE_SIZE).to(self.device, dtype)

    def _stages(self, index: int) -> list[list[str]]:
        """Names of layers in the order in which the block calls them, those that read one input together."""
        order: dict[str, list[str]] = defaultdict(list)
        last: list[tuple[Tensor, str]] = []

        def see(name: str, x: Tensor, *_: Tensor) -> None:
            key = last[0][1] if last and last[0][0] is x else alike(name)
            last[:] = [(x, key)]
            order[key].append(name)

        with LinearCalls(self.quantized.layers, see):
            self._call(index, self.ours, slice(0, 1))
        stages = [list(dict.fromkeys(names)) for names in order.values()]
        # all experts of a block read the same hidden states: what enters one tells of what enters the others
        experts = [alike(names[0]) for names in stages if _is_expert(names[0])]
        first = {re.split(r"\*", key)[0].rpartition(".")[0]: key for key in reversed(experts)}
        self.entries = set(first.values())
        seen = {name for names in stages for name in names}
        for name in self.quantized.layers:  # experts that none of the first tokens chose
            stage = next((s for s in stages if alike(name) in map(alike, s)), None)
            if name not in seen and stage is not None:
                stage.append(name)
        return stages

    def _stage(self, index: int, names: list[str], block: Block) -> None:
        observers = self._observe(index, names)
        groups: dict[int, list[str]] = defaultdict(list)
        for name, observer in observers.items():
            groups[id(observer)].append(name)
        alike: dict[tuple[int, ...], list[list[str]]] = defaultdict(list)  # groups that can be rounded in one batch
        for group in groups.values():
            observer = observers[group[0]]
            block.tokens |= dict.fromkeys(group, observer.tokens)
            if observer.tokens < FEWEST_TOKENS:
                block.notes.append(f"{_named(group)}: saw {observer.tokens} tokens, rounded without data")
                self._plainly(block, group)
            elif self.steps.gptq is None:
                self._plainly(block, group, None if observer.moments is None else observer.moments.diagonal())
            else:
                shapes = [self.quantized.layers[name].shape for name in group]
                alike[(*(n for n, _ in shapes), shapes[0][1])].append(group)
        for (*_, channels), batch in alike.items():
            step = max(1, MATRIX_ELEMENTS // channels**2)
            for begin in range(0, len(batch), step):
                self._round(block, batch[begin : begin + step], observers)

    def _round(self, block: Block, groups: list[list[str]], observers: dict[str, MomentObserver]) -> None:
        """Round groups of layers, all of the same shapes; those of a group share their inputs."""
        assert self.steps.gptq is not None
        seen = [observers[names[0]] for names in groups]
        moments = _batch([o.moments for o in seen if o.moments is not None])
        crosses = [o.cross for o in seen if o.cross is not None]
        cross = _batch(crosses) if len(crosses) == len(seen) else None
        try:
            rounder = self.steps.gptq.prepare(moments, cross)
        except SingularError as error:
            if len(groups) > 1:
                for names in groups:
                    self._round(block, [names], observers)
                return
            block.notes.append(f"{_named(groups[0])}: {error}, rounded without data")
            self._plainly(block, groups[0])
            return
        del moments, cross, crosses
        for observer in seen:
            observer.moments = observer.cross = None  # a matrix of K x K each
        layers = self.quantized.layers
        for columns in _runs([*zip(*groups, strict=True)], lambda names: sum(layers[n].numel() for n in names)):
            rows = [[*names] for names in zip(*columns, strict=True)]  # of each group the layers that go now
            codes, scale = rounder.round(torch.stack([torch.cat([layers[n] for n in names]) for names in rows]))
            for names, c, s in zip(rows, codes, scale, strict=True):
                self._keep(block, names, c, s)

    def _plainly(self, block: Block, names: list[str], importance: Tensor | None = None) -> None:
        for name in names:
            self._keep(block, [name], *round_int4(self.quantized.layers[name], importance=importance))

    def _keep(self, block: Block, names: list[str], codes: Tensor, scale: Tensor) -> None:
        sizes = [len(self.quantized.layers[name]) for name in names]
        for name, c, s in zip(names, codes.split(sizes), scale.split(sizes), strict=True):
            self.quantized.set(name, c, s)
            block.rounded[name] = (pack_int4(c).to("cpu"), s.to("cpu"))

    def _observe(self, index: int, names: list[str]) -> dict[str, MomentObserver]:
        """Second moments of the inputs of these layers over all tokens; layers that read one tensor share theirs."""
        observers: dict[str, MomentObserver] = {}
        theirs = self.originals
        wanted = set(names)
        dense = not any(_is_expert(name) for name in names)
        pooled = alike(names[0]) in self.entries
        last: list[tuple[Tensor, MomentObserver]] = []

        def remember(name: str, x: Tensor, *_: Tensor) -> None:
            if name in wanted:
                theirs[name] = x
                self._leave(dense, theirs, wanted)

        def collect(name: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
            if name not in wanted:
                return self.quantized.product(name, x, weight, bias)
            if last and last[0][0] is x and observers.setdefault(name, last[0][1]) is last[0][1]:
                pass
            else:
                shared = next(iter(observers.values())) if pooled and observers else MomentObserver()
                observer = observers.setdefault(name, shared)
                flat = self.quantized.input(x).reshape(-1, x.shape[-1])
                observer.update(flat, theirs[name].reshape(flat.shape) if name in theirs else None)
                last[:] = [(x, observer)]
            seen.add(name)
            self._leave(dense, seen, wanted)
            return self.quantized.product(name, x, weight, bias)

        for part in self._parts():
            if self.steps.original and dense and not self.originals:
                theirs = {}
                with LinearCalls(self.quantized.layers, remember):
                    self._call(index, self.theirs, part)
            seen: set[str] = set()
            last.clear()
            with LinearCalls(self.quantized.layers, collect):
                self._call(index, self.ours, part)
        return observers

    def _leave(self, dense: bool, seen: object, wanted: set[str]) -> None:
        if dense and len(seen) == len(wanted):  # type: ignore[arg-type]
            raise LeaveError

    def _through(self, index: int, stream: Stream, product: Product) -> Tensor:
        """All hidden states of a stream after the block."""
        with LinearCalls(self.quantized.layers, product):
            states = [self._call(index, stream, part) for part in self._parts()]
        return torch.cat(states)  # type: ignore[arg-type]

    def _tune(self, index: int, block: Block, targets: Tensor, settings: Tune) -> None:
        layers = self.quantized.layers
        latents = {name: Latent(layers[name], *block.codes(name, self.device)) for name in block.rounded}

        def product(name: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            quantized = x + (self.quantized.input(x.detach()) - x).detach()
            return nn.functional.linear(quantized, latents[name].weight(x.dtype), bias)

        def error(rows: Tensor) -> Tensor:
            with LinearCalls(layers, product):
                output = self.walk.call(index, self.ours.rows(rows), self.tokens[rows])
            assert output is not None  # nobody leaves
            target = targets[rows].to(self.device, torch.float32)
            difference = (output.to(torch.float32) - target).square().sum(dim=-1)
            return (difference / target.square().sum(dim=-1)).mean()

        block.error = tune(latents, error, len(self.tokens), settings)
        for name, latent in latents.items():
            self._keep(block, [name], latent.codes().to(torch.int8), latent.scale)

    def _parts(self) -> Iterator[slice]:
        for begin in range(0, len(self.tokens), self.at_once):
            yield slice(begin, min(begin + self.at_once, len(self.tokens)))

    def _call(self, index: int, stream: Stream, part: slice) -> Tensor | None:
        output = self.walk.call(index, stream.rows(part), self.tokens[part])
        return None if output is None else output.to(stream.device)

    def _backing_off(self, work: Callable[[], T]) -> T:
        """Do it; where the memory does not suffice, hidden states go to the CPU, then fewer rows run at a time."""
        while True:
            try:
                return work()
            except torch.OutOfMemoryError:
                on_gpu = self.ours.device.type != "cpu"
                if not on_gpu and self.at_once == 1:
                    raise
            self.originals = {}
            if on_gpu:
                for stream in (self.ours, self.theirs):
                    stream.device = torch.device("cpu")
                    stream.states = None if stream.states is None else stream.states.to("cpu")
            else:
                self.at_once = max(1, self.at_once // 2)
            torch.cuda.empty_cache()


class _Quantized:
    """The layers of a block, and what they compute once they are quantized."""

    def __init__(self, layers: dict[str, Tensor], spec: TensorSpec | None) -> None:
        self.layers, self.spec = layers, spec
        self.decoded: dict[str, Tensor] = {}

    def set(self, name: str, codes: Tensor, scale: Tensor) -> None:
        self.decoded[name] = decode_int4(codes, scale).to(self.layers[name].dtype)

    def input(self, x: Tensor) -> Tensor:
        if self.spec is None or not x.numel():
            return x
        return quantize(x.reshape(-1, x.shape[-1]), self.spec).dequantize(x.dtype).reshape(x.shape)

    def product(self, name: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return nn.functional.linear(self.input(x), self.decoded.get(name, weight), bias)


def _batch(matrices: list[Tensor]) -> Tensor:
    """[B, K, K]; one alone is not copied."""
    return torch.stack(matrices) if len(matrices) > 1 else matrices[0][None]


def _runs(items: list[U], size: Callable[[U], int]) -> Iterator[list[U]]:
    """Cut a list into runs of at most WEIGHT_ELEMENTS, or of one item."""
    run: list[U] = []
    for item in items:
        if run and sum(map(size, run)) + size(item) > WEIGHT_ELEMENTS:
            yield run
            run = []
        run.append(item)
    yield run


def _named(names: list[str]) -> str:
    """Layers that read one input, for a note."""
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} that read the same"


def _is_expert(name: str) -> bool:
    return alike(name) != name
