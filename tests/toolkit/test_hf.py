"""Loading: the import, what is ours and what is handed over, and the explicit `load` and `pipeline`."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import quantlab
from quantlab import hf
from quantlab.errors import UsageError, VerificationError
from quantlab.linear import Fp8Linear, QuantizedLinear

ROOT = Path(__file__).parents[2]


def python(code: str, *arguments: Any) -> str:
    """Run code in a fresh interpreter that sees no GPU, and return what it printed."""
    paths = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "calib"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-W", "ignore", "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def count(model: Any) -> int:
    return sum(isinstance(m, Fp8Linear) for m in model.modules())


@pytest.fixture(autouse=True)
def ours():
    hf.enable()


def test_the_import_is_light():
    code = "import quantlab, sys; print({'torch', 'transformers', 'numpy'} & set(sys.modules))"
    assert python(code) == "set()"


LOAD = """
import sys
{before}
from transformers import AutoModelForCausalLM
{after}
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
print(type(model.model.layers[0].self_attn.q_proj).__name__, model.model.layers[0].self_attn.q_proj.weight.dtype)
"""


@pytest.mark.parametrize(
    ("before", "after", "found"),
    [
        ("import quantlab", "", "Fp8BlockLinear torch.float8_e4m3fn"),
        ("", "import quantlab", "Fp8BlockLinear torch.float8_e4m3fn"),
        ("", "", "Linear torch.bfloat16"),
    ],
    ids=["import before", "import after", "no import"],
)
def test_the_import_decides_who_runs_the_checkpoint(quantized, before: str, after: str, found: str):
    assert python(LOAD.format(before=before, after=after), quantized("llama", "fp8-block").folder) == found


def test_fp8_dynamic_needs_no_compressed_tensors(quantized):
    """The package is there for the tests; a finder hides it."""
    before = "import sys; sys.modules['compressed_tensors'] = None; import quantlab"
    assert python(LOAD.format(before=before, after=""), quantized("llama", "fp8-dynamic").folder) == (
        "Fp8RowLinear torch.float8_e4m3fn"
    )


def test_a_transformers_that_lacks_what_we_need_warns_and_works(quantized):
    before = "sys.modules['quantlab.quantizers'] = None; import quantlab, warnings; warnings.simplefilter('error')"
    after = """
try:
    from transformers.quantizers import auto
except quantlab.hf.IntegrationWarning as warning:
    assert 'is not supported' in str(warning) and 'its own path' in str(warning)
print(quantlab.hf.status().partition(' is not')[0].partition(' ')[0])
warnings.simplefilter('ignore')
"""
    printed = python(LOAD.format(before=before, after=after), quantized("llama", "fp8-block").folder)
    assert printed.splitlines() == ["transformers", "Linear torch.bfloat16"]


def test_functions_keep_their_names_beside_modules_of_the_same_name():
    import quantlab.pipeline
    from quantlab.pipeline import quantize

    assert quantlab.pipeline is hf.pipeline
    assert quantlab.quantize is quantize
    with pytest.raises(AttributeError, match="no attribute 'quantise'"):
        quantlab.quantise  # noqa: B018


def test_disable_and_enable(quantized):
    source = quantized("llama", "fp8-block")
    hf.disable()
    assert "off" in hf.status()
    assert count(source.model_class.from_pretrained(source.folder)) == 0
    hf.enable()
    assert "run on our layers" in hf.status()
    assert count(source.model_class.from_pretrained(source.folder)) == 14


@pytest.mark.parametrize("device_map", [None, "cpu", "auto", {"": "cpu"}], ids=str)
def test_load(quantized, device_map: Any):
    source = quantized("llama", "fp8-block")
    model = quantlab.load(source.folder, device_map=device_map, warmup=True)
    assert count(model) == 14
    assert not model.training
    assert all(p.device.type != "meta" for p in model.parameters())


def test_load_takes_the_older_name_of_dtype_and_says_what_it_decides_itself(quantized):
    folder = quantized("llama", "fp8-block").folder
    assert quantlab.load(folder, torch_dtype=torch.float32, local_files_only=True).dtype == torch.float32
    assert quantlab.load(folder, torch_dtype="auto", output_loading_info=False).dtype == torch.bfloat16
    with pytest.raises(UsageError, match=r"dtype = torch.float16 and torch_dtype = torch.float32 are both given"):
        quantlab.load(folder, dtype=torch.float16, torch_dtype=torch.float32)
    with pytest.raises(UsageError, match="output_loading_info: `load` checks it"):
        quantlab.load(folder, output_loading_info=True)
    with pytest.raises(UsageError, match="me/model: local_files_only needs a folder here; set HF_HUB_OFFLINE=1"):
        quantlab.load("me/model", local_files_only=True)


@pytest.mark.parametrize("kv", ["none", "int8"])
@pytest.mark.parametrize(
    ("name", "scheme"), [("llama", "fp8-block"), ("llama", "int4"), ("qwen3", "int4-fp8"), ("qwen3_moe", "fp8-dynamic")]
)
def test_autocast_to_the_other_16_bits(quantized, name: str, scheme: str, kv: str):
    """torch joins two 16-bit dtypes under it in no product and no cat, so layers answer in the one that it asks for."""
    source = quantized(name, scheme)
    model, ids = quantlab.load(source.folder, kv=kv), source.inputs()["input_ids"]
    with torch.no_grad():
        expected = model(ids).logits.float()
        for dtype in (torch.float16, torch.bfloat16):
            with torch.autocast("cpu", dtype):
                found = model(ids).logits
                model.generate(ids, max_new_tokens=3, do_sample=False, eos_token_id=None)
            assert found.dtype == dtype
            assert (found.float() - expected).norm() < 0.1 * expected.norm()
    with torch.autocast("cpu", torch.float16):
        layer = next(module for module in model.modules() if isinstance(module, QuantizedLinear))
        assert layer(torch.ones(1, layer.in_features, dtype=torch.float32)).dtype == torch.float16


def test_load_takes_models_that_are_not_quantized(tiny):
    assert count(quantlab.load(tiny("llama").folder)) == 0


def test_load_refuses_a_missing_parameter(quantized, edited, tmp_path: Path):
    folder = edited(quantized("llama", "fp8-block"), tmp_path)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        VerificationError, match=r"1 parameters are not in the checkpoint.*: model\.norm\.weight; check"
    ):
        quantlab.load(folder)


def test_load_refuses_another_models_config(tiny, tmp_path: Path):
    folder = tmp_path / "model"
    shutil.copytree(tiny("llama").folder, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 256}))
    message = (
        r"2 parameters have another shape in the checkpoint: lm_head.weight \[128, 128\], by config.json \[256, 128\]"
    )
    with pytest.raises(VerificationError, match=message):
        hf.load(folder)


def test_load_refuses_a_scale_without_its_weight(quantized, edited, tmp_path: Path):
    folder = edited(quantized("llama", "fp8-block"), tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.extra.weight_scale_inv"] = torch.ones(1, 1)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(VerificationError, match=r"1 scales have no quantized layer.*mlp\.extra\.weight_scale_inv"):
        quantlab.load(folder)


def test_load_refuses_codes_without_their_scale(quantized, edited, tmp_path: Path):
    folder = edited(quantized("llama", "fp8-block"), tmp_path)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.0.self_attn.k_proj.weight_scale_inv"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(VerificationError, match=r"k_proj\.weight: holds codes, but there is no scale of it"):
        quantlab.load(folder)


def test_load_refuses_what_transformers_would_run(quantized, edited, tmp_path: Path):
    folder = edited(quantized("llama", "fp8-block"), tmp_path, activation_scheme="static")
    with pytest.raises(VerificationError, match="is not for our layers"):
        quantlab.load(folder)


def test_load_refuses_weights_that_are_not_quantized_after_all(quantized, tiny, tmp_path: Path):
    folder = tmp_path / "model"
    shutil.copytree(tiny("llama").folder, folder)
    shutil.copy(quantized("llama", "fp8-block").folder / "config.json", folder)
    with pytest.raises(VerificationError, match="says that it is quantized, but no weight of the model is"):
        quantlab.load(folder)


def test_load_without_a_checkpoint(tmp_path: Path):
    with pytest.raises(UsageError, match=r"/none: no such folder"):
        quantlab.load(tmp_path / "none")
    with pytest.raises(UsageError, match=r"no config\.json there"):
        quantlab.load(tmp_path)
    with pytest.raises(
        UsageError, match=r"someone/model: no such folder, not in the local hub cache, and the hub is out"
    ):
        quantlab.load("someone/model")


def test_load_of_an_unknown_class(quantized, edited, tmp_path: Path):
    folder = edited(quantized("llama", "fp8-block"), tmp_path)
    config = json.loads((folder / "config.json").read_text()) | {"architectures": ["LamaForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match="the class LamaForCausalLM, which transformers does not have"):
        quantlab.load(folder)


@pytest.mark.parametrize(("name", "scheme"), [("llama", "fp8-dynamic"), ("qwen3_moe", "fp8-block")])
def test_compiled_decoding_with_a_static_cache(quantized, name: str, scheme: str):
    from transformers import StaticCache

    torch._dynamo.reset()
    source = quantized(name, scheme)
    model, ids = quantlab.load(source.folder), source.inputs()["input_ids"]
    with torch.no_grad():
        expected = model(ids).logits
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        cache = StaticCache(config=model.config, max_cache_len=16)
        first = compiled(ids[:, :7], past_key_values=cache, cache_position=torch.arange(7)).logits
        last = compiled(ids[:, 7:], past_key_values=cache, cache_position=torch.arange(7, 8)).logits
    found = torch.cat([first, last], 1)
    assert ((found - expected).norm() / expected.norm()).item() < 0.03


def test_generate(quantized):
    source = quantized("qwen3", "fp8-block")
    model, ids = quantlab.load(source.folder), source.inputs()["input_ids"]
    plain = model.generate(ids, max_new_tokens=4, do_sample=False)
    assert plain.shape[1] <= 12
    assert torch.equal(plain, model.generate(ids, max_new_tokens=4, do_sample=False, cache_implementation="static"))


@pytest.mark.parametrize("name", ["llama", "deepseek_v3"])
def test_the_body_of_a_model_loads_alone(quantized, name: str):
    source = quantized(name, "fp8-block")
    body = transformers.AutoModel.from_pretrained(source.folder)
    whole, ids = quantlab.load(source.folder), source.inputs()["input_ids"]
    with torch.no_grad():
        assert torch.equal(body(ids).last_hidden_state, whole.model(ids).last_hidden_state)


def test_pipeline(quantized, edited, tmp_path: Path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, TextGenerationPipeline

    folder = edited(quantized("llama", "fp8-block"), tmp_path)
    for path in folder.glob("tokenizer*"):  # which another test gave to the model
        path.unlink()
    with pytest.raises(UsageError, match=r"tokenizer has no vocabulary|no tokenizer that transformers can read"):
        quantlab.pipeline("text-generation", folder)
    with pytest.raises(UsageError, match=r"/nothing: no such folder"):
        quantlab.pipeline("text-generation", tmp_path / "nothing")
    words = {f"w{i}": i for i in range(127)} | {"<unk>": 127}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="w0").save_pretrained(folder)
    texts = []
    for make in (quantlab.pipeline, transformers.pipeline):
        generate = make("text-generation", model=str(folder))
        assert isinstance(generate, TextGenerationPipeline)
        assert count(generate.model) == 14
        (out,) = generate("w3 w4 w5", max_new_tokens=2, do_sample=False)
        texts.append(out["generated_text"])
    assert texts[0] == texts[1]
    assert texts[0].startswith("w3 w4 w5w")


@pytest.mark.gpu(sm=80)
@pytest.mark.parametrize("scheme", ["fp8-block", "fp8-dynamic"])
@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "deepseek_v3", "bert"])
def test_gpu_loads_and_agrees_with_cpu(quantized, name: str, scheme: str):
    source = quantized(name, scheme)
    on_gpu = quantlab.load(source.folder, dtype=torch.float32, device_map="cuda", warmup=True)
    on_cpu = quantlab.load(source.folder, dtype=torch.float32)
    assert {p.device.type for p in on_gpu.parameters()} == {"cuda"}
    layers, seen = dict(on_gpu.named_modules()), {}
    for path, layer in on_cpu.named_modules():
        if isinstance(layer, Fp8Linear):
            layer.register_forward_hook(lambda _, args, out, path=path: seen.update({path: (args[0], out)}))
    with torch.no_grad():
        expected = on_cpu(**source.inputs()).logits
        found = on_gpu(**{k: v.to("cuda") for k, v in source.inputs().items()}).logits.cpu()
        for path, (x, out) in seen.items():
            # Hopper's FP8 tensor core truncates inside each 128 products: 1.3e-4 measured here on an H200
            assert ((layers[path](x.to("cuda")).cpu() - out).norm() / out.norm()).item() < 5e-4, path
    # Layers agree to the last bits, which now and then moves an input of the next one by a code, 2^-4; through two
    # blocks of random weights that becomes a few percent.
    assert ((found - expected).norm() / expected.norm()).item() < 0.1


@pytest.mark.gpu(sm=80)
@pytest.mark.parametrize("scheme", ["fp8-block", "fp8-dynamic"])
@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
@pytest.mark.filterwarnings("ignore::UserWarning:torch[.]_inductor", "ignore:The CUDA Graph is empty")
def test_gpu_generates_with_a_static_cache(quantized, name: str, scheme: str):
    """`generate` compiles the decoding step, with CUDA graphs where it can."""
    source = quantized(name, scheme)
    model = quantlab.load(source.folder, device_map="cuda")
    ids = source.inputs()["input_ids"].to("cuda")
    options = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    plain = model.generate(ids, **options)
    static = model.generate(ids, cache_implementation="static", **options)
    assert torch.equal(plain.sequences[:, :9], static.sequences[:, :9])
    # The second token comes from the compiled step; what inductor fuses it does not round to 16 bits in between.
    assert ((plain.logits[1] - static.logits[1]).norm() / plain.logits[1].norm()).item() < 0.1
