"""Codes that minimise the error of a whole block's output, found by gradient descent.

GPTQ knows each layer by itself and takes its error to be quadratic. Here the block runs as it will be deployed,
activations quantized, and the gradient of its output's error says for every weight whether the code above or below
serves better. Latent weights, in units of the scale, move by the sign of their gradient; their nearest codes are what
counts, the gradient passes through the rounding (AutoRound's SignSGD, arXiv 2309.05516, here from GPTQ's codes on). The
step falls to zero, and the latent with the least error seen on held-out rows is kept: it cannot get worse than it was.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from quantlab_calib.rounding import CODE_MAX


@dataclass(frozen=True)
class Tune:
    """How long and how fast codes are tuned.

    steps   of gradient descent for each block
    rows    of the calibration data in one step
    reach   how far a latent weight can move in all steps together, in codes
    """

    steps: int = 200
    rows: int = 8
    reach: float = 0.5
    seed: int = 0


class Latent:
    """Latent weights of one layer: codes with what was rounded off, cut so that the codes are those given."""

    def __init__(self, weight: Tensor, codes: Tensor, scale: Tensor) -> None:
        self.scale = scale
        wanted = weight.to(torch.float32).unflatten(1, (scale.shape[1], -1)) / scale[:, :, None]
        near = codes.to(torch.float32)
        self.value = (near + (wanted.flatten(1) - near).clamp_(-0.49, 0.49)).requires_grad_()

    def weight(self, dtype: torch.dtype) -> Tensor:
        """The decoded weight [N, K], differentiable."""
        codes = self.value + (self.codes() - self.value).detach()
        return (codes.unflatten(1, (self.scale.shape[1], -1)) * self.scale[:, :, None]).flatten(1).to(dtype)

    def codes(self) -> Tensor:
        return self.value.detach().round().clamp_(-CODE_MAX, CODE_MAX)


def tune(
    latents: dict[str, Latent],
    error: Callable[[Tensor], Tensor],
    samples: int,
    settings: Tune,
) -> tuple[float, float]:
    """Move latents, in place, to where the error of the block's output is least.

    error    row numbers [R] -> the error of the output on those rows of the calibration data, differentiable
    samples  how many rows there are; an eighth of them, if that is any, is held out to choose the best step

    Returns the error on those before and after.
    """
    generator = torch.Generator().manual_seed(settings.seed)
    order = torch.randperm(samples, generator=generator)
    held, rest = order.split([max(1, samples // 8), samples - max(1, samples // 8)]) if samples > 1 else (order, order)
    values = [latent.value for latent in latents.values()]

    def measure() -> float:
        with torch.no_grad():
            return sum(float(error(part)) * len(part) for part in held.split(settings.rows)) / len(held)

    before = least = measure()
    best = [value.detach().clone() for value in values]
    for step in range(settings.steps):
        rows = rest[torch.randperm(len(rest), generator=generator)[: settings.rows]]
        with torch.enable_grad():
            gradients = torch.autograd.grad(error(rows), values)
        rate = 2 * settings.reach / settings.steps * (1 - step / settings.steps)
        with torch.no_grad():
            for value, gradient in zip(values, gradients, strict=True):
                value.sub_(gradient.sign_(), alpha=rate)
        if (step + 1) % max(1, settings.steps // 8) == 0:
            now = measure()
            if now < least:
                least = now
                for kept, value in zip(best, values, strict=True):
                    kept.copy_(value.detach())
    with torch.no_grad():
        for value, kept in zip(values, best, strict=True):
            value.copy_(kept)
    return before, least
