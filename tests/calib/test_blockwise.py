"""Whole blocks quantized one after the other: outputs, streams, what happens to layers without data."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from quantlab_calib.blockwise import Blockwise, Steps
from quantlab_calib.capture import LinearCalls, linear_weights
from quantlab_calib.gptq import Gptq
from quantlab_calib.rounding import decode_int4, round_int4
from quantlab_calib.tune import Tune
from quantlab_kernels.formats import E4M3
from quantlab_kernels.qtensor import TensorSpec

CPU = torch.device("cpu")
FP8 = TensorSpec(E4M3, (1, -1), dynamic=True)


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = (nn.Linear(128, 256, bias=False) for _ in range(2))
        self.down = nn.Linear(256, 128)

    def forward(self, x):
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


class Experts(nn.Module):
    """Four fused experts; the last is never chosen, the third by few tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.randn(4, 256, 128) / 11)
        self.down = nn.Parameter(torch.randn(4, 128, 128) / 11)

    def forward(self, x):
        flat, out = x.reshape(-1, 128), torch.zeros_like(x).reshape(-1, 128)
        choice = torch.arange(len(flat)) % 2
        choice[::1000] = 2
        for e in range(3):
            rows = (choice == e).nonzero()[:, 0]
            gate, up = nn.functional.linear(flat[rows], self.gate_up[e]).chunk(2, dim=-1)
            out[rows] = nn.functional.linear(nn.functional.silu(gate) * up, self.down[e])
        return out.reshape(x.shape)


class Layer(nn.Module):
    def __init__(self, experts: bool) -> None:
        super().__init__()
        self.norm, self.mlp = nn.RMSNorm(128), Experts() if experts else Mlp()

    def forward(self, hidden_states):
        return hidden_states + self.mlp(self.norm(hidden_states))


class Model(nn.Module):
    def __init__(self, experts: bool = False, blocks: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, 128)
        self.layers = nn.ModuleList(Layer(experts) for _ in range(blocks))
        self.config = SimpleNamespace(use_cache=True)

    def forward(self, input_ids, use_cache=False):
        hidden = self.embed(input_ids)
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden


class Loaded:
    def load(self, path: str, recurse: bool = True) -> None: ...
    def release(self, path: str) -> None: ...


@pytest.fixture
def tokens():
    return torch.randint(0, 64, (16, 64), generator=torch.Generator().manual_seed(3))


def model_of(**options) -> Model:
    torch.manual_seed(0)
    return Model(**options).requires_grad_(False)


def run(model, tokens, steps, **options):
    return list(Blockwise(model, tokens, Loaded(), "layers", lambda name: True, steps, device=CPU, **options).run())


def output_error(model, rounded, tokens) -> float:
    weights = linear_weights(model.layers, "layers")

    def product(name, x, weight, bias):
        return nn.functional.linear(x, decode_int4(*rounded[name]), bias)

    wanted = model(tokens)
    with LinearCalls(weights, product):
        return float((model(tokens) - wanted).square().sum())


def rounded_of(blocks):
    return {name: block.codes(name, CPU) for block in blocks for name in block.rounded}


def test_each_stage_lowers_the_error_of_the_models_output(tokens):
    model = model_of()
    plain = {name: round_int4(w) for name, w in linear_weights(model.layers, "layers").items()}
    ladder = [
        Steps(None, Gptq(), original=False),
        Steps(None, Gptq(), original=True),
        Steps(None, None, tune=Tune(steps=24, rows=4, reach=0.5)),
    ]
    errors = [output_error(model, plain, tokens)]
    errors += [output_error(model, rounded_of(run(model, tokens, steps)), tokens) for steps in ladder]
    assert errors[1] < 0.75 * errors[0]
    assert errors[2] < errors[1]
    assert errors[3] < 0.9 * errors[0]


def test_what_is_done_is_not_rounded_again_and_gives_the_same_rest(tokens):
    model, steps = model_of(), Steps(FP8, Gptq())
    whole = run(model, tokens, steps)
    made = {block.path: block for block in whole[:1]}
    again = run(model, tokens, steps, done=made.get)
    assert again[:1] == whole[:1]
    for name, (words, scale) in whole[1].rounded.items():
        assert torch.equal(again[1].rounded[name][0], words)
        assert torch.equal(again[1].rounded[name][1], scale)


def test_experts_share_what_enters_and_those_without_tokens_are_rounded_without(tokens):
    model = model_of(experts=True, blocks=1)
    (block,) = run(model, tokens, Steps(None, Gptq()))
    assert set(block.rounded) == set(linear_weights(model.layers, "layers"))
    assert block.tokens["layers.0.mlp.down[0]"] == 510
    assert block.tokens["layers.0.mlp.down[2]"] == 2
    assert block.tokens["layers.0.mlp.gate_up[2]"] == tokens.numel()
    assert any("down[2]: saw 2 tokens" in note for note in block.notes)
    assert any("2 layers saw no data" in note for note in block.notes)


def test_a_layer_with_damaged_inputs_is_named_and_rounded_without_data(tokens):
    model = model_of(blocks=1)
    model.layers[0].mlp.gate.weight.data[0, 0] = 1e30  # silu times up overflows in what enters `down`
    model.layers[0].mlp.up.weight.data[0, 0] = 1e30
    (block,) = run(model, tokens, Steps(None, Gptq(), original=False))
    assert any("layers.0.mlp.down.weight: its inputs are not finite" in note for note in block.notes)
    model.layers[0].norm.weight.data[0] = torch.nan
    (broken,) = run(model, tokens, Steps(None, Gptq(), original=False))
    assert broken.notes[0].startswith("layers.0.mlp.gate.weight and 1 that read the same: its inputs are not finite")
    assert set(block.rounded) == set(linear_weights(model.layers, "layers"))


def test_memory_that_runs_out_means_fewer_rows_at_a_time(tokens, monkeypatch):
    model, steps = model_of(), Steps(None, Gptq())
    whole = run(model, tokens, steps)
    forward = Mlp.forward

    def hungry(self, x):
        if len(x) > 4:
            raise torch.OutOfMemoryError("no memory")
        return forward(self, x)

    monkeypatch.setattr(Mlp, "forward", hungry)
    for block, before in zip(run(model, tokens, steps), whole, strict=True):
        for name in block.rounded:
            codes, expected = (made.codes(name, CPU)[0] for made in (block, before))
            assert float((codes != expected).float().mean()) < 0.01
