"""Run a model on data block by block, one block's weights in memory, and observe what enters its linear layers.

A transformer is embeddings, a list of equal blocks, and a head. The list is found by its shape; no name of a model is
known here and nothing is traced. To run block i, the model's own `forward` is called with the blocks before it passing
their input through and the stored hidden states put in at its place, and is left as soon as block i has answered. So
every block gets exactly the masks, position embeddings and per-layer inputs that the model would give it, which a loop
of our own over the blocks would have to imitate for each architecture; the price is the embedding, once per block.

Models with no such list, or whose blocks pass on more than hidden states (encoder-decoders), are observed as a whole.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from quantlab_calib.observers import InputObserver


class Weights(Protocol):
    """Where the weights of a model come from, and go."""

    def load(self, path: str, recurse: bool = True) -> None:
        """Fill the parameters of the module at `path`, and below it if `recurse`; called again, do nothing."""

    def release(self, path: str) -> None:
        """Give the memory of all parameters below `path` back."""


class CaptureError(Exception):
    """The model does not run this way: what it said, one line."""


@dataclass
class Captured:
    """One block that has seen all data, its weights still in memory.

    path    of the block in the model; "" where the model was observed as a whole
    module  the block
    inputs  an observer for each linear layer that saw a token, by the name of its weight, such as
            "model.layers.0.mlp.up_proj.weight"; "model.layers.0.mlp.experts.down_proj[3]" is expert 3 of a fused one
    """

    path: str
    module: nn.Module
    inputs: dict[str, InputObserver] = field(default_factory=dict)


def find_blocks(model: nn.Module) -> str | None:
    """Path of the list of repeated blocks that holds most of the parameters, or None where there is not exactly one.

    Blocks are of one class and hold linear layers; lists inside blocks (experts) are not looked at.
    """
    found: dict[str, int] = {}
    for path, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or not len(module) or any(path.startswith(f"{p}.") for p in found):
            continue
        if len({type(block) for block in module}) == 1 and any(isinstance(m, nn.Linear) for m in module.modules()):
            found[path] = sum(p.numel() for p in module.parameters())
    large = [path for path, size in found.items() if size * 4 >= max(found.values())]
    return large[0] if len(large) == 1 else None


@torch.no_grad()
def capture(
    model: nn.Module,
    batches: Sequence[Tensor],
    weights: Weights,
    *,
    device: torch.device,
    blocks: str | None,
    unobserved: Container[str] = (),
) -> Iterator[Captured]:
    """Yield each block of the list at path `blocks` after it has seen all `batches` (token ids, int64 [rows, length]).

    model       its parameters may be on the meta device
    weights     loads parts of it to `device` and releases them
    blocks      from `find_blocks`; None runs the model as a whole, with all its weights in memory
    unobserved  paths of blocks that only run, for the sake of those behind them; they are yielded too
    Raises CaptureError where the model does not run so.
    """
    model.eval()
    if blocks is None:
        weights.load("")
        captured = Captured("", model)
        with observing(captured):
            for batch in batches:
                with _as_capture_error():
                    model(**_inputs(model, batch.to(device)))
        yield captured
        weights.release("")
        return
    with loading_when_called(model, blocks, weights):
        yield from _block_by_block(model, batches, weights, device, blocks, unobserved)


def _block_by_block(
    model: nn.Module,
    batches: Sequence[Tensor],
    weights: Weights,
    device: torch.device,
    path: str,
    unobserved: Container[str],
) -> Iterator[Captured]:
    walk = Walk(model, path, device)
    hidden: list[Tensor | None] = [None] * len(batches)  # what enters the next block, per batch, on the CPU
    for index, block in enumerate(walk.blocks):
        name = f"{path}.{index}"
        weights.load(name)
        captured = Captured(name, block)
        with contextlib.nullcontext() if name in unobserved else observing(captured):
            for i, batch in enumerate(batches):
                hidden[i] = walk.through(index, hidden[i], batch)
        yield captured
        weights.release(name)


class LeaveError(Exception):
    """Leaves the model's forward: the block in question has answered, or what was to be seen of it has been seen."""


class Walk:
    """Runs one block of a model at a time, inside the model's own forward.

    path   of the list of blocks
    given  arguments of the model's forward beside the tokens
    """

    def __init__(
        self, model: nn.Module, path: str, device: torch.device, given: Mapping[str, Any] | None = None
    ) -> None:
        self.model, self.path, self.device, self.given = model, path, device, given or {}
        self.blocks = [*model.get_submodule(path).children()]
        self.returned = 0  # length of the tuple that a block returns; 0 for a plain tensor

    def call(self, index: int, hidden: Tensor | None, batch: Tensor) -> Tensor | None:
        """What block `index` makes of `hidden` (None: of what the model gives it), on the device of the walk.

        None where somebody inside the block raised LeaveError. Raises CaptureError for blocks that take or return
        something else than hidden states.
        """
        block = self.blocks[index]
        forward = block.forward
        answer: Any = None

        def stand_in(*args: Any, **kwargs: Any) -> Any:
            nonlocal answer
            if hidden is not None:
                args, kwargs = _with_hidden(args, kwargs, hidden.to(self.device))
            answer = (forward(*args, **kwargs),)
            raise LeaveError

        with contextlib.ExitStack() as stack:
            for earlier in self.blocks[:index]:
                stack.enter_context(forward_replaced(earlier, self._pass))
            stack.enter_context(forward_replaced(block, stand_in))
            with _as_capture_error(), contextlib.suppress(LeaveError):
                self._run(batch)
        if answer is None:
            return None
        (answer,) = answer
        self.returned = len(answer) if isinstance(answer, tuple) else 0
        output = answer[0] if isinstance(answer, tuple) else answer
        if not isinstance(output, Tensor):
            raise CaptureError(f"{type(block).__name__} returns {type(output).__name__}, not hidden states")
        return output

    def entry(self, batch: Tensor) -> Tensor:
        """The hidden states that enter the first block."""
        found: list[Tensor] = []

        def leave(*args: Any, **kwargs: Any) -> Any:
            found.append(args[0] if args else kwargs["hidden_states"])
            raise LeaveError

        with forward_replaced(self.blocks[0], leave), _as_capture_error(), contextlib.suppress(LeaveError):
            self._run(batch)
        return found[0]

    def exit(self, hidden: Tensor, batch: Tensor) -> Tensor:
        """What the model makes of hidden states that leave the last block: its logits. Only after a block has run."""
        with contextlib.ExitStack() as stack:
            for block in self.blocks:
                stack.enter_context(forward_replaced(block, self._pass))
            stack.enter_context(forward_replaced(self.blocks[0], lambda *_, **__: self._pass(hidden)))
            with _as_capture_error():
                return self._run(batch)[0]

    def through(self, index: int, hidden: Tensor | None, batch: Tensor) -> Tensor:
        """The same, on the CPU."""
        output = self.call(index, hidden, batch)
        assert output is not None  # nobody leaves here
        return output.to("cpu")

    def _run(self, batch: Tensor) -> Any:
        return self.model(**{**_inputs(self.model, batch.to(self.device)), **self.given})

    def _pass(self, *args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        return (hidden, *[None] * (self.returned - 1)) if self.returned else hidden


def _with_hidden(
    args: tuple[Any, ...], kwargs: dict[str, Any], hidden: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if args:
        return (hidden, *args[1:]), kwargs
    if "hidden_states" not in kwargs:
        raise CaptureError(f"a block takes {', '.join(kwargs)}, no hidden states")
    return args, {**kwargs, "hidden_states": hidden}


@contextlib.contextmanager
def _as_capture_error() -> Iterator[None]:
    """Whatever a foreign forward raises for input that it does not understand; memory that ran out stays what it is."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, CaptureError, LeaveError):
        raise
    except Exception as error:
        raise CaptureError(f"{type(error).__name__}: {' '.join(str(error).split())[:120]}") from error


@contextlib.contextmanager
def forward_replaced(module: nn.Module, function: Callable[..., Any]) -> Iterator[None]:
    """For a while, `module` computes `function`; its attributes, which the model may read, stay."""
    before = module.__dict__.get("forward")  # of the instance; most modules have only that of their class
    module.forward = function
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before


def _inputs(model: nn.Module, batch: Tensor) -> dict[str, Any]:
    inputs: dict[str, Any] = {"input_ids": batch}
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = batch
    if getattr(config, "use_cache", None) is not None:
        inputs["use_cache"] = False
    return inputs


def load_when_called(model: nn.Module, except_below: str, weights: Weights) -> list[Any]:
    """Modules get their weights when they first run: what never runs is never loaded. Returns the hooks."""
    hooks = []
    for path, module in model.named_modules():
        if (
            path == except_below
            or path.startswith(f"{except_below}.")
            or not any(True for _ in module.parameters(recurse=False))
        ):
            continue
        hooks.append(module.register_forward_pre_hook(lambda _module, _args, path=path: weights.load(path, False)))
    return hooks


@contextlib.contextmanager
def loading_when_called(model: nn.Module, except_below: str, weights: Weights) -> Iterator[None]:
    """`load_when_called` meanwhile; behind it no weights are in memory."""
    hooks = load_when_called(model, except_below, weights)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        weights.release("")


@contextlib.contextmanager
def observing(captured: Captured) -> Iterator[None]:
    """Observe the inputs of all linear layers of `captured.module` that run meanwhile; q, k and v share an observer.

    Layers are known by their weights, at the one function that all of them call, and not by hooks on modules: experts
    that live in one fused parameter have no modules, and their inputs exist only inside their forward.
    """
    with LinearCalls(linear_weights(captured.module, captured.path), _Observing(captured.inputs)):
        yield


def linear_weights(module: nn.Module, path: str, *, routers: bool = False) -> dict[str, Tensor]:
    """Weights [N, K] of the linear layers at and below a module by name; of a fused parameter one for each expert.

    routers  also matrices of modules that are no linear layers, as those that choose experts
    """
    found: dict[str, Tensor] = {}
    for inner, child in module.named_modules(prefix=path):
        for name, parameter in child.named_parameters(prefix=inner, recurse=False):
            if parameter.ndim == 2 and (isinstance(child, nn.Linear) or (routers and name.endswith(".weight"))):
                found[name] = parameter
            elif parameter.ndim == 3:
                found |= {f"{name}[{expert}]": part for expert, part in enumerate(parameter)}
    return found


def alike(name: str) -> str:
    """One name for the layers of a kind of all experts of a block."""
    return re.sub(r"(experts\.)\d+(?=\.)|\[\d+\]$", r"\1*", name)


class LinearCalls(TorchFunctionMode):
    """While entered, `product(name, x, weight, bias)` computes what a linear layer with a known weight would; where it
    returns None the layer does so itself."""

    def __init__(self, weights: dict[str, Tensor], product: Callable[..., Tensor | None]) -> None:
        self._names = {weight.data_ptr(): (name, weight.shape[1]) for name, weight in weights.items()}
        self._product = product
        super().__init__()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is nn.functional.linear:
            given = dict(zip(("input", "weight", "bias"), args, strict=False)) | kwargs
            x, weight = given["input"], given["weight"]
            name, channels = self._names.get(weight.data_ptr(), ("", 0))
            if channels and channels == x.shape[-1]:
                output = self._product(name, x, weight, given.get("bias"))
                if output is not None:
                    return output
        return func(*args, **kwargs)


class _Observing:
    def __init__(self, inputs: dict[str, InputObserver]) -> None:
        self._inputs = inputs
        self._last: tuple[Any, InputObserver | None] = (None, None)

    def __call__(self, name: str, x: Tensor, *_: Any) -> None:
        """Layers that read one tensor (q, k and v; gate and up) share its observer."""
        last, observer = self._last
        if last is x and observer is not None and self._inputs.setdefault(name, observer) is observer:
            return
        observer = self._inputs.setdefault(name, InputObserver())
        observer.update(x.reshape(-1, x.shape[-1]))
        self._last = (x, observer)
