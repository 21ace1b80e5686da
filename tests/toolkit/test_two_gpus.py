"""Models over two GPUs, and kernels on one that is not torch's current device: `make gpus`."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch

import quantlab
from quantlab.pipeline import quantize

pytestmark = pytest.mark.gpus(2)
FIRST, SECOND = torch.device("cuda", 0), torch.device("cuda", 1)
OVER_BOTH = {
    "model.embed_tokens": 0, "model.layers.0": 0, "model.layers.1": 1, "model.norm": 1, "model.rotary_emb": 1,
    "lm_head": 1,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _the_first_is_current():
    torch.cuda.set_device(FIRST)
    yield
    assert torch.cuda.current_device() == 0


def rooms() -> dict[str, Any]:
    """Those that call ops. The others launch kernels themselves, on the current device."""
    found = importlib.import_module("small_calls").ROOMS
    ops = ("latents", "absorbed", "prefill", "decode", "route")
    return {name: room for name, room in found.items() if name.startswith(ops) or name.endswith("by_itself")}


@pytest.mark.parametrize("room", rooms())
def test_kernels_on_the_second(room: str):
    """Small calls, twice each."""
    for call in rooms()[room]():
        inputs, exact = [x.to(SECOND) for x in call.inputs], call.exact.float()
        for _ in range(2):
            found = call.run(*inputs)
            assert found.device == SECOND
            assert (found.float().cpu() - exact).norm() < 0.03 * exact.norm(), call.label


@pytest.mark.parametrize(
    ("name", "scheme", "kv"),
    [
        ("llama", "fp8-block", None),
        ("llama", "fp8-dynamic", "fp8"),
        ("llama", "int4-fp8", "int4"),
        ("llama", "int4", "int8"),
        ("qwen3_moe", "fp8-block", None),
        ("qwen3_moe", "int4-fp8", "fp8"),
        ("deepseek_v3", "fp8-block", "fp8"),
    ],
)
@pytest.mark.parametrize("device_map", [OVER_BOTH, "cuda:1"], ids=["over both", "on the second"])
def test_models_write_what_they_write_on_one(quantized, name: str, scheme: str, kv: str | None, device_map: Any):
    source = quantized(name, scheme)
    ids = source.inputs()["input_ids"].to(FIRST)
    given = {"max_new_tokens": 8, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    found = []
    for devices in ("cuda:0", device_map):
        model = quantlab.load(source.folder, dtype=torch.bfloat16, kv=kv, device_map=devices)
        found.append(model.generate(ids, **given))
    used = {parameter.device for parameter in model.parameters()}
    assert used == ({SECOND} if device_map == "cuda:1" else {FIRST, SECOND})
    for expected, logits in zip(found[0].logits, found[1].logits, strict=True):
        assert torch.equal(expected.cpu(), logits.cpu())
    assert torch.equal(found[0].sequences.cpu(), found[1].sequences.cpu())


@pytest.mark.parametrize("scheme", ["fp8-block", "int4"])
def test_the_second_quantizes_as_the_first(tiny, scheme: str, tmp_path: Path):
    files = []
    for device in ("cuda:0", "cuda:1"):
        folder = tmp_path / device.replace(":", "")
        quantize(tiny("llama").folder, scheme, folder, device=device, workers=1)
        files.append({path.name: path.read_bytes() for path in folder.glob("*.safetensors")})
    assert files[0] == files[1] != {}
