"""What a module's `forward` does with its linear layers, read from its source.

Layers that are called on one and the same variable can share its quantization and be computed as one GEMM; a gated MLP
can quantize its product without writing it. Reading the source finds both in any architecture and needs neither a list
of models nor a traced example; a `forward` that does not fit a pattern exactly is left as it is. A layer whose weight
the code reads or changes (Mamba's scans, casts to `weight.dtype`, RWKV's scales) cannot be quantized at all, and
an attention that computes on its mask or on cached keys does not get masks and keys in a form of ours.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache


def shared_inputs(forward: object, layers: frozenset[str]) -> list[tuple[str, ...]]:
    """Groups of two or more of `layers` (names of children) that `forward` calls on the same value, in call order.

    "The same value" is one variable name with no assignment to it in between. A layer that is called twice, or on an
    expression, belongs to no group.
    """
    tree = _parse(forward)
    if tree is None:
        return []
    version: Counter[str] = Counter()
    groups: dict[tuple[str, int], list[str]] = defaultdict(list)
    calls: Counter[str] = Counter()
    for event in _events(tree):
        if isinstance(event, str):
            version[event] += 1
            continue
        child = _self_attribute(event.func)
        if child is None or child not in layers:
            continue
        calls[child] += 1
        if len(event.args) == 1 and isinstance(event.args[0], ast.Name) and not event.keywords:
            groups[event.args[0].id, version[event.args[0].id]].append(child)
    found = (tuple(c for c in group if calls[c] == 1) for group in groups.values())
    return [group for group in found if len(group) > 1]


@dataclass(frozen=True)
class GatedMlp:
    """The children of ``down(act(gate(x)) * up(x))``."""

    gate: str
    up: str
    down: str
    act: str


def gated_mlp(forward: object) -> GatedMlp | None:
    """The gated MLP that `forward` is, if it takes one argument and does nothing else."""
    tree = _parse(forward)
    if tree is None or len(tree.args.args) != 2:
        return None
    argument = tree.args.args[1].arg
    match _only_value(tree):
        case ast.Call(func=down, args=[ast.BinOp(op=ast.Mult(), left=left, right=right)], keywords=[]):
            for gated, plain in ((left, right), (right, left)):
                activated, up, name = _activated(gated, argument), _called_on(plain, argument), _self_attribute(down)
                if activated and up and name:
                    return GatedMlp(gate=activated[1], up=up, down=name, act=activated[0])
    return None


@cache
def weights_read(kind: type) -> frozenset[str]:
    """Children whose weight the methods of a module's class read themselves, other than for its device.

    What lies under an `if` does not count: those are slow, exact or training paths that ask whether they may.
    """
    return frozenset(name for tree in _own_methods(kind) for name in _weights_read(tree))


@cache
def weights_written(kind: type) -> frozenset[str]:
    """Ends of the paths of layers below a module of this class whose weight its methods change in place (RWKV's
    scales of deep layers), under an `if` too."""
    return frozenset(path for tree in _own_methods(kind) for node in ast.walk(tree) if (path := _written(node)))


def _own_methods(kind: type) -> Iterator[ast.FunctionDef]:
    """The methods that the file of a class defines for it."""
    methods = (getattr(kind, name) for name in dir(kind))
    own = [m for m in methods if inspect.isfunction(m) and inspect.unwrap(m).__module__ == kind.__module__]
    return (tree for method in own if (tree := _parse(method)) is not None)


def _written(node: ast.AST) -> str:
    """`a.b` of ``anything.a.b.weight.mul_(...)``, empty for anything else."""
    match node:
        case ast.Call(func=ast.Attribute(value=ast.Attribute(value=layer, attr="weight"), attr=method)):
            names: list[str] = []
            while isinstance(layer, ast.Attribute):
                names, layer = [layer.attr, *names], layer.value
            return ".".join(names) if method.endswith("_") and method != "requires_grad_" else ""
    return ""


def _weights_read(node: ast.AST) -> Iterator[str]:
    match node:
        case ast.Attribute(value=ast.Attribute(attr="weight"), attr="device"):
            return
        case ast.Attribute(value=ast.Attribute(value=ast.Name(id="self"), attr=name), attr="weight"):
            yield name
    children = [node.test] if isinstance(node, ast.If) else ast.iter_child_nodes(node)
    for child in children:
        yield from _weights_read(child)


@cache
def computes_on_mask(forward: object) -> bool:
    """Whether an attention's `forward` does more with its mask than to hand it to transformers' interface."""
    tree = _parse(forward)
    if tree is None or not (interfaces := _interfaces(tree)):
        return False
    return "attention_mask" in _operands(tree, interfaces)


@cache
def computes_on_cached(forward: object) -> bool:
    """Whether an attention's `forward` does more with what a cache returned than to hand it to transformers' interface.

    What lies under an `if` behind the cache does not count: those are the same paths as in `weights_read`.
    """
    tree = _parse(forward)
    if tree is None or not (interfaces := _interfaces(tree)):
        return False
    cached: set[str] = set()
    for statement in tree.body:
        if cached and not isinstance(statement, ast.If) and cached & _operands(statement, interfaces):
            return True
        cached |= {name for node in ast.walk(statement) for name in _updated(node)}
    return False


def _interfaces(tree: ast.FunctionDef) -> set[str]:
    """Variables that hold an attention function of transformers' registry."""
    made = [node for node in ast.walk(tree) if isinstance(node, ast.Assign | ast.AnnAssign) and _names_registry(node)]
    return {event for node in made for event in _events(node) if isinstance(event, str)}


def _names_registry(node: ast.AST) -> bool:
    return any(isinstance(part, ast.Name) and part.id == "ALL_ATTENTION_FUNCTIONS" for part in ast.walk(node))


def _updated(node: ast.AST) -> set[str]:
    """The names of ``names = cache.update(...)``."""
    match node:
        case ast.Assign(targets=targets, value=ast.Call(func=ast.Attribute(value=ast.Name(), attr="update"))):
            return {part.id for target in targets for part in ast.walk(target) if isinstance(part, ast.Name)}
    return set()


def _operands(tree: ast.AST, interfaces: set[str]) -> set[str]:
    """Names that are computed on: called methods of, indexed, added or given to functions other than `interfaces`."""
    found: list[ast.AST] = []
    for node in ast.walk(tree):
        match node:
            case ast.Call(func=ast.Name(id=name)) if name in interfaces or name == "isinstance":
                continue
            case ast.Call(args=args, keywords=keywords):
                given = [*args, *(keyword.value for keyword in keywords)]
                lists = [part for value in given if isinstance(value, ast.List | ast.Tuple) for part in value.elts]
                found += [*given, *lists]
            case ast.Attribute(value=value, attr=attribute) if attribute not in ("shape", "dtype", "device", "ndim"):
                found.append(value)
            case ast.Subscript(value=value) | ast.UnaryOp(op=ast.Invert() | ast.USub(), operand=value):
                found.append(value)
            case ast.BinOp(left=left, right=right):
                found += [left, right]
    return {node.id for node in found if isinstance(node, ast.Name)}


@cache
def _parse(forward: object) -> ast.FunctionDef | None:
    try:
        node = ast.parse(textwrap.dedent(inspect.getsource(forward))).body[0]  # type: ignore[arg-type]
    except (OSError, TypeError, SyntaxError, IndexError):
        return None  # no source: compiled, or made at run time
    return node if isinstance(node, ast.FunctionDef) else None


def _events(node: ast.AST) -> list[ast.Call | str]:
    """Calls and assigned names in the order of evaluation: the right side of an assignment before its targets."""
    events: list[ast.Call | str] = []
    children = list(ast.iter_child_nodes(node))
    if isinstance(node, ast.Assign):
        children = [node.value, *node.targets]
    elif isinstance(node, ast.AugAssign | ast.AnnAssign | ast.NamedExpr):
        children = [child for child in (node.value, node.target) if child is not None]
    for child in children:
        events += _events(child)
    if isinstance(node, ast.Call):
        events.append(node)
    elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store | ast.Del):
        events.append(node.id)
    return events


def _self_attribute(node: ast.AST) -> str | None:
    match node:
        case ast.Attribute(value=ast.Name(id="self"), attr=name):
            return name
    return None


def _called_on(node: ast.AST, argument: str) -> str | None:
    """`name` of ``self.name(argument)``."""
    match node:
        case ast.Call(func=func, args=[ast.Name(id=given)], keywords=[]) if given == argument:
            return _self_attribute(func)
    return None


def _activated(node: ast.AST, argument: str) -> tuple[str, str] | None:
    """(`act`, `gate`) of ``self.act(self.gate(argument))``."""
    match node:
        case ast.Call(func=func, args=[inner], keywords=[]):
            act, gate = _self_attribute(func), _called_on(inner, argument)
            return (act, gate) if act and gate else None
    return None


def _only_value(tree: ast.FunctionDef) -> ast.AST | None:
    """The one expression of ``return value`` or ``name = value; return name``, a docstring aside."""
    body = [s for s in tree.body if not (isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant))]
    match body:
        case [ast.Return(value=value)]:
            return value
        case [ast.Assign(targets=[ast.Name(id=made)], value=value), ast.Return(value=ast.Name(id=returned))]:
            return value if made == returned else None
    return None
