"""One launch for a group of channels does what the steps of torch do."""

from __future__ import annotations

import pytest
import torch

from quantlab_calib.gptq import Gptq, _nearest
from quantlab_calib.search import round_columns


def problem(batch: int, rows: int) -> tuple[torch.Tensor, ...]:
    """Weights, steps, what is passed on, and old values, whose sums have no roundoff: codes can be compared."""
    generator = torch.Generator().manual_seed(0)
    w, old = (torch.randint(-64, 65, (batch, 128, rows), generator=generator) / 8.0 for _ in range(2))
    step = 2.0 ** torch.randint(-1, 2, (batch, 128, rows), generator=generator)
    pass_on = torch.randint(-2, 3, (batch, 128, 128), generator=generator) / 4.0
    pass_on[:, 1::2] = 0.0  # an error goes from an even channel to odd ones and no further
    pass_on[:, :, ::2] = 0.0
    return w, step, pass_on, old


@pytest.mark.gpu(sm=80)
@pytest.mark.parametrize("against", [False, True])
def test_a_launch_gives_the_codes_and_errors_of_the_steps(against):
    from quantlab_calib import columns

    w, step, pass_on, old = problem(3, 77)
    old = old if against else None
    wanted = round_columns(w.clone(), step, pass_on, _nearest, old)
    found = columns.round_columns(*(t if t is None else t.cuda().mT.contiguous().mT for t in (w, step, pass_on, old)))
    for a, b in zip(found, wanted, strict=True):
        assert torch.equal(a.cpu(), b)


@pytest.mark.gpu(sm=80)
def test_a_gpu_rounds_to_the_same_error():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2000, 1152, generator=generator) @ torch.randn(1152, 1152, generator=generator)
    moments, weight = (x.T @ x)[None] / 2000, torch.randn(1, 200, 1152, generator=generator)
    errors = []
    for device in ("cpu", "cuda"):
        codes, scale = Gptq(damping=0.05, sweeps=1).prepare(moments.to(device)).round(weight.to(device))
        wrong = codes.cpu()[0].unflatten(1, (9, 128)) * scale.cpu()[0, :, :, None]
        wrong = wrong.flatten(1) - weight[0]
        errors.append(float((wrong @ moments[0] @ wrong.T).diagonal().sum()))
    assert errors[1] == pytest.approx(errors[0], rel=0.03)
