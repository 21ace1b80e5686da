"""GPTQ over whole matrices: what it promises, on outputs that it has not seen."""

from __future__ import annotations

import pytest
import torch

from quantlab_calib.gptq import Gptq, SingularError, _invert
from quantlab_calib.observers import MomentObserver
from quantlab_calib.rounding import decode_int4, on_grid, round_int4


def correlated(tokens: int, channels: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(channels // 2, channels, generator=torch.Generator().manual_seed(9))
    size = torch.exp(torch.randn(channels, generator=torch.Generator().manual_seed(8)))
    x = torch.randn(tokens, channels // 2, generator=generator) @ mix
    return (x + torch.randn(tokens, channels, generator=generator)) * size


def weight_of(rows: int = 64, channels: int = 256) -> torch.Tensor:
    return torch.randn(rows, channels, generator=torch.Generator().manual_seed(1)) * 0.02


def observed(x: torch.Tensor, original: torch.Tensor | None = None) -> MomentObserver:
    observer = MomentObserver()
    for part in range(0, len(x), 100):
        band = slice(part, part + 100)
        observer.update(x[band], None if original is None else original[band])
    return observer


def error(weight, rounded, x, original=None) -> float:
    """Of the output on x, every token alike; `rounded` is codes and scales."""
    length = x.norm(dim=1, keepdim=True)
    wanted = (x if original is None else original) @ weight.T
    return float(((x @ decode_int4(*rounded).T - wanted) / length).square().sum())


def test_output_error_falls_on_data_that_was_not_seen():
    weight, x, unseen = weight_of(), correlated(3000, 256), correlated(1000, 256, seed=1)
    codes, scale = Gptq().prepare(observed(x).moments[None]).round(weight[None])
    assert error(weight, (codes[0], scale[0]), unseen) < 0.5 * error(weight, round_int4(weight), unseen)
    assert codes.dtype == torch.int8
    assert int(codes.abs().max()) <= 7
    assert torch.equal(on_grid(scale[0]), scale[0])


@pytest.mark.parametrize("act_order", [False, True])
def test_sweeps_only_lower_the_error(act_order):
    weight, x = weight_of(), correlated(2000, 256)
    moments = observed(x).moments[None]
    settings = [Gptq(damping=0.001, act_order=act_order, sweeps=n) for n in (0, 1, 3)]
    errors = [error(weight, [part[0] for part in g.prepare(moments).round(weight[None])], x) for g in settings]
    assert errors[0] > errors[1] >= errors[2]


def test_matrices_of_a_batch_do_not_know_of_each_other():
    weights = torch.stack([weight_of(), weight_of().flip(0)])
    moments = torch.stack([observed(correlated(1000, 256, seed)).moments for seed in (0, 1)])
    codes, scale = Gptq(sweeps=1).prepare(moments).round(weights)
    for i in range(2):
        alone = Gptq(sweeps=1).prepare(moments[i : i + 1]).round(weights[i : i + 1])
        assert torch.equal(codes[i], alone[0][0])
        assert torch.equal(scale[i], alone[1][0])


def test_aiming_at_the_original_makes_up_for_inputs_that_are_off():
    weight, original = weight_of(), correlated(4000, 256)
    x = original * 0.95 + 0.1 * original.roll(1, dims=1)
    seen = observed(x[:3000], original[:3000])
    plain, aimed = (
        [part[0] for part in Gptq(damping=0.01).prepare(seen.moments[None], cross).round(weight[None])]
        for cross in (None, seen.cross[None])
    )
    unseen = x[3000:], original[3000:]
    assert error(weight, aimed, *unseen) < 0.7 * error(weight, plain, *unseen)


def test_a_share_of_the_aim_lies_between_none_and_all():
    weight, original = weight_of(), correlated(4000, 256)
    x = original * 0.95 + 0.1 * original.roll(1, dims=1)
    seen = observed(x, original)

    def moved(aim: float) -> torch.Tensor:
        codes, scale = Gptq(damping=0.01, aim=aim).prepare(seen.moments[None], seen.cross[None]).round(weight[None])
        return decode_int4(codes[0], scale[0])

    def output_of(decoded: torch.Tensor) -> float:
        return float(((x @ decoded.T - original @ weight.T) / x.norm(dim=1, keepdim=True)).square().sum())

    none, some, every = (output_of(moved(aim)) for aim in (0.0, 0.7, 1.0))
    assert every < some < none
    plain = Gptq(damping=0.01).prepare(seen.moments[None]).round(weight[None])
    assert torch.equal(moved(0.0), decode_int4(plain[0][0], plain[1][0]))


def test_triangular_matrices_are_inverted_by_halves():
    lower = torch.randn(2, 1100, 1100, generator=torch.Generator().manual_seed(0)).tril() / 33
    lower.diagonal(dim1=1, dim2=2).copy_(torch.linspace(1.0, 3.0, 1100))
    inverse = lower.clone()
    _invert(inverse)
    torch.testing.assert_close(inverse @ lower, torch.eye(1100).expand_as(lower), rtol=0, atol=1e-4)
    assert torch.equal(inverse, inverse.tril())


def test_channels_that_never_move_are_rounded_to_nearest():
    weight, x = weight_of(), correlated(1000, 256)
    x[:, 5] = 0.0
    x[:, 128:] = 0.0
    codes, scale = (part[0] for part in Gptq().prepare(observed(x).moments[None]).round(weight[None]))
    nearest = (weight[:, 128:] / scale[:, 1:]).round().clamp(-7, 7)
    assert torch.equal(codes[:, 128:].float(), nearest)


def test_moments_that_are_not_finite_are_refused():
    moments = torch.eye(256)[None]
    moments[0, 3, 3] = torch.nan
    with pytest.raises(SingularError, match="not finite"):
        Gptq().prepare(moments)


def test_an_indefinite_matrix_gets_more_damping():
    moments = observed(correlated(1000, 256)).moments
    moments -= 0.06 * moments.diagonal().mean() * torch.eye(256)
    codes, _ = Gptq(damping=0.05).prepare(moments[None]).round(weight_of()[None])
    assert int(codes.abs().max()) == 7
