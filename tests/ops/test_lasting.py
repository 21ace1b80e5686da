"""Tensors that outlive their call are made on another thread, whatever pool the present one allocates from."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from quantlab_kernels.common import launches
from quantlab_kernels.common.lasting import lasting, lasting_zeros


def test_made_on_another_thread():
    made_on = []

    def make() -> torch.Tensor:
        made_on.append(threading.get_ident())
        return torch.arange(3)

    with torch.inference_mode():
        found = lasting(make)
    assert found.tolist() == [0, 1, 2]
    assert made_on[0] != threading.get_ident()
    assert not found.is_inference()


def test_errors_arrive():
    def make() -> torch.Tensor:
        raise RuntimeError("no memory")

    with pytest.raises(RuntimeError, match="no memory"):
        lasting(make)


def test_threads_that_capture_together_take_flags_of_their_own(monkeypatch):
    """Each looks at the pool before another has taken its part, unless it has to wait."""

    class Slow(dict):
        def get(self, key):
            found = super().get(key)
            time.sleep(0.02)
            return found

    monkeypatch.setattr(launches, "_CAPTURE_FLAGS", Slow({0: torch.zeros(64, dtype=torch.int32)}))
    monkeypatch.setattr("torch.cuda.is_current_stream_capturing", lambda: True)
    with ThreadPoolExecutor(4) as pool:
        taken = list(pool.map(lambda _: launches.handover_flags(0, 4), range(4)))
    assert len({flags.data_ptr() for flags in taken}) == 4


@pytest.mark.gpu(sm=80)
def test_not_in_the_pool_of_this_thread():
    device = torch.cuda.current_device()
    torch.empty(1, device="cuda")
    pool, stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch._C._cuda_beginAllocateCurrentThreadToPool(device, pool)
        try:
            zeros, own = lasting_zeros(64, device), torch.empty(64, device="cuda")
        finally:
            torch._C._cuda_endAllocateToPool(device, pool)
    within = {s["address"]: s["total_size"] for s in torch.cuda.memory_snapshot() if s["segment_pool_id"] == pool}

    def inside(tensor: torch.Tensor) -> bool:
        return any(at <= tensor.data_ptr() < at + size for at, size in within.items())

    assert inside(own)
    assert not inside(zeros)
    assert not zeros.any()
    torch._C._cuda_releasePool(device, pool)
