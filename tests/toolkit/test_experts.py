from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from quantlab.experts import Fp8BlockExperts, Fp8Experts, Fp8RowExperts, unsupported
from quantlab.scheme import SCHEMES
from quantlab_kernels.qtensor import quantize

SCHEME = {Fp8BlockExperts: SCHEMES["fp8-block"], Fp8RowExperts: SCHEMES["fp8-dynamic"]}
NAMES = {Fp8BlockExperts: "weight_scale_inv", Fp8RowExperts: "weight_scale"}
BOTH = pytest.mark.parametrize("kind", SCHEME, ids=lambda kind: kind.__name__)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


class Dense(nn.Module):
    """Experts as transformers holds them."""

    def __init__(self, experts: int = 4, hidden: int = 128, inner: int = 128) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.gate_up_proj = nn.Parameter(torch.randn(experts, 2 * inner, hidden, generator=generator) / 8)
        self.down_proj = nn.Parameter(torch.randn(experts, hidden, inner, generator=generator) / 8)
        self.act_fn = nn.SiLU()
        self.limit = 1.5

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, -1)
        return self.act_fn(gate) * up.clamp(-self.limit, self.limit)


def replaced(kind: type[Fp8Experts], dense: Dense) -> Fp8Experts:
    """Quantize `dense` as a checkpoint does: each expert's gate, up and down on its own. `dense` becomes the result
    dequantized."""
    module = kind(dense, scale_name=NAMES[kind])
    spec = SCHEME[kind].weight
    for e in range(module.num_experts):
        gate, up = (quantize(half, spec) for half in dense.gate_up_proj.data[e].chunk(2))
        down = quantize(dense.down_proj.data[e], spec)
        module.gate_up_proj.data[e] = torch.cat([gate.codes, up.codes])
        module.down_proj.data[e] = down.codes
        getattr(module, "gate_up_proj" + module.suffix).data[e] = torch.cat([gate.scale, up.scale])
        getattr(module, "down_proj" + module.suffix).data[e] = down.scale
        dense.gate_up_proj.data[e] = torch.cat([gate.dequantize(), up.dequantize()])
        dense.down_proj.data[e] = down.dequantize()
    module.finish_loading()
    return module


def expected(kind: type[Fp8Experts], dense: Dense, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    spec, out = SCHEME[kind].input, torch.zeros_like(hidden)
    for token in range(hidden.shape[0]):
        for expert, weight in zip(index[token].tolist(), weights[token], strict=True):
            if expert < len(dense.down_proj):
                inner = dense._apply_gate(
                    quantize(hidden[token : token + 1], spec).dequantize() @ dense.gate_up_proj[expert].T
                )
                out[token] += weight * (quantize(inner, spec).dequantize() @ dense.down_proj[expert].T)[0]
    return out


class Ungated(nn.Module):
    """Experts that activate what they do not multiply, as transformers holds those of Nemotron-H."""

    has_gate = False

    def __init__(self, experts: int = 4, hidden: int = 128, inner: int = 192) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.up_proj = nn.Parameter(torch.randn(experts, inner, hidden, generator=generator) / 8)
        self.down_proj = nn.Parameter(torch.randn(experts, hidden, inner, generator=generator) / 8)
        self.act_fn = nn.ReLU()

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        raise AssertionError("they have no gate")


@BOTH
def test_experts_without_a_gate(kind):
    dense, spec = Ungated(), SCHEME[kind]
    assert unsupported(dense) is None
    module = kind(dense, scale_name=NAMES[kind])
    assert [*module.state_dict()] == ["up_proj", "up_proj" + module.suffix, "down_proj", "down_proj" + module.suffix]
    for name in ("up_proj", "down_proj"):
        for e, weight in enumerate(getattr(dense, name).data):
            stored = quantize(weight, spec.weight)
            getattr(module, name).data[e], weight[:] = stored.codes, stored.dequantize()
            getattr(module, name + module.suffix).data[e] = stored.scale
    module.finish_loading()
    hidden, (index, weights) = torch.randn(7, 128), routing(7, 4)
    with torch.no_grad():
        found, wanted = module(hidden, index, weights), torch.zeros_like(hidden)
        for token, choices in enumerate(index.tolist()):
            for expert, weight in zip(choices, weights[token], strict=True):
                x = quantize(hidden[token : token + 1], spec.input).dequantize()
                inner = quantize((x @ dense.up_proj[expert].T).relu(), spec.input).dequantize()
                wanted[token] += weight * (inner @ dense.down_proj[expert].T)[0]
    assert ((found - wanted).norm() / wanted.norm()).item() < 5e-3


def routing(tokens: int, experts: int, choices: int = 2) -> tuple[Tensor, Tensor]:
    scores = torch.rand(tokens, experts, generator=torch.Generator().manual_seed(1))
    weights, index = scores.topk(choices)
    return index, weights


@BOTH
@pytest.mark.parametrize("inner", [128, 192])
@pytest.mark.parametrize("tokens", [1, 7])
def test_every_token_meets_its_experts(kind, inner: int, tokens: int):
    """192 is not a multiple of 128: gate and up then have blocks of their own."""
    dense = Dense(inner=inner)
    module = replaced(kind, dense)
    hidden = torch.randn(tokens, 128, generator=torch.Generator().manual_seed(2))
    index, weights = routing(tokens, 4)
    with torch.no_grad():
        out = module(hidden, index, weights)
        reference = expected(kind, dense, hidden, index, weights)
    # rounding the inner activations amplifies another order of the sums before them to one code, 2^-4, now and then
    assert ((out - reference).norm() / reference.norm()).item() < 5e-3
    assert out.dtype == hidden.dtype


@BOTH
def test_an_index_past_the_last_expert_adds_nothing(kind):
    module = replaced(kind, Dense())
    hidden = torch.randn(3, 128)
    index, weights = routing(3, 4)
    with torch.no_grad():
        alone = module(hidden, index[:, :1], weights[:, :1])
        index[:, 1] = 4
        assert torch.equal(module(hidden, index, weights), alone)


@BOTH
def test_no_tokens(kind):
    index, weights = routing(0, 4)
    assert replaced(kind, Dense())(torch.empty(0, 128), index, weights).shape == (0, 128)


@BOTH
def test_a_gradient_is_refused(kind):
    index, weights = routing(2, 4)
    out = replaced(kind, Dense())(torch.randn(2, 128, requires_grad=True), index, weights)
    with pytest.raises(NotImplementedError, match="no gradient; load the checkpoint with dequantize=True"):
        out.sum().backward()


@BOTH
def test_compiles_in_one_graph(kind):
    module = replaced(kind, Dense())
    hidden, (index, weights) = torch.randn(5, 128), routing(5, 4)
    with torch.no_grad():
        compiled = torch.compile(module, backend="aot_eager", fullgraph=True)(hidden, index, weights)
        torch.testing.assert_close(compiled, module(hidden, index, weights))


@BOTH
def test_casting_keeps_codes_and_scales(kind):
    module = replaced(kind, Dense()).half()
    dtypes = {name: tensor.dtype for name, tensor in module.state_dict().items()}
    assert dtypes == {
        "gate_up_proj": torch.float8_e4m3fn, "gate_up_proj" + module.suffix: torch.float32,
        "down_proj": torch.float8_e4m3fn, "down_proj" + module.suffix: torch.float32,
    }  # fmt: skip


def test_what_cannot_be_replaced_says_why():
    assert unsupported(Dense()) is None
    assert unsupported(nn.Linear(2, 2)) == "its experts have no fused gate and up projection"
    transposed = Dense(hidden=128, inner=256)
    transposed.gate_up_proj = nn.Parameter(transposed.gate_up_proj.data.transpose(1, 2))
    assert unsupported(transposed) == "its experts are stored transposed"
    interleaved = Dense()
    interleaved.is_concatenated = False
    assert unsupported(interleaved) == "its experts interleave gate and up"
    biased = Dense()
    biased.down_proj_bias = nn.Parameter(torch.zeros(4, 128))
    assert unsupported(biased) == "its experts have biases or norms"
    idle = Dense()
    idle.gate_up_proj = nn.Parameter(torch.cat([idle.gate_up_proj.data] * 2))
    assert unsupported(idle) == "some of its experts compute nothing"
    own = type("Own", (nn.Module,), {})()
    own.gate_up_proj, own.down_proj = Dense().gate_up_proj, Dense().down_proj
    assert unsupported(own) == "its experts compute in a way of their own"


def test_scales_of_other_dtypes_stay_as_they_are_stored():
    dense = Dense()
    module = Fp8BlockExperts(dense, scale_name="weight_scale_inv", scale_dtype=torch.bfloat16)
    module.down_proj_scale_inv.data.fill_(0.5)
    module.finish_loading()
    assert module.scale("down_proj").dtype == torch.float32
    assert module.state_dict()["down_proj_scale_inv"].dtype == torch.bfloat16
    assert module.state_dict().keys() == {
        "gate_up_proj", "gate_up_proj_scale_inv", "down_proj", "down_proj_scale_inv",
    }  # fmt: skip
