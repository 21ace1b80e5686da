"""Rounding for the output: what it promises, measured on the output."""

from __future__ import annotations

import pytest
import torch

from quantlab_calib.observers import InputObserver
from quantlab_calib.search import Feedback, candidates, search_scales
from quantlab_kernels.formats import E4M3, INT4
from quantlab_kernels.qtensor import TensorSpec, quantize

BLOCK = TensorSpec(E4M3, (128, 128), scale="power2")
ROW = TensorSpec(E4M3, (1, -1))
GROUPED = TensorSpec(INT4, (1, 128))


def correlated(tokens: int, channels: int, seed: int = 0) -> torch.Tensor:
    """Inputs whose channels move together and differ in size, as those of real layers do."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(channels // 4, channels, generator=generator)
    size = torch.exp(torch.randn(channels, generator=generator))
    return (torch.randn(tokens, channels // 4, generator=generator) @ mix + torch.randn(tokens, channels)) * size


def feedback_of(x: torch.Tensor) -> Feedback:
    observer = InputObserver()
    observer.update(x)
    return Feedback.of(observer.moments())


def output_error(weight, quantized, x) -> float:
    x = torch.nn.functional.normalize(x.double(), dim=1)
    return float(((quantized.dequantize(torch.float64) - weight) @ x.T).square().sum())


@pytest.mark.parametrize("spec", [BLOCK, ROW, GROUPED], ids=["block", "row", "int4"])
@pytest.mark.parametrize("shape", [(256, 256), (130, 200)], ids=str)
def test_output_error_falls_on_data_that_was_not_seen(spec, shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    x = correlated(4096, 256)[:, : shape[1]]
    ours = feedback_of(x[:3000]).quantize(weight, spec)
    plain = quantize(weight, spec)
    assert output_error(weight, ours, x[3000:]) < 0.8 * output_error(weight, plain, x[3000:])
    assert ours.codes.dtype == spec.format.dtype
    assert ours.codes.shape == weight.shape
    assert ours.codes.is_contiguous()
    assert ours.scale.shape == spec.scale_shape(shape)


def test_power_of_two_scales_stay_powers_of_two():
    ours = feedback_of(correlated(512, 256)).quantize(torch.randn(256, 256), BLOCK)
    assert torch.equal(torch.frexp(ours.scale).mantissa, torch.full_like(ours.scale, 0.5))


def test_bands_of_rows_give_what_the_whole_weight_gives():
    weight, feedback = torch.randn(384, 256), feedback_of(correlated(512, 256))
    whole = feedback.quantize(weight, BLOCK)
    bands = [feedback.quantize(weight[a:b], BLOCK) for a, b in ((0, 128), (128, 384))]
    assert torch.equal(torch.cat([band.scale for band in bands]), whole.scale)
    same = torch.cat([band.codes.float() for band in bands]) == whole.codes.float()
    assert same.float().mean() > 0.999  # sums of another order may round the other way at a tie


def test_uncorrelated_inputs_are_rounded_plainly():
    feedback = Feedback.of(torch.eye(128).expand(2, 128, 128).double())
    weight = torch.randn(128, 256)
    assert torch.equal(feedback.pass_on, torch.eye(128).expand(2, 128, 128))
    scale = quantize(weight, BLOCK).scale
    assert torch.equal(feedback.round(weight, BLOCK, scale).float(), quantize(weight, BLOCK, scale).codes.float())


def test_inputs_that_never_moved_change_nothing():
    feedback = Feedback.of(torch.zeros(1, 128, 128, dtype=torch.float64))
    weight = torch.randn(128, 128)
    ours, plain = feedback.quantize(weight, BLOCK), quantize(weight, BLOCK)
    assert torch.equal(ours.codes.float(), plain.codes.float())
    assert torch.equal(ours.scale, plain.scale)


def test_fewer_tokens_than_channels_are_still_solvable():
    feedback = feedback_of(correlated(3, 256))
    assert feedback.pass_on.isfinite().all()
    assert feedback.quantize(torch.randn(128, 256), BLOCK).dequantize().isfinite().all()


@pytest.mark.parametrize("spec", [BLOCK, ROW, GROUPED], ids=["block", "row", "int4"])
def test_the_search_takes_the_best_candidate_of_each_block(spec):
    weight = torch.randn(200, 256, generator=torch.Generator().manual_seed(3)) ** 3
    energy = torch.rand(256) + 0.1
    found = search_scales(weight, spec, energy)

    def error(scale):
        return float(((quantize(weight, spec, scale).dequantize() - weight).square() * energy).sum())

    base = quantize(weight, spec).scale
    errors = [error(base * factor) for factor in candidates(spec)]
    assert error(found) <= min(errors) * (1 + 1e-6)
    assert 1.0 in candidates(spec)
