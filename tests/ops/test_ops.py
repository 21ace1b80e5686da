import pytest
import torch

from quantlab_kernels import gemm_fp8_block, kv_append, quantize_fp8_block, quantize_fp8_group
from quantlab_kernels.common.kv import PackedKV
from quantlab_kernels.common.ops import on_one_device


class OnAnotherDevice(torch.Tensor):
    def get_device(self):
        return 1


def test_tensors_of_one_launch_are_on_one_device():
    launch = on_one_device("op", lambda *args: len(args))
    here, there = torch.zeros(2), torch.zeros(2).as_subclass(OnAnotherDevice)
    assert launch(here, here, None, 1.0) == 4
    assert launch(there, there) == 2
    assert launch(here, there[:0]) == 2
    with pytest.raises(RuntimeError, match="op: a tensor is on cpu and another on cpu; needs all on one device"):
        launch(here, None, there)


@pytest.mark.gpu(sm=80)
def test_a_tensor_that_stayed_on_the_cpu_is_refused():
    a, w = torch.randn(4, 256, device="cuda", dtype=torch.bfloat16), torch.randn(256, 256)
    with pytest.raises(RuntimeError, match="gemm_fp8_block: a tensor is on cuda:0 and another on cpu"):
        gemm_fp8_block(*quantize_fp8_group(a), *quantize_fp8_block(w))
    cache = PackedKV.empty("fp8", 1, 2, 16, 64, device="cuda")
    rows = torch.randn(1, 2, 1, 64, device="cuda", dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="kv_append: a tensor is on cuda:0 and another on cpu"):
        kv_append(rows, rows, cache, torch.ones(1, dtype=torch.int32))
