import pytest
import torch
from torch import nn
from transformers.activations import SiLUActivation
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from quantlab.formulas import alike, is_silu, norm_offset


class GatedNorm(LlamaRMSNorm):
    def forward(self, x, gate=None):
        return super().forward(x)


def with_weights(norm, dtype=torch.float32):
    nn.init.uniform_(norm.weight, 0.5, 2.0)
    return norm.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms(dtype):
    assert norm_offset(with_weights(LlamaRMSNorm(64), dtype)) == 0
    assert norm_offset(with_weights(GemmaRMSNorm(64), dtype)) == 1
    assert norm_offset(with_weights(nn.LayerNorm(64, bias=False), dtype)) is None


def test_norms_that_are_not_known():
    assert norm_offset(GatedNorm(64)) is None
    assert norm_offset(nn.LayerNorm(64)) is None
    assert norm_offset(nn.Linear(8, 8)) is None
    assert norm_offset(LlamaRMSNorm(64).to("meta")) is None


def test_alike():
    x = torch.randn(4, 8)
    assert alike(x, x * 1.01, 0.02)
    assert not alike(x, x * 1.03, 0.02)
    assert not alike(x, x[:2], 1.0)
    assert not alike(x, x * torch.nan, 1.0)


def test_silu():
    assert is_silu(nn.SiLU())
    assert is_silu(SiLUActivation())
    assert not is_silu(nn.GELU())
