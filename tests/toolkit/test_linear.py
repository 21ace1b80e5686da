from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from quantlab.linear import Fp8BlockLinear, Fp8Linear, Fp8RowLinear
from quantlab.scheme import SCHEMES
from quantlab_kernels.qtensor import quantize

SCHEME = {Fp8BlockLinear: SCHEMES["fp8-block"], Fp8RowLinear: SCHEMES["fp8-dynamic"]}
BOTH = pytest.mark.parametrize("kind", SCHEME, ids=lambda kind: kind.__name__)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def filled(kind: type[Fp8Linear], k: int, n: int, *, bias: bool = False, seed: int = 0, **options) -> Fp8Linear:
    """A layer with random weights."""
    generator = torch.Generator().manual_seed(seed)
    layer = kind(k, n, bias, **options)
    stored = quantize(torch.randn(n, k, generator=generator), SCHEME[kind].weight)
    layer.weight.data.copy_(stored.codes)
    scale = getattr(layer, layer.scale_name)
    scale.data.copy_(stored.scale)
    if bias:
        layer.bias.data.copy_(torch.randn(n, generator=generator))
    layer.finish_loading()
    return layer


def expected(layer: Fp8Linear, x: Tensor) -> Tensor:
    """The exact product of what is stored and of the rounded input, float64."""
    out = quantize(x, SCHEME[type(layer)].input).dequantize(torch.float64) @ layer.dequantize(torch.float64).T
    return out if layer.bias is None else out + layer.bias.double()


@BOTH
@settings(max_examples=20)
@given(
    m=st.integers(0, 5), n=st.integers(1, 260), k=st.integers(1, 300), bias=st.booleans(), seed=st.integers(0, 9),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)  # fmt: skip
def test_product_of_rounded_input_and_stored_weight(kind, m, n, k, bias, seed, dtype):
    layer = filled(kind, k, n, bias=bias, seed=seed, dtype=dtype)
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(seed)).to(dtype)
    out = layer(x)
    assert out.dtype == dtype
    assert out.shape == (m, n)
    exact = expected(layer, x)
    size = quantize(x, SCHEME[kind].input).dequantize(torch.float64).abs() @ layer.dequantize(torch.float64).abs().T
    size = size if layer.bias is None else size + layer.bias.double().abs()
    assert ((out.double() - exact).abs() <= torch.finfo(dtype).eps * exact.abs() + k * 2**-23 * size + 1e-7).all()


@BOTH
def test_leading_dimensions_are_tokens(kind):
    layer = filled(kind, 256, 128)
    x = torch.randn(2, 3, 256)
    assert torch.equal(layer(x), layer(x.reshape(6, 256)).reshape(2, 3, 128))
    # the rows of a product may be summed in another order where they lie elsewhere
    torch.testing.assert_close(layer(x.transpose(0, 1)), layer(x).transpose(0, 1), rtol=1e-4, atol=1e-4)


@BOTH
def test_input_gradient_is_that_of_the_dequantized_weight(kind):
    layer = filled(kind, 256, 128, bias=True)
    x = torch.randn(3, 256, requires_grad=True)
    seen = torch.randn(3, 128)
    (layer(x) * seen).sum().backward()
    torch.testing.assert_close(x.grad, seen @ layer.dequantize())
    torch.testing.assert_close(layer.bias.grad, seen.sum(0))
    assert layer.weight.grad is None


@BOTH
def test_forward_is_the_same_with_and_without_gradients(kind):
    layer = filled(kind, 256, 128)
    x = torch.randn(3, 256)
    assert torch.equal(layer(x), layer(x.clone().requires_grad_()))


@BOTH
def test_casting_a_module_keeps_codes_and_scales(kind):
    layer = nn.Sequential(filled(kind, 256, 128, bias=True))
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    layer.half()
    for name, tensor in layer.state_dict().items():
        if name.endswith("bias"):
            assert tensor.dtype == torch.float16
        else:
            assert tensor.dtype == before[name].dtype
            assert torch.equal(tensor.float(), before[name].float())
    assert layer(torch.randn(2, 256, dtype=torch.float16)).isfinite().all()
    assert {t.device.type for t in layer.to("meta").state_dict().values()} == {"meta"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e8m0fnu])
def test_scales_of_other_dtypes_stay_as_they_are_stored(dtype):
    """Power-of-two scales are exact in both."""
    layer, reference = filled(Fp8BlockLinear, 256, 128, scale_dtype=dtype), filled(Fp8BlockLinear, 256, 128)
    x = torch.randn(4, 256)
    assert torch.equal(layer(x), reference(x))
    assert layer.state_dict()["weight_scale_inv"].dtype == dtype
    assert layer.state_dict().keys() == reference.state_dict().keys()


def test_static_activation_scales_are_used_and_saturate():
    layer = filled(Fp8BlockLinear, 256, 128)
    x = torch.randn(4, 256)
    dynamic = layer(x)
    layer.activation_scale = torch.tensor([1.0, 0.01])
    codes = torch.cat([x[:, :128], (x[:, 128:] / 0.01).clamp(-448, 448)], 1).to(torch.float8_e4m3fn).double()
    exact = (codes * torch.tensor([1.0, 0.01], dtype=torch.float64).repeat_interleave(128)) @ layer.dequantize(
        torch.float64
    ).T
    torch.testing.assert_close(layer(x).double(), exact, rtol=1e-4, atol=1e-3)
    assert not torch.equal(layer(x), dynamic)
    assert "activation_scale" not in layer.state_dict()


@BOTH
def test_is_a_linear_layer_that_never_held_full_precision(kind):
    with torch.device("meta"):
        layer = kind(256, 128)
    assert isinstance(layer, nn.Linear)
    assert layer.weight.dtype == torch.float8_e4m3fn
    assert not layer.weight.requires_grad
    assert repr(layer) == f"{kind.__name__}(in_features=256, out_features=128, bias=True)"


@BOTH
def test_compiles_in_one_graph(kind):
    layer = filled(kind, 256, 128, bias=True)
    x = torch.randn(4, 256)
    with torch.no_grad():
        assert torch.equal(torch.compile(layer, backend="aot_eager", fullgraph=True)(x), layer(x))


@BOTH
@pytest.mark.gpu(sm=80)
def test_gpu_agrees_with_cpu(kind):
    layer = filled(kind, 512, 384, bias=True, dtype=torch.bfloat16)
    x = torch.randn(33, 512, dtype=torch.bfloat16)
    on_cpu = layer(x).float()
    on_gpu = layer.to("cuda")(x.to("cuda")).float().cpu()
    assert (on_cpu - on_gpu).abs().max() <= 2**-7 * on_cpu.abs().max()
