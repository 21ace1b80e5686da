"""What was measured on keys, kept beside a checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import quantlab
from quantlab import cache
from quantlab.errors import UsageError
from quantlab_calib import rope


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=64, max_position_embeddings=256,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_what_was_kept_is_what_is_used(folder: Path, monkeypatch: pytest.MonkeyPatch):
    model = quantlab.load(folder, kv="int8", dtype=torch.float32)
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    path = cache.save_keys(model, folder)
    assert path == folder / "quantlab" / "key_statistics.safetensors"
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    assert {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()} == before

    def refuse(*_):
        raise AssertionError("measured again")

    monkeypatch.setattr(rope, "key_statistics", refuse)
    again = quantlab.load(folder, kv="int4", dtype=torch.float32)
    kept, measured = cache.prepared(again).keys, cache.prepared(model).keys
    assert kept.keys() == measured.keys()
    for layer, pair in measured.items():
        for one, other in zip(pair, kept[layer], strict=True):
            assert torch.equal(one.float(), other)
    tokens = torch.tensor([[3, 9, 27, 17]])
    quantlab_int8 = quantlab.load(folder, kv="int8", dtype=torch.float32)
    given = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    assert torch.equal(quantlab_int8.generate(tokens, **given), model.generate(tokens, **given))


def test_errors_say_what_to_do(folder: Path, tmp_path: Path):
    plain = quantlab.load(folder, dtype=torch.float32)
    with pytest.raises(UsageError, match="nothing was measured on this model's keys; load it with kv"):
        cache.save_keys(plain, folder)
    model = quantlab.load(folder, kv="int8", dtype=torch.float32)
    with pytest.raises(UsageError, match=r"no config\.json there"):
        cache.save_keys(model, tmp_path)
    path = cache.save_keys(model, folder)
    whole = path.read_bytes()
    path.write_bytes(whole[:-40])
    with pytest.raises(UsageError, match=r"key_statistics\.safetensors: cannot be read .*; remove it"):
        quantlab.load(folder, kv="int8")
    path.write_bytes(whole)
    keys = cache.load_keys(folder)
    with pytest.raises(UsageError, match="keys of layer 7 were measured, which LlamaForCausalLM does not have"):
        cache.use(model, "int8", keys={7: keys[0]})
