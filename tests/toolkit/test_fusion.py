"""Joined layers give what the layers by themselves give, under every way of calling them, and change no checkpoint."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, ModelHook, add_hook_to_module
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, WhisperConfig, WhisperModel

from quantlab.fusion import FusedNorm, Fusion, Join, Mailbox, fuse
from quantlab.linear import Fp8BlockLinear, Fp8Linear, Fp8RowLinear
from quantlab.placement import unhook_blocks
from quantlab_kernels import quantize_fp8_block, rmsnorm
from quantlab_kernels.quantize_fp8.reference import token

SIZES = {
    "hidden_size": 256, "intermediate_size": 384, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 300, "max_position_embeddings": 64,
}  # fmt: skip


def quantized(model: torch.nn.Module, kind: type[Fp8Linear] = Fp8BlockLinear) -> torch.nn.Module:
    """The model with every linear layer but the head in FP8."""
    for path, module in list(model.named_modules()):
        if not isinstance(module, torch.nn.Linear) or path == "lm_head":
            continue
        layer = kind(module.in_features, module.out_features, module.bias is not None, dtype=module.weight.dtype)
        codes, scale = quantize_fp8_block(module.weight.data) if kind is Fp8BlockLinear else token(module.weight.data)
        layer.weight.data, layer.get_parameter(layer.scale_name).data = codes, scale
        if module.bias is not None:
            layer.bias.data = torch.randn_like(module.bias)
        model.set_submodule(path, layer)
    return model.eval()


@pytest.fixture
def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return quantized(LlamaForCausalLM(LlamaConfig(**SIZES)))


TOKENS = torch.arange(3, 15).reshape(2, 6)


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS.to(model.device)).logits


def test_everything_is_found(llama):
    assert fuse(llama) == Fusion(joined=4, mlps=2, norms=5, rotary=2, shared_keys=True)
    assert fuse(llama) == Fusion(), "a second call finds nothing left to do"


def test_joined_layers_equal_the_layers_bit_for_bit():
    torch.manual_seed(1)
    layers = [Fp8BlockLinear(256, n, bias=n != 0) for n in (128, 384, 200)]
    for layer in layers:
        codes, scale = quantize_fp8_block(torch.randn(layer.out_features, 256))
        layer.weight.data, layer.weight_scale_inv.data = codes, scale
        layer.bias.data = torch.randn(layer.out_features)
    x = torch.randn(3, 5, 256)
    with torch.no_grad():
        expected = [layer(x) for layer in layers]
        join = Join(layers, Mailbox())
        for order in ((0, 1, 2), (2, 0, 1)):
            got = {index: layers[index](x) for index in order}
            assert all(torch.equal(got[index], expected[index]) for index in order)
        assert join._pending is None, "what was fetched is not kept"


def test_a_changed_tensor_is_computed_anew(llama):
    attention = llama.model.layers[0].self_attn
    fuse(llama)
    x = torch.randn(1, 2, 256)
    with torch.no_grad():
        before = attention.q_proj(x)
        x.mul_(2)  # the same tensor object with other contents, and k and v never asked for the first ones
        assert not torch.equal(attention.q_proj(x), before)


def test_layers_see_what_their_input_has_become():
    torch.manual_seed(1)
    layers = [Fp8BlockLinear(256, 128, bias=False) for _ in range(2)]
    for layer in layers:
        layer.weight.data, layer.weight_scale_inv.data = quantize_fp8_block(torch.randn(128, 256))
    Join(layers, Mailbox())
    x = torch.randn(2, 256)
    with torch.no_grad():
        layers[0](x)
        x.mul_(3)
        assert torch.equal(layers[1](x), Fp8BlockLinear.forward(layers[1], x))
    with torch.inference_mode():
        x = torch.randn(2, 256)
        assert torch.equal(layers[0](x), Fp8BlockLinear.forward(layers[0], x))


def halve_output(module, given, out):
    out.mul_(0.5)


def halve_input(module, given, named):
    named["hidden_states"].mul_(0.5)


def with_hooks(model: torch.nn.Module, where: str) -> torch.nn.Module:
    for block in model.model.layers:
        if where == "norm":
            block.input_layernorm.register_forward_hook(halve_output)
        else:
            block.self_attn.register_forward_pre_hook(halve_input, with_kwargs=True)
    return model


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    ("where", "mode"), [("norm", torch.no_grad), ("norm", torch.inference_mode), ("attention", torch.no_grad)]
)
def test_outputs_of_norms_that_are_edited_in_place(llama, where, mode, compiled):
    plain = with_hooks(copy.deepcopy(llama), where)
    fuse(llama)
    before = logits(llama)  # norms have learnt whom they feed
    model = with_hooks(llama, where)
    if compiled:
        torch._dynamo.reset()  # it counts what is compiled anew across tests
        model = torch.compile(model, fullgraph=True, backend="aot_eager")
    with mode():
        expected = plain(TOKENS).logits
        assert (before - expected).norm() > 0.1 * expected.norm()
        for _ in range(2):
            assert (model(TOKENS).logits - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu(sm=80))])
@pytest.mark.parametrize("kind", [Fp8BlockLinear, Fp8RowLinear])
def test_logits_stay_within_the_rounding_of_the_activations(kind: type[Fp8Linear], device: str):
    torch.manual_seed(0)
    model = quantized(LlamaForCausalLM(LlamaConfig(**SIZES)), kind).to(device)
    plain = logits(model)
    found = fuse(model)
    assert (found.joined, found.mlps) == (4, 2)
    for _ in range(3):  # norms learn in the first forward
        assert (logits(model) - plain).norm() < 0.02 * plain.norm()
    assert model.model.layers[0].input_layernorm.forward.feeds is kind


def test_norms_learn_that_they_feed_quantized_layers(llama):
    fuse(llama)
    layer = llama.model.layers[0]
    logits(llama)
    assert layer.input_layernorm.forward.feeds is Fp8BlockLinear
    assert layer.post_attention_layernorm.forward.feeds is Fp8BlockLinear
    assert llama.model.norm.forward.feeds is None, "the head is not quantized"


def test_the_first_forward_gives_the_bits_of_all_others(llama, device):
    """transformers' norms round what they have normed before they multiply it by their weight, fused ones do not."""
    for name, parameter in llama.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    model = llama.to(device, torch.bfloat16)
    fuse(model)
    first, second = logits(model), logits(model)
    assert model.model.layers[0].input_layernorm.forward.feeds is not None
    assert torch.equal(first, second)


@pytest.mark.gpu(sm=80)
@pytest.mark.parametrize("offset", [0.0, 1.0])
@torch.no_grad()
def test_a_norm_that_feeds_no_codes_is_one_launch(llama, offset):
    """The same numbers within the rounding of 16 bits, before it has learnt whom it feeds and for good."""
    norm = llama.model.norm.to("cuda", torch.bfloat16)
    norm.weight.uniform_(0.5, 2)
    x = torch.randn(3, 7, 256, device="cuda", dtype=torch.bfloat16) * 4
    expected = norm(x).float() * ((norm.weight + offset) / norm.weight).float()
    norm.forward = FusedNorm(norm, norm.variance_epsilon, offset, Mailbox())
    found = norm(x)
    torch.testing.assert_close(found.float(), expected, atol=1e-2, rtol=2**-6)
    assert torch.equal(found, rmsnorm(x, norm.weight, norm.variance_epsilon, offset=offset))


class Adapter(torch.nn.Module):
    """Around a layer, as PEFT puts them."""

    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        self.base_layer = layer

    def forward(self, x):
        return 2 * self.base_layer(x)


def adapted(model: torch.nn.Module, name: str) -> torch.nn.Module:
    """The model with an adapter around that layer of every block."""
    for block in model.model.layers:
        block.set_submodule(name, Adapter(block.get_submodule(name)))
    return model


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", ["self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.act_fn", "mlp.down_proj"])
def test_adapters_are_called(llama, name, compiled):
    expected = logits(adapted(copy.deepcopy(llama), name))
    fuse(llama)
    before = logits(llama)
    model = adapted(llama, name)
    if compiled:
        torch._dynamo.reset()  # it counts what is compiled anew across tests
        model = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert (before - expected).norm() > 0.1 * expected.norm()
    assert (logits(model) - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize("name", ["gate_proj", "up_proj", "act_fn", "down_proj"])
def test_hooks_of_a_gated_mlp_are_called(llama, name):
    fuse(llama)
    mlp, x = llama.model.layers[0].mlp, torch.randn(1, 3, 256)
    layer, called = mlp.get_submodule(name), []
    with torch.no_grad():
        fast = mlp(x)
        for register in (layer.register_forward_hook, layer.register_forward_pre_hook):
            hook = register(lambda *given: called.append(name))
            mlp(x)
            hook.remove()
        assert called == [name, name]
        assert torch.equal(mlp(x), fast), "without hooks as before"
        add_hook_to_module(layer, ModelHook())
        assert not mlp.forward.untouched(), "hooks of accelerate replace the layer's forward"


def test_bias_and_tied_directions():
    torch.manual_seed(0)
    model = quantized(Qwen2ForCausalLM(Qwen2Config(**SIZES)))
    plain = logits(model)
    assert fuse(model).joined == 4
    assert (logits(model) - plain).norm() < 0.02 * plain.norm()


def test_cross_attention_keeps_its_query_apart():
    torch.manual_seed(0)
    config = WhisperConfig(
        d_model=128, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=128, decoder_ffn_dim=128, vocab_size=64, num_mel_bins=8, max_source_positions=8,
        max_target_positions=8, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    model = quantized(WhisperModel(config))
    features, tokens = torch.randn(1, 8, 16), torch.tensor([[1, 5, 6]])
    with torch.no_grad():
        plain = model(input_features=features, decoder_input_ids=tokens).last_hidden_state
        fuse(model)
        joined = model(input_features=features, decoder_input_ids=tokens).last_hidden_state
    assert (joined - plain).norm() < 1e-4 * plain.norm()


class GatedRMSNorm(torch.nn.Module):
    """As state-space models have it: the gate is an argument, required in some and optional in others."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(size))
        self.eps = 1e-6

    def forward(self, x, gate):
        return torch.nn.functional.rms_norm(x, self.weight.shape, self.weight, self.eps) * torch.sigmoid(gate)


def test_gated_norms_are_left_alone(llama):
    llama.model.gated = GatedRMSNorm(256)
    assert fuse(llama).norms == 5
    assert "forward" not in vars(llama.model.gated)


def test_state_dict_and_copies_stay_as_they_are(llama):
    before = {name: tensor.clone() for name, tensor in llama.state_dict().items()}
    fuse(llama)
    logits(llama)
    after = llama.state_dict()
    assert list(before) == list(after)
    for name in before:
        assert torch.equal(before[name].view(torch.uint8), after[name].contiguous().view(torch.uint8)), name


def test_a_copy_is_a_whole_copy(llama):
    fuse(llama)
    expected = logits(llama)
    twin = copy.deepcopy(llama)
    assert torch.equal(logits(twin), expected)
    for parameter in twin.parameters():
        parameter.data.zero_()
    assert not logits(twin).any()
    assert torch.equal(logits(llama), expected)


def test_save_and_reload(llama, tmp_path: Path):
    fuse(llama)
    llama.save_pretrained(tmp_path)
    from safetensors.torch import load_file

    saved = load_file(tmp_path / "model.safetensors")
    for name, tensor in llama.state_dict().items():
        assert torch.equal(saved[name].view(torch.uint8), tensor.contiguous().view(torch.uint8)), name


def test_a_model_that_was_moved_is_joined_again(llama):
    fuse(llama)
    weights = {name: tensor.clone() for name, tensor in llama.state_dict().items()}
    expected = logits(llama)
    llama.to("meta").to_empty(device="cpu")
    llama.load_state_dict(weights)
    llama.model.rotary_emb.inv_freq.copy_(
        llama.model.rotary_emb.original_inv_freq.copy_(1e4 ** -(torch.arange(32) / 32))
    )
    assert (logits(llama) - expected).norm() < 0.02 * expected.norm()


def test_loading_other_weights_into_a_joined_model(llama):
    torch.manual_seed(5)
    other = quantized(LlamaForCausalLM(LlamaConfig(**SIZES)))
    fuse(llama)
    llama.load_state_dict(other.state_dict())
    expected = logits(other)
    assert (logits(llama) - expected).norm() < 0.02 * expected.norm()


def test_compiles_without_a_break(llama):
    fuse(llama)
    eager = logits(llama)
    compiled = torch.compile(llama, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert (compiled(TOKENS).logits - eager).norm() < 0.02 * eager.norm()


def test_gradients_take_the_layers_by_themselves(llama):
    fuse(llama)
    embedded = torch.randn(1, 4, 256, requires_grad=True)
    llama(inputs_embeds=embedded).logits.sum().backward()
    assert embedded.grad is not None
    assert bool(embedded.grad.abs().sum() > 0)


def test_the_environment_turns_it_off(llama, monkeypatch):
    monkeypatch.setenv("QUANTLAB_FUSE", "0")
    assert fuse(llama) == Fusion()


@pytest.mark.gpu(sm=80)
@pytest.mark.filterwarnings("ignore::UserWarning")  # of inductor: advice on TF32, and choices of its own
def test_on_the_gpu_moved_and_compiled(llama):
    plain = copy.deepcopy(llama).to("cuda")
    fuse(llama)
    logits(llama)
    model, tokens = llama.to("cuda"), TOKENS.cuda()
    with torch.no_grad():
        expected = plain(tokens).logits
        compiled = torch.compile(model, fullgraph=True, mode="reduce-overhead")
        for run in (model, model, compiled, compiled, compiled):
            assert (run(tokens).logits - expected).norm() < 0.02 * expected.norm()


def row_scaled_in_bfloat16(seed: int) -> torch.nn.Module:
    """As `fp8-dynamic` checkpoints of bfloat16 models are."""
    torch.manual_seed(seed)
    model = quantized(LlamaForCausalLM(LlamaConfig(**SIZES)), Fp8RowLinear)
    for layer in model.modules():
        if isinstance(layer, Fp8RowLinear):
            layer.weight_scale.data = layer.weight_scale.data.to(torch.bfloat16)
            layer.finish_loading()
    return model


def test_scales_in_bfloat16_are_converted_once():
    model = row_scaled_in_bfloat16(0)
    fuse(model)
    for layer in model.modules():
        if isinstance(layer, Fp8RowLinear):
            assert layer.scale.dtype == torch.float32
            assert layer.scale is layer.scale, "no conversion in every call"
            if "forward" in vars(layer):
                whole = layer.forward.join.whole
                assert whole.scale is whole.scale


@pytest.mark.parametrize("joined", [False, True])
def test_other_scales_in_bfloat16_replace_the_first(joined: bool):
    model, other = row_scaled_in_bfloat16(0), row_scaled_in_bfloat16(1)
    if joined:
        fuse(model)
    model.load_state_dict(other.state_dict())
    expected = logits(other)
    assert (logits(model) - expected).norm() < 0.02 * expected.norm()


def spread(model: torch.nn.Module, offloaded: str = "none") -> torch.nn.Module:
    """A hook on every module, as a `device_map` makes them. Two names of one device stand for two: the second block
    lies on both."""
    for name, module in model.named_modules():
        elsewhere = name == "lm_head" or name.startswith("model.layers.1.mlp")
        hook = AlignDevicesHook(execution_device="cpu", offload=name.startswith(offloaded))
        add_hook_to_module(module, hook)
        hook.execution_device = "cpu:0" if elsewhere else "cpu"
    return model


def hooked(model: torch.nn.Module, prefix: str = "") -> set[str]:
    return {name for name, module in model.named_modules() if hasattr(module, "_hf_hook") and name.startswith(prefix)}


def test_a_block_on_one_device_keeps_one_hook_and_is_fused(llama):
    whole, parts = copy.deepcopy(llama), spread(llama)
    before, expected = hooked(parts), logits(parts)
    assert {"model.layers.0.self_attn", "model.layers.0.mlp.up_proj"} < before
    assert unhook_blocks(parts) == len(before - hooked(parts)) > 0
    assert "model.layers.0" in hooked(parts)
    assert not hooked(parts, "model.layers.0.")
    assert {"model.layers.1.self_attn", "model.layers.1.mlp.up_proj"} < hooked(parts, "model.layers.1")
    assert not hooked(parts, "model.layers.1.self_attn.")
    assert torch.equal(logits(parts), expected)
    assert (fuse(parts).joined, fuse(whole).joined) == (3, 4)


def test_weights_that_are_brought_keep_their_hooks(llama):
    spread(llama, "model.layers.0")
    before = hooked(llama)
    unhook_blocks(llama)
    assert hooked(llama, "model.layers.0") == {name for name in before if name.startswith("model.layers.0")}


@pytest.mark.parametrize("whole", [True, False])
def test_a_model_without_hooks_is_left_alone(llama, whole):
    assert unhook_blocks(llama if whole else llama.model.layers[0]) == 0
