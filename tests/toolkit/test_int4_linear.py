"""INT4 layers: what they compute, what they keep, what becomes of words when they move."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from quantlab.fusion import fuse
from quantlab.int4_linear import Int4Fp8Linear, Int4Linear
from quantlab_calib.rounding import decode_int4, round_int4
from quantlab_kernels import quantize_fp8_group, quantize_fp8_token
from quantlab_kernels.common.int4 import GROUPED_TOKENS
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
    if len(x) > GROUPED_TOKENS:
        codes, scale = quantize_fp8_token(x)
        return codes.float() * scale
    codes, scale = quantize_fp8_group(x)
    return codes.float() * expand_blocks(scale, (1, 128), codes.shape)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu(sm=80))])
@pytest.mark.parametrize("low", [-7, -8])
@pytest.mark.parametrize("kind", KINDS)
def test_the_product(kind, low, device):
    layer, weight = filled(kind, low=low)
    layer = layer.to(device)
    for tokens in (10, GROUPED_TOKENS, GROUPED_TOKENS + 2):
        x = (torch.randn(tokens, 256) * torch.logspace(-1, 1, 256)).to(device, torch.bfloat16)
        with torch.no_grad():
            out = layer(x.view(2, -1, 256))
        expected = seen(layer, x).float() @ weight.to(device).T + layer.bias
        assert out.shape == (2, tokens // 2, 192)
        assert out.dtype == torch.bfloat16
        assert (out.view(tokens, 192).float() - expected).norm() < 5e-3 * expected.norm()
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


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_proj, self.up_proj = (filled(Int4Fp8Linear, 384, seed=n, bias=False)[0] for n in (1, 2))
        self.down_proj, self.act_fn = filled(Int4Fp8Linear, 256, 384, False)[0], nn.SiLU()

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Feed(nn.Module):
    """A norm, and the gated MLP that it feeds. One channel is large, so that groups and whole tokens differ."""

    def __init__(self):
        super().__init__()
        self.norm, self.mlp = nn.RMSNorm(256, eps=1e-6), Gated()
        self.norm.weight.data[3] = 100

    def forward(self, x):
        return self.mlp(self.norm(x))


def replayed(module, x):
    """What a CUDA graph of the module gives for x; on a CPU what the module gives."""
    if not x.is_cuda:
        return module(x)
    graph, held = torch.cuda.CUDAGraph(), torch.zeros_like(x)
    with torch.cuda.graph(graph):
        out = module(held)
    held.copy_(x)
    graph.replay()
    return out


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu(sm=80))])
def test_all_ways_to_run_see_few_tokens_in_groups_and_many_as_wholes(device):
    """Alone or fused, eager, compiled for one number of tokens or any, in a graph."""
    torch.manual_seed(0)
    plain = Feed().to(device).eval()
    mlp, fused = plain.mlp, copy.deepcopy(plain)
    assert fuse(fused).norms == 1
    compiled = [
        torch.compile(copy.deepcopy(fused), fullgraph=True, dynamic=dynamic, backend="aot_eager")
        for dynamic in (False, True)
    ]
    with torch.no_grad():
        for tokens in (2, GROUPED_TOKENS, GROUPED_TOKENS + 1, 100):
            x = torch.randn(tokens, 256, device=device)
            gate, up = (seen(layer, plain.norm(x)) @ layer.dequantize().T for layer in (mlp.gate_proj, mlp.up_proj))
            exact = seen(mlp.down_proj, nn.functional.silu(gate) * up) @ mlp.down_proj.dequantize().T
            for run in (plain, fused, fused, *compiled, lambda x: replayed(fused, x)):
                # a sum in another order moves single codes (0.0052 on a GPU); scales of the other kind are 0.025
                assert (run(x) - exact).norm() < 1e-2 * exact.norm()


def test_a_weight_joined_of_several_tensors_has_the_shape_of_each():
    """As transformers joins them while loading: gate and up of MiniMax-M3."""
    assert Int4Linear(256, 128, parts=2).weight_shape.tolist() == [64, 256, 64, 256]


def test_the_gradient_is_that_of_the_weight():
    layer, weight = filled(Int4Fp8Linear)
    x = torch.randn(3, 256, requires_grad=True)
    layer(x).square().sum().backward()
    expected = 2 * layer(x.detach()) @ weight
    assert torch.allclose(x.grad, expected, rtol=1e-4, atol=1e-3)
    assert layer.bias.grad is not None
