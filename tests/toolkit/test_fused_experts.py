"""Experts that a checkpoint holds in one 3-D tensor: quantized as one, one by one, or left alone with a reason."""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import quantlab
from quantlab import hf
from quantlab.checkpoint import Stored
from quantlab.convert import convert
from quantlab.errors import PreflightError, UsageError
from quantlab.experts import Fp8BlockExperts, Fp8RowExperts
from quantlab.fused_experts import matrices, stack
from quantlab.int4_experts import Int4Experts, Int4Fp8Experts
from quantlab.jobs import Lane, QuantizeStack
from quantlab.layer_errors import Pair, weight_errors
from quantlab.linear import QuantizedLinear
from quantlab.pipeline import plan, quantize
from quantlab.scaled_inputs import ScaledInputs
from quantlab.scheme import SCHEMES, Recipe, Rule
from quantlab.shards import TensorInfo
from quantlab.source import Source
from quantlab.verify import verify
from quantlab_kernels.qtensor import QuantizedTensor

CPU = torch.device("cpu")
GATE_UP = "model.language_model.layers.0.mlp.experts.gate_up_proj"
DOWN = "model.language_model.layers.0.mlp.experts.down_proj"
V5_23 = tuple(map(int, transformers.__version__.split(".")[:2])) >= (5, 23)


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def is_stack(name: str, tensor: torch.Tensor) -> bool:
    return tensor.ndim == 3 and "experts." in name


@pytest.fixture(scope="module")
def source(tiny, tmp_path_factory):
    """The folder of a tiny model, its experts [E, N, K], or [E, K, N] as published checkpoints have them."""

    @cache
    def make(name: str, turned: bool) -> Path:
        folder = tmp_path_factory.mktemp(name) / "model"
        shutil.copytree(tiny(name).folder, folder)
        tensors = load_file(folder / "model.safetensors")
        for key in [key for key, tensor in tensors.items() if turned and is_stack(key, tensor)]:
            tensors[key] = tensors[key].transpose(1, 2).contiguous()
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return folder

    return make


@pytest.fixture(scope="module")
def made(source, tmp_path_factory):
    """The same, quantized; `named`: by a recipe that names the experts."""

    @cache
    def make(name: str, scheme: str, turned: bool = False, named: bool = False) -> Path:
        folder = tmp_path_factory.mktemp(f"{name}-{scheme}") / "out"
        recipe = Recipe(scheme, rules=(Rule("*.experts", scheme),) if named else ())
        quantize(source(name, turned), recipe, folder, device="cpu", workers=1)
        return folder

    return make


def logits(model, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    ids = torch.randint(3, 90, (2, 8), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(input_ids=ids).logits.float()


def original(tiny, source, name: str, turned: bool = False, dtype: torch.dtype = torch.float32):
    return tiny(name).model_class.from_pretrained(source(name, turned), dtype=dtype)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def experts_of(model) -> torch.nn.Module:
    return next(module for path, module in model.named_modules() if path.endswith(".experts"))


def routing(hidden: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Six large tokens, each with two of four experts."""
    generator = torch.Generator().manual_seed(0)
    x, index = 20 * torch.randn(6, hidden, generator=generator), torch.tensor([[0, 3], [1, 2], [3, 1]] * 2)
    return x, index, torch.rand(6, 2, generator=generator)


def routed(model, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return experts_of(model)(x, index, weights)


def test_a_stack_lies_as_its_weights_do(made):
    straight, turned = (load_file(made("qwen3_vl_moe", "fp8-block", t) / "model.safetensors") for t in (False, True))
    assert straight.keys() == turned.keys()
    assert straight[GATE_UP].shape == (4, 256, 384)
    assert straight[GATE_UP].dtype == torch.float8_e4m3fn
    assert straight[GATE_UP + "_scale_inv"].shape == (4, 2, 3)
    assert turned[DOWN].shape == (4, 128, 384)
    assert turned[DOWN + "_scale_inv"].shape == (4, 1, 3)
    for name in (GATE_UP, DOWN, GATE_UP + "_scale_inv", DOWN + "_scale_inv"):
        assert torch.equal(straight[name].float(), turned[name].float().transpose(1, 2)), name


@pytest.mark.parametrize("turned", [False, True])
def test_a_stack_is_verified_loaded_and_saved_as_it_was(turned: bool, made, source, tiny, tmp_path):
    folder = made("qwen3_vl_moe", "fp8-block", turned)
    assert verify(folder).problems == ()
    model = quantlab.load(folder, dtype=torch.float32)
    assert sum(isinstance(module, Fp8BlockExperts) for module in model.modules()) == 2
    before = original(tiny, source, "qwen3_vl_moe", turned)
    assert relative(logits(model), logits(before)) < 0.12
    call = routing(384)
    exact = routed(before, *call)
    assert relative(routed(model, *call), exact) < 0.08
    experts_of(before).gate_up_proj.data = experts_of(before).gate_up_proj.data.roll(128, 1)  # up before gate
    assert relative(routed(before, *call), exact) > 0.5
    quantlab.load(folder).save_pretrained(tmp_path)
    read, saved = (load_file(place / "model.safetensors") for place in (folder, tmp_path))
    assert read.keys() == saved.keys()
    assert all(torch.equal(read[name].view(torch.uint8), saved[name].view(torch.uint8)) for name in read)


@pytest.mark.parametrize("turned", [False, True])
def test_a_stack_without_us(turned: bool, made, tiny, monkeypatch):
    """On a GPU transformers makes FP8 experts of its own; here only the loading of them is seen."""
    folder = made("qwen3_vl_moe", "fp8-block", turned)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    hf.disable()
    try:
        if turned and V5_23:  # it turns codes, not scales
            with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
                tiny("qwen3_vl_moe").model_class.from_pretrained(folder, device_map="cpu")
            return
        stock, info = tiny("qwen3_vl_moe").model_class.from_pretrained(
            folder, device_map="cpu", output_loading_info=True
        )
    finally:
        hf.enable()
        monkeypatch.undo()
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ours, theirs = (experts_of(model).state_dict() for model in (quantlab.load(folder), stock))
    for name in ("gate_up_proj", "gate_up_proj_scale_inv", "down_proj", "down_proj_scale_inv"):
        assert torch.equal(ours[name].float(), theirs[name].float()), name


def test_a_stack_goes_back_to_bf16(made, source, tmp_path):
    folder = made("qwen3_vl_moe", "fp8-block", True)
    convert(folder, "bf16", tmp_path / "back")
    back, was = (load_file(place / "model.safetensors") for place in (tmp_path / "back", source("qwen3_vl_moe", True)))
    codes = load_file(folder / "model.safetensors")
    assert back.keys() == was.keys()
    one = QuantizedTensor(codes[GATE_UP][2], codes[GATE_UP + "_scale_inv"][2], SCHEMES["fp8-block"].weight)
    assert torch.equal(back[GATE_UP][2].float(), one.dequantize())
    with pytest.raises(
        UsageError, match="in one tensor, which compressed-tensors has no place for; keep fp8, or go to"
    ):
        convert(folder, "compressed-tensors", tmp_path / "other")


def test_a_stack_is_not_taken_for_weights(made, tiny):
    options = {"quantization_config": transformers.FineGrainedFP8Config(dequantize=True)}
    with pytest.raises(UsageError, match="holds all experts, which transformers does not multiply out; write the chec"):
        tiny("qwen3_vl_moe").model_class.from_pretrained(made("qwen3_vl_moe", "fp8-block"), **options)


def test_errors_of_a_stack(made, source):
    pair = Pair(Source.open(made("qwen3_vl_moe", "fp8-block", True)), Source.open(source("qwen3_vl_moe", True)))
    errors = weight_errors(pair)
    assert 28 < errors[GATE_UP] < 34
    assert 28 < errors[DOWN] < 34


@pytest.mark.parametrize("turned", [False, True])
def test_rounding_sees_each_matrix_of_a_stack(turned: bool, source):
    folder = source("qwen3_vl_moe", turned)
    decisions = {d.tensor: d for d in plan(folder, "fp8-block").decisions}
    assert decisions[GATE_UP].stack is not None
    assert decisions[GATE_UP].stack.transposed is turned
    seen: dict[str, torch.Tensor] = {}
    written: list[dict[str, bytearray]] = []
    for rounded in (None, lambda module, rows, first: seen.update({module: rows.clone()})):
        job = QuantizeStack(decisions[GATE_UP].stack, Stored.of(SCHEMES["fp8-block"]), rounded)
        files = {slot.name: bytearray(slot.nbytes) for slot in job.slots}
        lane = Lane(Source.open(folder).reader, CPU)

        def write(name: str, begin: int, data: torch.Tensor, files=files) -> None:
            files[name][begin : begin + len(data)] = data.numpy().tobytes()

        for _, piece in job.pieces(1 << 14):
            piece(lane, write)
        written.append(files)
    assert written[0] == written[1]
    up = load_file(folder / "model.safetensors")[GATE_UP][3]
    up = (up.T if turned else up)[128:]
    assert torch.equal(seen[f"{GATE_UP.rpartition('.')[0]}.3.up_proj"], up)
    assert len(seen) == 8


def damage(folder: Path, to: Path, change) -> tuple[str, ...]:
    shutil.copytree(folder, to)
    (to / "quantlab" / "manifest.json").unlink()
    tensors = load_file(to / "model.safetensors")
    change(tensors)
    save_file(tensors, to / "model.safetensors", {"format": "pt"})
    return verify(to).problems


def test_damaged_stacks(made, tmp_path):
    folder, scale = made("qwen3_vl_moe", "fp8-block"), GATE_UP + "_scale_inv"

    def turn(tensors):
        tensors[scale] = tensors[scale].transpose(1, 2).contiguous()

    def poison(tensors):
        tensors[scale][1, 0, 0] = 0
        tensors[DOWN].view(torch.uint8)[0, 0, 0] = 0x7F

    def widen(tensors):
        tensors[GATE_UP] = tensors[GATE_UP][:, :, :256].contiguous()
        tensors[scale] = tensors[scale][:, :, :2].contiguous()

    assert any("scale has shape [12, 2], needs [8, 3]" in line for line in damage(folder, tmp_path / "a", turn))
    poisoned = damage(folder, tmp_path / "b", poison)
    assert f"{GATE_UP}: 1 of 24 scales are not positive and finite" in poisoned
    assert f"{DOWN}: 1 codes are NaN" in poisoned
    missing = damage(folder, tmp_path / "c", lambda tensors: tensors.pop(scale))
    assert any(line.startswith(f"{GATE_UP}: quantized weight without") for line in missing)
    wide = damage(folder, tmp_path / "d", widen)
    assert any("needs [4, 256, 384] or its transpose, and not both" in line for line in wide)


def info(name: str, *shape: int) -> TensorInfo:
    size = 2 * torch.Size(shape).numel()
    return TensorInfo(name, "BF16", shape, Path("x"), 0, size)


def test_shapes_tell_how_experts_lie():
    gate_up, down = info("m.experts.gate_up_proj", 2, 64, 256), info("m.experts.down_proj", 2, 128, 64)
    tensors = {t.name: t for t in (gate_up, down)}  # turned: [E, H, 2I], [E, I, H]
    parts = dict(matrices(gate_up, tensors)) | dict(matrices(down, tensors))
    assert parts["m.experts.1.up_proj"].shape == (128, 64)
    assert parts["m.experts.1.down_proj"].shape == (64, 128)
    assert matrices(gate_up, {**tensors, "m.experts.down_proj": info("m.experts.down_proj", 2, 96, 64)}) == ()
    assert matrices(gate_up, {**tensors, "m.experts.down_proj": info("m.experts.down_proj", 96, 64)}) == ()
    assert stack(gate_up, (2, 256, 64)).transposed
    assert not stack(gate_up, (2, 64, 256)).transposed
    assert stack(gate_up, (2, 64, 512)) is None
    assert stack(info("m.experts.gate_up_proj", 2, 256, 256), (2, 256, 256)) is None  # readers would not agree


@pytest.mark.parametrize(
    ("scheme", "kind", "off"),
    [("fp8-dynamic", Fp8RowExperts, 0.12), ("int4", Int4Experts, 0.3), ("int4-fp8", Int4Fp8Experts, 0.3)],
)
def test_experts_that_read_scaled_inputs(scheme: str, kind: type, off: float, made, source, tiny, tmp_path):
    """Llama 4, stored [E, K, N]: compressed-tensors checkpoints hold its experts one by one."""
    folder = made("llama4", scheme)
    assert verify(folder).problems == ()
    model, before = quantlab.load(folder, dtype=torch.float32), original(tiny, source, "llama4")
    assert sum(type(module) is kind for module in model.modules()) == 2
    assert sum(isinstance(module, QuantizedLinear) for module in model.modules()) == 14
    assert relative(logits(model), logits(before)) < off
    quantlab.load(folder).save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() == load_file(folder / "model.safetensors").keys()
    with pytest.raises(UsageError, match="one by one, which transformers does not read in 16 bits"):
        convert(folder, "bf16", tmp_path / "back")
    pytest.importorskip("compressed_tensors")
    hf.disable()
    try:
        stock, loading = tiny("llama4").model_class.from_pretrained(folder, output_loading_info=True)
        theirs = logits(stock)
    finally:
        hf.enable()
    assert not any(loading[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert relative(theirs, logits(before)) < off


@pytest.mark.parametrize("chosen", [1, 2])
def test_only_chosen_experts_read_scaled_inputs(chosen: int):
    from transformers.models.llama4.modeling_llama4 import Llama4TextMoe

    config = transformers.Llama4TextConfig(
        hidden_size=32, intermediate_size=48, num_local_experts=4, num_experts_per_tok=chosen
    )
    torch.manual_seed(0)
    block = Llama4TextMoe(config)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x = torch.randn(2, 5, 32)
    expected, expected_logits = block(x)
    whole, calls = block.experts, []

    def one_at_a_time(rows, index, weights):
        calls.append(rows.shape)
        gate, up = torch.einsum("th,thn->tn", rows, whole.gate_up_proj[index[:, 0]]).chunk(2, -1)
        return torch.einsum("tn,tnh->th", up * whole.act_fn(gate), whole.down_proj[index[:, 0]]) * weights

    block.experts = torch.nn.Identity()
    block.experts.forward = one_at_a_time
    out, routed_logits = ScaledInputs(block)(x)
    assert calls == [(10 * chosen, 32)]
    torch.testing.assert_close(out, expected)
    assert torch.equal(routed_logits, expected_logits)


def test_experts_without_a_common_format_stay_unless_named(made, source, tiny):
    """Gemma 4: transformers knows its experts in one tensor only, engines look for quantized ones one by one."""
    folder = source("gemma4_moe", False)
    left = [d for d in plan(folder, "fp8-block").decisions if d.kind == "expert"]
    assert {d.reason for d in left} == {
        "experts fused in one 3-D tensor: transformers takes them in no other, engines one by one; a recipe that names "
        "*.experts stores them so"
    }
    asked = Recipe(rules=(Rule("*.experts", "fp8-block"),))
    assert any("after `import quantlab` alone; without, it would run" in line for line in plan(folder, asked).warnings)
    exact = routed(original(tiny, source, "gemma4_moe"), *routing(128))
    for scheme, kind, off in (("fp8-block", Fp8BlockExperts, 0.08), ("int4", Int4Experts, 0.25)):
        out = made("gemma4_moe", scheme, False, True)
        assert verify(out).problems == ()
        apart = [name for name in load_file(out / "model.safetensors") if ".experts.3.up_proj.weight" in name]
        assert len(apart) == 2 * (2 if scheme == "fp8-block" else 3)
        model = quantlab.load(out, dtype=torch.float32)
        assert sum(type(module) is kind for module in model.modules()) == 2
        assert relative(routed(model, *routing(128)), exact) < off


def tiny_text(**changes):
    return {
        "hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 64, "num_local_experts": 2, "pad_token_id": 0,
    } | changes  # fmt: skip


def test_experts_that_stay_say_why(tmp_path):
    def why(name: str, **config) -> set[str]:
        folder = tmp_path / name
        kind = getattr(transformers, f"{name}Config")(**config)
        getattr(transformers, f"{name}ForCausalLM")(kind).save_pretrained(folder)
        return {d.reason for d in plan(folder, "fp8-block").decisions if d.kind == "expert" and d.scheme is None}

    assert why("GptOss", **tiny_text()) == {"experts fused in one 3-D tensor: its experts have biases or norms"}
    no_scales = (
        "experts fused in one 3-D tensor: transformers takes them in no other, engines look for no scales of theirs"
    )
    assert why("GraniteMoe", **tiny_text()) == {no_scales}


def test_experts_that_transformers_would_replace_are_skipped(tmp_path):
    """It makes FP8 experts of every module that is called so, DBRX's too, which have no such parameters."""
    attention = {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 1e4}
    experts = {"ffn_hidden_size": 128, "moe_num_experts": 2, "moe_top_k": 1, "hidden_size": 128}
    config = transformers.DbrxConfig(
        d_model=128, n_heads=2, n_layers=1, max_seq_len=64, vocab_size=64, attn_config=attention, ffn_config=experts
    )
    transformers.DbrxForCausalLM(config).save_pretrained(tmp_path)
    assert "transformer.blocks.0.ffn.experts" in plan(tmp_path, "fp8-block").skip_modules


def test_damaged_experts_are_found_however_they_lie(source, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(source("llama4", False), folder)
    tensors = load_file(folder / "model.safetensors")
    next(t for name, t in tensors.items() if is_stack(name, t))[1, 2, 3] = float("nan")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(PreflightError, match="1 NaN and 0 Inf"):
        quantize(folder, Recipe("fp8-dynamic"), tmp_path / "out", device="cpu", workers=1)
    assert json.loads((folder / "config.json").read_text())["model_type"] == "llama4_text"


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("name", "scheme", "turned", "named"),
    [
        ("qwen3_vl_moe", "fp8-block", True, False), ("llama4", "fp8-dynamic", False, False),
        ("llama4", "int4", False, False), ("gemma4_moe", "fp8-block", False, True),
    ],
)  # fmt: skip
def test_on_a_gpu_too(name: str, scheme: str, turned: bool, named: bool, made, source, tiny, tmp_path):
    folder, rules = made(name, scheme, turned, named), (Rule("*.experts", scheme),) if named else ()
    quantize(source(name, turned), Recipe(scheme, rules=rules), tmp_path / "out", device="cuda")
    cpu, gpu = (load_file(place / "model.safetensors") for place in (folder, tmp_path / "out"))
    assert all(torch.equal(cpu[key].view(torch.uint8), gpu[key].view(torch.uint8)) for key in cpu)
    model = quantlab.load(folder, dtype=torch.bfloat16, device_map="cuda")
    exact = quantlab.load(folder, dtype=torch.float32)
    if name == "gemma4_moe":  # of whose logits bf16 alone moves 0.3
        x, index, weights = routing(128)
        given = x.cuda().bfloat16(), index.cuda(), weights.cuda().bfloat16()
        found, expected = routed(model, *given).float().cpu(), routed(exact, x, index, weights)
    else:
        ids = torch.randint(3, 90, (2, 8), generator=torch.Generator().manual_seed(1)).cuda()
        with torch.no_grad():
            found = model(input_ids=ids).logits.float().cpu()
        expected = logits(exact)
    assert relative(found, expected) < 0.1  # 16-bit sums move a code now and then
