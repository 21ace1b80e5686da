"""Orthogonal matrices with entries of equal size: what spreads an outlier channel over all channels.

A residual stream turned by an orthogonal matrix, with every weight that writes it turned along and every weight that
reads it turned back, gives the same model (QuaRot, arXiv 2404.00456, R1 and R2 of SpinQuant, 2405.16406). Weights and
activations then look Gaussian, which is what a few equally spaced codes suit best.
"""

from __future__ import annotations

import torch
from torch import Tensor


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
