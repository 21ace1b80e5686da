"""The matrix: every architecture and scheme is quantized, loaded, run, compared, saved and loaded again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from quantlab import hf, plan
from quantlab.experts import Fp8Experts
from quantlab.int4_experts import Int4Experts
from quantlab.linear import QuantizedLinear
from quantlab.scheme import SCHEMES
from quantlab_kernels.packing import unpack_int4
from quantlab_kernels.qtensor import QuantizedTensor, quantize

# Quantized layers (linear, experts) that each architecture must have, by scheme: a layer that is silently left alone
# is the failure this matrix is for.
LAYERS = {
    "llama": {"int4": (14, 0), "fp8-block": (14, 0), "fp8-dynamic": (14, 0), "int4-fp8": (14, 0)},
    "qwen2": {"fp8-block": (14, 0), "fp8-dynamic": (14, 0), "int4-fp8": (14, 0)},
    "qwen3": {"fp8-block": (14, 0), "fp8-dynamic": (14, 0), "int4-fp8": (14, 0)},
    "qwen3_moe": {"int4": (8, 2), "fp8-block": (8, 2), "fp8-dynamic": (8, 2), "int4-fp8": (8, 2)},
    "mixtral": {"fp8-block": (8, 2), "fp8-dynamic": (8, 2), "int4-fp8": (8, 2)},
    "gemma3": {"fp8-block": (14, 0), "fp8-dynamic": (14, 0), "int4-fp8": (14, 0)},
    "gemma3_vision": {"fp8-block": (14, 0), "fp8-dynamic": (14, 0), "int4-fp8": (14, 0)},
    "phi3": {"fp8-block": (8, 0), "fp8-dynamic": (8, 0), "int4-fp8": (8, 0)},
    "deepseek_v2": {"fp8-block": (12, 1), "fp8-dynamic": (16, 1), "int4-fp8": (12, 1)},
    "deepseek_v3": {"fp8-block": (12, 1), "fp8-dynamic": (16, 1), "int4-fp8": (12, 1)},
    "bert": {"fp8-block": (13, 0), "fp8-dynamic": (13, 0), "int4-fp8": (13, 0)},
    "whisper": {"fp8-block": (26, 0), "fp8-dynamic": (26, 0), "int4-fp8": (26, 0)},
    "t5": {"fp8-block": (28, 0), "fp8-dynamic": (28, 0), "int4-fp8": (28, 0)},
    "vit": {"fp8-block": (12, 0), "fp8-dynamic": (12, 0), "int4-fp8": (12, 0)},
    "rt_detr": {"fp8-block": (24, 0), "fp8-dynamic": (28, 0), "int4-fp8": (24, 0)},
    "d_fine": {"fp8-block": (24, 0), "fp8-dynamic": (28, 0), "int4-fp8": (24, 0)},
}
MATRIX = [(name, scheme) for name, schemes in LAYERS.items() for scheme in schemes]
SCALE = dict.fromkeys(SCHEMES, "weight_scale") | {"fp8-block": "weight_scale_inv"}
# What our layers make of their inputs: finer than INT4 checkpoints ask for.
INPUT = {name: scheme.input for name, scheme in SCHEMES.items()} | {"int4-fp8": SCHEMES["fp8-block"].input}
EXPERTS = (Fp8Experts, Int4Experts)


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny products are slower on two threads than on one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def ours():
    hf.enable()


@pytest.fixture
def stock():
    """transformers as it is without our import."""
    hf.disable()
    yield
    hf.enable()


def dequantized(folder: Path, scheme: str, to: Path) -> Path:
    """The same weights in float32, as a checkpoint that is not quantized."""
    tensors, suffix = load_file(folder / "model.safetensors"), SCALE[scheme]
    plain = {}
    for name in [name for name in tensors if name.endswith("weight_packed")]:
        rows, columns = tensors.pop(name.replace("_packed", "_shape")).tolist()
        codes = unpack_int4(tensors.pop(name), columns)
        assert codes.shape == (rows, columns)
        tensors[name.removesuffix("_packed")] = codes
    for name, tensor in tensors.items():
        scale = tensors.get(name.removesuffix("weight") + suffix) if name.endswith("weight") else None
        if scale is not None:
            tensor = QuantizedTensor(tensor, scale.float(), SCHEMES[scheme].weight).dequantize()
        if not name.endswith(suffix):
            plain[name] = tensor.float() if tensor.is_floating_point() else tensor
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (to / "config.json").write_text(json.dumps(config))
    save_file(plain, to / "model.safetensors", {"format": "pt"})
    return to


def rounded(x: torch.Tensor, scheme: str) -> torch.Tensor:
    """x as the quantized layer sees it."""
    spec = INPUT[scheme]
    return x if spec is None else quantize(x.reshape(-1, x.shape[-1]), spec).dequantize().reshape(x.shape)


def round_inputs(reference: nn.Module, model: nn.Module, scheme: str) -> None:
    """Make the layers of the full-precision reference see rounded inputs, wherever `model` has a quantized layer."""
    modules = dict(reference.named_modules())
    for path, layer in model.named_modules():
        if isinstance(layer, QuantizedLinear):
            modules[path].register_forward_pre_hook(lambda _, args: (rounded(args[0], scheme), *args[1:]))
        elif isinstance(layer, EXPERTS):
            modules[path].forward = expert_loop(modules[path], scheme)


def expert_loop(experts: nn.Module, scheme: str) -> Callable[..., torch.Tensor]:
    """Every token through its experts, one at a time: nothing sorted, nothing grouped."""

    def forward(hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        out = torch.zeros_like(hidden)
        for token in range(hidden.shape[0]):
            for expert, weight in zip(index[token].tolist(), weights[token], strict=True):
                gate_up = rounded(hidden[token][None], scheme) @ experts.gate_up_proj[expert].T
                gate, up = gate_up.chunk(2, -1)
                inner = experts.act_fn(gate) * up
                out[token] += weight * (rounded(inner, scheme) @ experts.down_proj[expert].T)[0]
        return out

    return forward


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def run(model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).logits.float()


def load(source: Any, folder: Path, **options: Any) -> Any:
    model, info = source.model_class.from_pretrained(folder, output_loading_info=True, **options)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    return model


@pytest.mark.parametrize("name", LAYERS)
def test_nothing_is_missing_where_all_is_there(name: str, tiny):
    assert not any("not in the checkpoint" in warning for warning in plan(tiny(name).folder).warnings)


@pytest.mark.parametrize(("name", "scheme"), MATRIX)
def test_runs_like_the_dequantized_model(name: str, scheme: str, quantized, ours, tmp_path: Path):
    source = quantized(name, scheme)
    model = load(source, source.folder, dtype=torch.float32)
    kinds = [type(m) for m in model.modules()]
    count = tuple(sum(issubclass(kind, base) for kind in kinds) for base in (QuantizedLinear, EXPERTS))
    assert count == LAYERS[name][scheme]
    reference = load(source, dequantized(source.folder, scheme, tmp_path), dtype=torch.float32)
    plain = run(reference, source.inputs())
    round_inputs(reference, model, scheme)
    found, expected = run(model, source.inputs()), run(reference, source.inputs())
    # Sums in another order, which now and then moves an input of a later layer to the next code, 2^-4 away.
    assert relative(found, expected) < 5e-3
    assert relative(found, plain) < 0.1
    assert torch.isfinite(found).all()


@pytest.mark.parametrize(("name", "scheme"), MATRIX)
def test_saves_what_it_read(name: str, scheme: str, quantized, ours, tmp_path: Path):
    source = quantized(name, scheme)
    model = load(source, source.folder)
    assert model.dtype == torch.bfloat16
    before = run(model, source.inputs(torch.bfloat16))
    model.save_pretrained(tmp_path)
    read, saved = (load_file(folder / "model.safetensors") for folder in (source.folder, tmp_path))
    assert read.keys() == saved.keys()
    for tensor in read:
        assert read[tensor].dtype == saved[tensor].dtype, tensor
        assert torch.equal(read[tensor].reshape(-1).view(torch.uint8), saved[tensor].reshape(-1).view(torch.uint8)), (
            tensor
        )
    configs = [json.loads((folder / "config.json").read_text()) for folder in (source.folder, tmp_path)]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]
    assert torch.equal(run(load(source, tmp_path), source.inputs(torch.bfloat16)), before)


@pytest.mark.parametrize(("name", "scheme"), MATRIX)
def test_loads_without_us(name: str, scheme: str, quantized, stock, tmp_path: Path):
    source, options = quantized(name, scheme), {}
    if scheme != "fp8-block":
        pytest.importorskip("compressed_tensors")
        if name == "d_fine" and tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 23):
            pytest.xfail(
                "compressed-tensors cannot offload a module that has two names; transformers 5.23 does not ask"
            )
        if scheme == "int4-fp8" and name in ("t5", "rt_detr", "d_fine"):
            pytest.xfail(
                "compressed-tensors' packed layers have no weight before their first forward; this model looks"
            )
    elif (
        torch.cuda.is_available()
    ):  # FP8 of transformers' own needs a kernel from the hub; without a GPU it dequantizes
        options = {"quantization_config": transformers.FineGrainedFP8Config(dequantize=True)}
    model = load(source, source.folder, **options)
    assert not any(isinstance(m, (QuantizedLinear, *EXPERTS)) for m in model.modules())
    reference = load(source, dequantized(source.folder, scheme, tmp_path), dtype=torch.bfloat16)
    found, expected = (run(m, source.inputs(torch.bfloat16)) for m in (model, reference))
    # transformers dequantizes fp8 and leaves activations alone; compressed-tensors rounds them too.
    assert relative(found, expected) < (0.02 if scheme == "fp8-block" else 0.1)
