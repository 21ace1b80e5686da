"""INT4 layers: what they compute, what they keep, what becomes of words when they move."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from quantlab.fusion import fuse
from quantlab.int4_linear import Int4Fp8Linear, Int4Linear
from quantlab_calib.rounding import decode_int4, round_int4
from quantlab_kernels import quantize_fp8_group
from quantlab_kernels.packing import pack_int4
from quantlab_kernels.qtensor import expand_blocks

KINDS = [Int4Linear, Int4Fp8Linear]


def filled(kind, n=192, k=256, bias=True, seed=0, low=-7):
    generator = torch.Generator().manual_seed(seed)
    layer = kind(k, n, bias, dtype=torch.float32)
    codes, scale = round_int4(torch.randn(n, k, generator=generator))
    codes[0, 0] = low
    layer.weight_packed.data.copy_(pack_int4(codes))
    layer.weight_scale.data.copy_(scale)
    if bias:
        layer.bias.data.copy_(torch.randn(n, generator=generator))
    layer.finish_loading()
    return layer, decode_int4(codes, layer.weight_scale.float())


def seen(layer, x):
    """x as the layer sees it."""
    if layer.activation_bits == 16:
        return x
    codes, scale = quantize_fp8_group(x)
    return codes.float() * expand_blocks(scale, (1, 128), codes.shape)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu(sm=80))])
@pytest.mark.parametrize("low", [-7, -8])
@pytest.mark.parametrize("kind", KINDS)
def test_the_product(kind, low, device):
    layer, weight = filled(kind, low=low)
    layer = layer.to(device)
    x = torch.randn(5, 2, 256).to(device, torch.bfloat16)
    with torch.no_grad():
        out = layer(x)
    expected = seen(layer, x.reshape(10, 256)).float() @ weight.to(device).T + layer.bias
    assert out.shape == (5, 2, 192)
    assert out.dtype == torch.bfloat16
    assert torch.allclose(out.reshape(10, 192).float(), expected, rtol=1e-2, atol=5e-2)
    assert torch.equal(layer.weight.float(), weight.to(device).bfloat16().float())


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu(sm=80))])
@pytest.mark.parametrize("kind", KINDS)
def test_the_state_dict_is_what_is_on_disk(kind, device):
    layer, _ = filled(kind)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    assert list(before) == ["weight_packed", "weight_scale", "bias", "weight_shape"]
    moved = copy.deepcopy(layer).to(device).half()
    after = moved.state_dict()
    assert after["bias"].dtype == torch.float16
    for name in ("weight_packed", "weight_scale", "weight_shape"):
        assert after[name].dtype == before[name].dtype
        assert torch.equal(after[name].cpu(), before[name])
    other, weight = filled(kind, seed=1)
    moved.load_state_dict(other.state_dict())
    assert torch.equal(moved.dequantize().cpu(), weight)
    back = moved.cpu()
    assert torch.equal(back.weight_packed, other.state_dict()["weight_packed"])


class Attention(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (filled(kind, n, seed=n)[0] for n in (256, 128, 64))

    def forward(self, x):
        return torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], -1)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu(sm=80))])
@pytest.mark.parametrize("kind", KINDS)
def test_joined_layers_follow_what_is_loaded_later(kind, device):
    module, other = Attention(kind).to(device), Attention(kind).to(device)
    for layer in other.children():
        layer.bias.data += 1
        layer.weight_packed.data = layer.weight_packed.data.clone()
        layer.weight_scale.data *= 2
        layer.finish_loading()
    x = torch.randn(3, 256, device=device).bfloat16()
    with torch.no_grad():
        alone, changed = module(x), other(x)
        assert fuse(module).joined == 1
        assert torch.allclose(module(x), alone, rtol=1e-2, atol=1e-2)
        module.load_state_dict(other.state_dict())
        assert torch.allclose(module(x), changed, rtol=1e-2, atol=1e-2)


def test_the_gradient_is_that_of_the_weight():
    layer, weight = filled(Int4Fp8Linear)
    x = torch.randn(3, 256, requires_grad=True)
    layer(x).square().sum().backward()
    expected = 2 * layer(x.detach()) @ weight
    assert torch.allclose(x.grad, expected, rtol=1e-4, atol=1e-3)
    assert layer.bias.grad is not None
