"""Quantization of a full-precision model's products, simulated: the weights stay, chosen products come out quantized.

Products are known by the address of their weight, at the one function that all linear layers call, like in
`quantlab_calib.capture`; so experts in one fused parameter are covered too. Nothing in the model is replaced.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from quantlab import kinds
from quantlab.architecture import load_targets
from quantlab.jobs import nearest
from quantlab.kinds import common_name
from quantlab.preflight import Plan
from quantlab.scheme import Scheme
from quantlab_kernels.qtensor import quantize


@dataclass(frozen=True)
class Unit:
    """Layers that engines fuse, and so the least that can have a scheme of its own: q, k and v; the experts of a block.

    name      the module, or the common name of the fused ones
    modules   by their names in the checkpoint
    elements  of their weights
    """

    name: str
    modules: tuple[str, ...]
    elements: int

    @property
    def patterns(self) -> tuple[str, ...]:
        """What matches them in a recipe."""
        return (f"{self.name}.*",) if kinds.experts_of(self.name) == self.name else self.modules


def units_of(plan: Plan) -> list[Unit]:
    """The units of all that a plan quantizes, in the order of the model."""
    groups: dict[tuple[str, ...] | str, list[str]] = {}
    elements: dict[str, int] = {}
    for decision in plan.quantized:
        key = kinds.experts_of(decision.module) or kinds.fused_group(decision.module)
        groups.setdefault(key, []).append(decision.tensor)
        elements[decision.tensor] = decision.info.elements
    found = []
    for key, tensors in groups.items():
        modules = tuple(tensor.removesuffix(".weight") for tensor in tensors)
        name = key if isinstance(key, str) else common_name([module for module in key if module in modules])
        found.append(Unit(name, modules, sum(elements[tensor] for tensor in tensors)))
    return sorted(found, key=lambda unit: _natural(unit.name))


def _natural(name: str) -> list[Any]:
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.split(".")]


def addresses(model: nn.Module, plan: Plan) -> dict[int, str]:
    """Address of each weight, or of each expert's part of a fused one -> name of its unit."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    names = {module: unit.name for unit in units_of(plan) for module in unit.modules}
    found = {}
    targets = load_targets(model, [decision.tensor for decision in plan.quantized])
    for decision in plan.quantized:
        target = targets.get(decision.tensor)
        if target is None or target.parameter not in parameters:
            continue
        parameter = parameters[target.parameter]
        for part in parameter if parameter.ndim == 3 else (parameter,):
            found[part.data_ptr()] = names[decision.tensor.removesuffix(".weight")]
    return found


def quantized_product(x: Tensor, weight: Tensor, bias: Tensor | None, scheme: Scheme) -> Tensor:
    """``x @ weight.T + bias`` with both operands quantized as the scheme says, in the dtype of `x`."""
    flat = x.reshape(-1, x.shape[-1])
    if scheme.input is not None and len(flat):
        flat = quantize(flat, scheme.input).dequantize(x.dtype)
    return nn.functional.linear(flat, weight, bias).reshape(*x.shape[:-1], weight.shape[0])


Product = Callable[[str, Tensor, Tensor, Tensor | None], Tensor]


class Products(TorchFunctionMode):
    """While entered, products with a known weight are computed by `product(unit, x, weight, bias)`."""

    def __init__(self, known: dict[int, str], product: Product) -> None:
        self._known, self._product = known, product
        super().__init__()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is nn.functional.linear:
            given = dict(zip(("input", "weight", "bias"), args, strict=False)) | kwargs
            unit = self._known.get(given["weight"].data_ptr())
            if unit is not None:
                return self._product(unit, given["input"], given["weight"], given.get("bias"))
        return func(*args, **kwargs)


def quantizing(known: dict[int, str], schemes: dict[str, Scheme]) -> Products:
    """A context in which the units in `schemes` are quantized and everything else is not."""
    weights: dict[int, Tensor] = {}

    def product(unit: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        address, scheme = weight.data_ptr(), schemes[unit]
        if address not in weights:
            weights[address] = nearest(weight.detach(), scheme.weight).dequantize(weight.dtype)
        return quantized_product(x, weights[address], bias, scheme)

    return Products({address: name for address, name in known.items() if name in schemes}, product)


def perturbing(known: dict[int, str], schemes: dict[str, Scheme], take: Callable[[str, str, Tensor], None]) -> Products:
    """A context in which nothing is quantized, and in the backward pass `take(unit, scheme, change)` gets, for each
    token, the first-order change of the loss if that product alone were: its error times its gradient, summed over
    the channels."""

    def product(unit: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        exact = nn.functional.linear(x, weight, bias)
        with torch.no_grad():
            errors = {}
            for name, scheme in schemes.items():
                rounded = nearest(weight, scheme.weight).dequantize(weight.dtype)
                errors[name] = quantized_product(x.detach(), rounded, bias, scheme) - exact

        def changed(gradient: Tensor) -> None:
            for name, error in errors.items():
                take(unit, name, (gradient.float() * error.float()).sum(dim=-1))

        if exact.requires_grad:
            exact.register_hook(changed)
        return exact

    return Products(known, product)
