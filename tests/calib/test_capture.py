"""Block by block sees what a run of the whole model sees, with one block loaded at a time."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from quantlab_calib.capture import Captured, CaptureError, capture, find_blocks, forward_replaced, observing

CPU = torch.device("cpu")


class Block(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.q, self.k, self.out = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, hidden_states, mask=None):
        out = hidden_states + self.out(torch.tanh(self.q(hidden_states) * self.k(hidden_states) * mask))
        return {"tuple": (out, None), "dict": {"hidden": out}}.get(self.kind, out)


class Model(nn.Module):
    """Blocks with a mask of their own each, as models that mix full and sliding attention have."""

    def __init__(self, kind: str = "tensor", blocks: int = 4) -> None:
        super().__init__()
        self.kind = kind
        self.embed = nn.Embedding(16, 8)
        self.layers = nn.ModuleList(Block(kind) for _ in range(blocks))
        self.unused = nn.Linear(8, 8)
        self.head = nn.Linear(8, 16)
        self.config = SimpleNamespace(use_cache=True)

    def forward(self, input_ids, use_cache=False):
        hidden = self.embed(input_ids)
        for index, layer in enumerate(self.layers):
            if self.kind == "keyword":
                hidden = layer(hidden_states=hidden, mask=float(index + 1))
            else:
                out = layer(hidden, mask=float(index + 1))
                hidden = {"tuple": lambda o: o[0], "dict": lambda o: o["hidden"]}.get(self.kind, lambda o: o)(out)
        return self.head(hidden)


class Loads:
    """Stands for the shards: knows what is loaded, and how much at most."""

    def __init__(self) -> None:
        self.held: set[str] = set()
        self.ever: set[str] = set()
        self.most_blocks = 0

    def load(self, path: str, recurse: bool = True) -> None:
        self.held.add(path)
        self.ever.add(path)
        self.most_blocks = max(self.most_blocks, sum(p.startswith("layers.") for p in self.held))

    def release(self, path: str) -> None:
        self.held = {p for p in self.held if path and not p.startswith(path)}


def batches():
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 16, (2, 5), generator=generator) for _ in range(3)]


def run(model, blocks, loads=None):
    loads = loads or Loads()
    found = {}
    for block in capture(model, batches(), loads, device=CPU, blocks=blocks):
        found |= block.inputs
    return found


@pytest.mark.parametrize("kind", ["tensor", "tuple", "keyword"])
def test_block_by_block_equals_the_whole_model(kind):
    torch.manual_seed(0)
    model, loads = Model(kind), Loads()
    whole, part = run(model, None), run(model, find_blocks(model), loads)
    assert set(part) == {f"layers.{i}.{name}.weight" for i in range(4) for name in ("q", "k", "out")}
    assert set(whole) - set(part) == {"head.weight"}
    for name, observer in part.items():
        assert torch.equal(observer.amax(), whole[name].amax())
        assert torch.equal(observer.energy(), whole[name].energy())
        assert observer.tokens == 30
    assert loads.most_blocks == 1
    assert loads.held == set()
    assert loads.ever == {"embed", *(f"layers.{i}" for i in range(4))}  # not the head, nothing that never runs


def test_layers_that_read_one_tensor_share_its_observer():
    found = run(Model(), "layers")
    assert found["layers.1.q.weight"] is found["layers.1.k.weight"]
    assert found["layers.1.q.weight"] is not found["layers.1.out.weight"]
    assert found["layers.1.q.weight"] is not found["layers.2.q.weight"]


def test_the_model_is_left_as_it_was():
    model = Model()
    before = model(batches()[0])
    run(model, "layers")
    assert all("forward" not in layer.__dict__ for layer in model.layers)
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert torch.equal(model(batches()[0]), before)


def test_what_does_not_run_so_is_refused_in_one_line():
    assert run(Model("dict"), None)
    with pytest.raises(CaptureError, match="Block returns dict, not hidden states"):
        run(Model("dict"), "layers")
    with pytest.raises(CaptureError, match=r"TypeError: .*unexpected keyword argument 'input_ids'"):
        run(nn.Sequential(nn.Linear(8, 8)), None)


def test_experts_in_one_parameter_are_told_apart():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.down_proj = nn.Parameter(torch.randn(3, 4, 8))

        def forward(self, x):
            return nn.functional.linear(x[:2], self.down_proj[0]), nn.functional.linear(x[2:], self.down_proj[2])

    module, x = Experts(), torch.randn(5, 8)
    captured = Captured("mlp.experts", module)
    with observing(captured):
        module(x)
    assert {name: o.tokens for name, o in captured.inputs.items()} == {
        "mlp.experts.down_proj[0]": 2,
        "mlp.experts.down_proj[2]": 3,
    }
    assert torch.equal(captured.inputs["mlp.experts.down_proj[2]"].amax(), x[2:].abs().amax(0))


def test_the_list_of_blocks():
    assert find_blocks(Model()) == "layers"
    assert find_blocks(nn.Sequential(nn.Linear(4, 4))) is None
    both = nn.ModuleDict({"encoder": Model(), "decoder": Model()})
    assert find_blocks(both) is None  # two lists of like size: which inputs does each one get?
    assert find_blocks(nn.ModuleDict({"tower": Model(blocks=1), "text": Model(blocks=9)})) == "text.layers"


def test_a_replaced_forward_gives_way_to_one_that_was_there():
    layer = nn.Linear(2, 2)
    layer.forward = hooked = lambda x: x + 1
    with forward_replaced(layer, lambda x: x * 0):
        assert layer(torch.ones(1)).item() == 0
    assert layer.forward is hooked
