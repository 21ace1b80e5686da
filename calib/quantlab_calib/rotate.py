"""The residual stream, and the values of each head, turned by an orthogonal matrix that spreads outliers.

A residual stream turned by R, with every weight that writes it turned along and every weight that reads it turned back,
gives the same model (QuaRot, arXiv 2404.00456; R1 and R2 of SpinQuant, 2405.16406). Weights and activations then look
Gaussian, which is what a few equally spaced codes suit best. Norms between the stream and its readers must be free of
weights, so theirs go into the readers.

Who reads a norm and which channels of values meet which of the output projection is found as in `smooth`; what else
writes as many channels as the stream has is taken for a writer, and the block is held against itself: turned input must
give turned output. A block that does not is left to the caller to refuse.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from quantlab_calib.capture import Walk, linear_weights
from quantlab_calib.smooth import TOLERANCE, find_folds, norm_offset, norms_of, roundoff


class RotationError(ValueError):
    """A block that computes something else once it is turned."""


@torch.no_grad()
def rotate_block(
    block: nn.Module, path: str, run: Callable[[Tensor], Tensor], hidden: Tensor, turn: Tensor, head: int | None
) -> set[str]:
    """Turn a block's weights in place, in float64, and return the names of the parameters that changed.

    run     hidden states [1, tokens, H] -> what the block makes of them
    hidden  hidden states to try it on; small ones, so that the residual stream does not hide what the block adds
    turn    float64 [H, H], orthogonal
    head    channels of values in a head, which are turned too; None leaves them
    Raises RotationError where the turned block does not give the turned output.
    """
    before = run(hidden)
    wanted = (before.double() - hidden.double()) @ turn
    folds, _ = find_folds(block, path, lambda: run(hidden))
    modules, weights = dict(block.named_modules(prefix=path)), linear_weights(block, path, routers=True)
    norms = [fold for fold in folds if modules[fold.producer].get_parameter("weight").ndim == 1]
    readers = {name for fold in norms for name in fold.consumers}
    values = set()
    for fold in folds:
        if head and fold not in norms and _by_heads(fold.channels, head):
            values |= _try_values(modules[fold.producer], weights[fold.consumers[0]], head, fold.producer, run, hidden)
    changed = values | {name.partition("[")[0] for name in readers}
    for fold in norms:
        weight = modules[fold.producer].get_parameter("weight")
        columns = weight.double() + fold.offset
        if len(weight) != len(turn):
            raise RotationError(f"{fold.producer}: norms {len(weight)} channels, the stream has {len(turn)}")
        for name in fold.consumers:
            _put(weights[name], (weights[name].double() * columns) @ turn)
        weight.fill_(1 - fold.offset)
        if not _turns(modules[fold.producer], turn):
            raise RotationError(
                f"{fold.producer}: a {type(modules[fold.producer]).__name__} does not commute with turning"
            )
        changed.add(f"{fold.producer}.weight")
    for name, weight in weights.items():
        if name not in readers and weight.shape[0] == len(turn):
            _put(weight, turn.T @ weight.double())
            changed.add(name.partition("[")[0])
            bias = getattr(modules.get(name.rpartition(".")[0]), "bias", None)
            if bias is not None:
                _put(bias, bias.double() @ turn)
                changed.add(name.removesuffix("weight") + "bias")
    turned = (hidden.double() @ turn).to(hidden.dtype)
    if not _equal(run(turned).double() - turned.double(), wanted, before):
        raise RotationError(f"{path}: its output does not turn with its input")
    return changed


@torch.no_grad()
def rotate_ends(
    walk: Walk, tokens: Tensor, hidden: Tensor, turn: Tensor, load: Callable[[str, bool], None]
) -> set[str]:
    """Turn what writes the stream before the first block and what reads it after the last, in place, in float64.

    tokens  [1, T], with hidden states [1, T, H] to try both ends on
    load    fills the parameters of the module at a path
    Returns the names of the parameters that changed. Raises RotationError for tied embeddings, and where an end then
    computes something else.
    """
    model: Any = walk.model
    modules = dict(model.named_modules())
    paths = {module: path for path, module in modules.items()}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    norms = [path for path in norms_of(model, "") if not path.startswith(f"{walk.path}.")]
    if embedding is None or head is None or len(norms) != 1:
        raise RotationError(f"no embedding, output layer and one norm before it ({len(norms)} norms outside of blocks)")
    for path in (paths[embedding], paths[head], norms[0]):
        load(path, False)
    if embedding.weight is head.weight or embedding.weight.data_ptr() == head.weight.data_ptr():
        extra = embedding.weight.numel() * embedding.weight.element_size() / 1e6
        raise RotationError(f"embeddings are tied to the output layer; turned they would be two, {extra:.0f} MB more")
    if embedding.weight.shape[1] != len(turn):
        raise RotationError(f"embeddings have {embedding.weight.shape[1]} channels, the stream has {len(turn)}")
    norm = modules[norms[0]]
    entry, exit_ = walk.entry(tokens), walk.exit(hidden, tokens)
    _put(embedding.weight, embedding.weight.double() @ turn)
    offset = norm_offset(norm, hidden)
    _put(head.weight, (head.weight.double() * (norm.get_parameter("weight").double() + offset)) @ turn)
    norm.get_parameter("weight").fill_(1 - offset)
    turned = (hidden.double() @ turn).to(hidden.dtype)
    if not _turns(norm, turn):
        raise RotationError(f"{norms[0]}: a {type(norm).__name__} does not commute with turning")
    if not _equal(walk.entry(tokens), entry.double() @ turn, entry):
        raise RotationError("hidden states that enter the first block do not turn with the embedding")
    if not _equal(walk.exit(turned, tokens), exit_, exit_):
        raise RotationError("logits change when what they are computed from is turned")
    return {f"{paths[embedding]}.weight", f"{paths[head]}.weight", f"{norms[0]}.weight"}


def _turns(norm: nn.Module, turn: Tensor) -> bool:
    """Whether a norm of equal weights only scales: no mean is taken off, no bias added."""
    norm = copy.deepcopy(norm).double()
    x = torch.randn(8, len(turn), dtype=torch.float64, device=turn.device) + 1
    return torch.allclose(norm(x @ turn), norm(x) @ turn, rtol=1e-4, atol=1e-4)


def _by_heads(channels: Tensor, head: int) -> bool:
    """Whether input channels come from a head of values each, in order."""
    if len(channels) % head:
        return False
    heads = channels.unflatten(0, (-1, head))
    return bool((heads == heads[:, :1] + torch.arange(head)).all())


def _try_values(
    values: nn.Module, output: Tensor, head: int, name: str, run: Callable[[Tensor], Tensor], hidden: Tensor
) -> set[str]:
    """Turn the values of each head, and what reads them back; undone where that changes the block, as it does where
    channels meet others one by one and not in a sum over tokens (a gated MLP)."""
    turn, before = hadamard(head, seed=1).to(output.device), run(hidden)
    weight, bias = values.get_parameter("weight"), getattr(values, "bias", None)
    kept = [(t, t.data.clone()) for t in (weight, output, bias) if t is not None]
    _put(weight, (turn.T @ weight.double().unflatten(0, (-1, head))).flatten(0, 1))
    if bias is not None:
        _put(bias, (bias.double().unflatten(0, (-1, head)) @ turn).flatten())
    _put(output, (output.double().unflatten(1, (-1, head)) @ turn).flatten(1))
    if not _equal(run(hidden) - hidden, before - hidden, before):
        for tensor, value in kept:
            _put(tensor, value)
        return set()
    return {f"{name}.weight", f"{name}.bias"} if bias is not None else {f"{name}.weight"}


def _equal(a: Tensor, b: Tensor, size: Tensor) -> bool:
    """Whether a is b but for what rounding leaves in numbers as large as `size`."""
    error, rounding = (a.double() - b.double()).square().mean(), roundoff(size) ** 2 * size.double().square().mean()
    return bool(error <= TOLERANCE**2 * b.double().square().mean() + rounding)


def _put(tensor: Tensor, value: Tensor) -> None:
    tensor.data.copy_(value)


def hadamard(size: int, seed: int = 0) -> Tensor:
    """A random orthogonal matrix [size, size] in float64 whose entries are as equal in size as possible.

    A Hadamard matrix where one is known: Sylvester's for powers of two, times one of Paley's (896 = 32 x 28). For
    other sizes the odd factor gets a random orthogonal matrix. Rows get random signs, so that a constant vector is not
    turned into a single large channel.
    """
    generator = torch.Generator().manual_seed(seed)
    order = size
    while order % 2 == 0 and _paley(order) is None:
        order //= 2
    core = _paley(order)
    if core is None:
        core = torch.linalg.qr(torch.randn(order, order, generator=generator, dtype=torch.float64))[0]
    else:
        core = core / order**0.5
    while len(core) < size:
        core = torch.cat([torch.cat([core, core], 1), torch.cat([core, -core], 1)]) / 2**0.5
    signs = torch.randint(0, 2, (size, 1), generator=generator, dtype=torch.float64) * 2 - 1
    return core * signs


def _paley(order: int) -> Tensor | None:
    """A Hadamard matrix of this order from the squares modulo a prime (Paley 1933), or None."""
    if order in (1, 2):
        return torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)[:order, :order]
    if _prime(order - 1) and (order - 1) % 4 == 3:
        return torch.eye(order, dtype=torch.float64) + _bordered(order - 1, -1.0)
    half = order // 2
    if order % 2 == 0 and half > 1 and _prime(half - 1) and (half - 1) % 4 == 1:
        conference, one = _bordered(half - 1, 1.0), torch.eye(half, dtype=torch.float64)
        return torch.kron(conference, torch.tensor([[1.0, 1.0], [1.0, -1.0]])) + torch.kron(
            one, torch.tensor([[1.0, -1.0], [-1.0, -1.0]])
        )
    return None


def _bordered(prime: int, sign: float) -> Tensor:
    """Jacobsthal's matrix of quadratic residues with a border of ones: a conference matrix of order prime + 1."""
    squares = {i * i % prime for i in range(1, prime)}
    row = torch.tensor([0.0] + [1.0 if i in squares else -1.0 for i in range(1, prime)], dtype=torch.float64)
    index = torch.arange(prime)
    bordered = torch.zeros(prime + 1, prime + 1, dtype=torch.float64)
    bordered[1:, 1:] = row[(index[:, None] - index[None]) % prime]
    bordered[0, 1:], bordered[1:, 0] = 1.0, sign
    return bordered


def _prime(n: int) -> bool:
    return n > 1 and all(n % i for i in range(2, int(n**0.5) + 1))
