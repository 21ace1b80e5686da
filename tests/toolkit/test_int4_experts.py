"""Experts with INT4 weights against a loop over tokens; on a GPU in the layouts of its kernels, in a graph."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from quantlab import hf
from quantlab.int4_experts import Int4Experts, Int4Fp8Experts
from quantlab.scheme import SCHEMES
from quantlab_kernels.common.int4 import scales_by_group
from quantlab_kernels.packing import pack_int4
from quantlab_kernels.qtensor import quantize

KINDS = pytest.mark.parametrize("kind", [Int4Experts, Int4Fp8Experts])
GROUPS, WHOLES = SCHEMES["fp8-block"].input, SCHEMES["int4-fp8"].input
HIDDEN, INNER, EXPERTS = 256, 128, 4


def _default_apply_gate(self, gate_up: Tensor) -> Tensor:
    """As transformers' own; its name is what `Experts.swiglu` knows it by."""
    gate, up = gate_up.chunk(2, -1)
    return self.act_fn(gate) * up


class Dense(nn.Module):
    """Experts as transformers holds them, of weights that INT4 in groups of 128 holds exactly."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.parts = {}
        for name, rows, columns in (("gate_up_proj", 2 * INNER, HIDDEN), ("down_proj", HIDDEN, INNER)):
            codes = torch.randint(-7, 8, (EXPERTS, rows, columns), dtype=torch.int8, generator=generator)
            scale = (torch.rand(EXPERTS, rows, columns // 128, generator=generator) / 64 + 0.01).to(torch.bfloat16)
            self.parts[name] = codes, scale
            self.register_parameter(name, nn.Parameter(codes * scale.float().repeat_interleave(128, 2)))
        self.act_fn = nn.SiLU()


def plain_gate(self, gate_up: Tensor) -> Tensor:
    return _default_apply_gate(self, gate_up)


@pytest.fixture(params=[_default_apply_gate, plain_gate], ids=["fused gate", "own gate"])
def dense(request, monkeypatch):
    monkeypatch.setattr(Dense, "_apply_gate", request.param, raising=False)
    torch.manual_seed(0)
    return Dense()


def replaced(kind: type[Int4Experts], dense: Dense) -> Int4Experts:
    module = kind(dense, scale_name="weight_scale")
    for name, (codes, scale) in dense.parts.items():
        getattr(module, name + "_packed").data = pack_int4(codes.flatten(0, 1)).unflatten(0, (EXPERTS, -1))
        getattr(module, name + "_scale").data = scale
    module.finish_loading()
    return module


def expected(kind: type[Int4Experts], dense: Dense, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    scales = GROUPS if scales_by_group(index.numel() // EXPERTS) else WHOLES

    def seen(x: Tensor) -> Tensor:
        return quantize(x, scales).dequantize() if kind is Int4Fp8Experts else x

    out = torch.zeros_like(hidden)
    for token in range(hidden.shape[0]):
        for expert, weight in zip(index[token].tolist(), weights[token], strict=True):
            if expert < EXPERTS:
                inner = dense._apply_gate(seen(hidden[token : token + 1]) @ dense.gate_up_proj[expert].T)
                out[token] += weight * (seen(inner) @ dense.down_proj[expert].T)[0]
    return out


def routed(tokens: int, experts: int = EXPERTS) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, their experts (from 0 to `experts` - 1) and the weights of those."""
    generator = torch.Generator().manual_seed(1)
    weights, index = torch.rand(tokens, experts, generator=generator).topk(2)
    return torch.randn(tokens, HIDDEN, generator=generator), index, weights


def relative(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


@KINDS
@pytest.mark.parametrize("tokens", [1, 7, 140])  # of 140 an expert has 70 on average
def test_every_token_meets_its_experts(kind, dense, tokens):
    given = routed(tokens, EXPERTS + 1)  # the last one is another rank's
    with torch.no_grad():
        out = replaced(kind, dense)(*given)
        assert relative(out, expected(kind, dense, *given)) < 5e-3


@KINDS
def test_no_tokens_and_no_expert_of_ours(kind, dense):
    module = replaced(kind, dense)
    hidden, index, weights = routed(3)
    assert module(hidden[:0], index[:0], weights[:0]).shape == (0, HIDDEN)
    assert not module(hidden, torch.full_like(index, EXPERTS), weights).any()


@KINDS
def test_a_gradient_is_refused(kind, dense):
    hidden, index, weights = routed(2)
    out = replaced(kind, dense)(hidden.requires_grad_(), index, weights)
    with pytest.raises(NotImplementedError, match="quantized experts have no gradient; load the checkpoint with"):
        out.sum().backward()


@KINDS
def test_compiles_in_one_graph(kind, dense):
    module, given = replaced(kind, dense), routed(5)
    with torch.no_grad():
        compiled = torch.compile(module, backend="aot_eager", fullgraph=True)(*given)
        torch.testing.assert_close(compiled, module(*given))


@KINDS
def test_casting_keeps_words_and_scales(kind, dense):
    state = replaced(kind, dense).half().state_dict()
    for name, (codes, scale) in dense.parts.items():
        assert torch.equal(state[name + "_packed"].flatten(0, 1), pack_int4(codes.flatten(0, 1)))
        assert torch.equal(state[name + "_scale"], scale)


@pytest.mark.gpu(sm=80)
@KINDS
@pytest.mark.parametrize("tokens", [1, 7, 256])
def test_experts_on_a_gpu(kind, dense, tokens):
    hidden, index, weights = (x.cuda() for x in routed(tokens, EXPERTS + 1))
    hidden = hidden.to(torch.bfloat16)
    module = replaced(kind, dense).cuda()
    state = module.state_dict()
    for name, (codes, scale) in dense.parts.items():
        assert torch.equal(state[name + "_packed"].cpu().flatten(0, 1), pack_int4(codes.flatten(0, 1)))
        assert state[name + "_scale"].is_contiguous()
        assert torch.equal(state[name + "_scale"].cpu(), scale)
    with torch.inference_mode():
        reference = expected(kind, dense.cuda(), hidden.float(), index, weights)
        assert relative(module(hidden, index, weights).float(), reference) < 0.03  # 16-bit results in between
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = module(hidden, index, weights)
        index.copy_((index + 1) % (EXPERTS + 1))
        graph.replay()
        assert relative(out.float(), expected(kind, dense, hidden.float(), index, weights)) < 0.03
        there = module.cpu()
        assert relative(there(hidden.cpu(), index.cpu(), weights.cpu()).float().cuda(), out.float()) < 0.03


@KINDS
def test_warm_up_runs_every_shape_of_experts_once(kind, dense, monkeypatch):
    model = nn.ModuleList([replaced(kind, dense) for _ in range(2)])
    model.dtype, model.config = torch.float32, PretrainedConfig(num_experts_per_tok=2)
    seen = []
    monkeypatch.setattr(kind, "forward", lambda self, hidden, index, weights: seen.append((len(hidden), index.shape)))
    hf.warm_up(model, tokens=(1, 16))
    assert seen == [(1, (1, 2)), (16, (16, 2))]


@pytest.mark.parametrize("scheme", ["int4", "int4-fp8"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu(sm=80))])
def test_a_mixture_loads_and_runs(scheme, device, quantized):
    model = hf.load(quantized("qwen3_moe", scheme).folder, device_map=device, warmup=True)
    assert any(isinstance(m, Int4Experts) for m in model.modules())
    with torch.no_grad():
        assert torch.isfinite(model(torch.arange(12, device=device)[None]).logits).all()
