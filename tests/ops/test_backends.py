"""Choice of a backend: order, reasons, forcing, and that no slow way is taken silently."""

from __future__ import annotations

import importlib
import sys
import types
import warnings

import pytest

from quantlab_kernels.common.backends import Backends, FallbackWarning, Mendable


def backend(reason, able=None):
    module = types.ModuleType("stub")
    module.supports = lambda problem: reason
    if able is not None:
        module.able = lambda problem: able or None
    return module


@pytest.fixture
def room(monkeypatch):
    def build(**modules):
        for name, module in modules.items():
            monkeypatch.setitem(sys.modules, f"quantlab_kernels.stub_room.{name}", module)
        monkeypatch.setitem(sys.modules, "quantlab_kernels.stub_room", types.ModuleType("stub_room"))
        return Backends("stub_room", tuple(modules), last_resort="slow")

    return build


def test_the_first_that_supports_wins_silently(room):
    best, second = backend("needs K % 128"), backend(None)
    backends = room(best=best, second=second, slow=backend(None))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backends.select("p") is second
    verdicts = backends.explain("p")
    assert [(v.backend, v.reason, v.chosen) for v in verdicts] == [
        ("best", "needs K % 128", False), ("second", None, True), ("slow", None, False),
    ]  # fmt: skip


def test_the_last_resort_warns_once_per_reason(room):
    backends = room(best=backend("needs K % 128"), slow=backend(None))
    with pytest.warns(FallbackWarning, match="stub_room runs on its slow backend, because best: needs K % 128"):
        backends.select("p")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backends.select("p")
        backends.select("another problem, the same reason")


def test_falling_past_something_mendable_warns(room):
    backends = room(best=backend(Mendable("x is not installed")), second=backend(None))
    with pytest.warns(FallbackWarning, match="best: x is not installed"):
        backends.select("p")


def test_a_backend_that_does_not_import_says_what_it_lacks(monkeypatch):
    backends = Backends("quantize_fp8", ("triton", "eager"), last_resort="eager")
    monkeypatch.delitem(sys.modules, "quantlab_kernels.quantize_fp8.triton", raising=False)
    monkeypatch.setitem(sys.modules, "triton", None)
    assert "triton is not installed" in backends.reason("triton", None)


def test_forcing_by_name(room, monkeypatch):
    slower = backend("best is faster", able="")
    backends = room(best=backend(None), slower=slower, never=backend("needs sm_90"), slow=backend(None))
    monkeypatch.setenv("QUANTLAB_STUB_ROOM_BACKEND", "slower")
    assert backends.select("p") is slower
    assert [v.backend for v in backends.explain("p") if v.chosen] == ["slower"]
    monkeypatch.setenv("QUANTLAB_STUB_ROOM_BACKEND", "never")
    with pytest.raises(RuntimeError, match="QUANTLAB_STUB_ROOM_BACKEND=never cannot run p: needs sm_90"):
        backends.select("p")
    monkeypatch.setenv("QUANTLAB_STUB_ROOM_BACKEND", "nonsense")
    with pytest.raises(RuntimeError, match="BACKEND=nonsense cannot run p: no backend is called so, there are best, "):
        backends.select("p")
    assert not any(v.chosen for v in backends.explain("p"))
    assert backends.explain("p")[-1].reason == "no backend is called so, there are best, slower, never, slow"


def test_when_none_can_every_reason_is_given(room):
    backends = room(best=backend("needs sm_90"), slow=backend("needs a GPU"))
    with pytest.raises(RuntimeError, match=r"no backend runs p\. best: needs sm_90; slow: needs a GPU"):
        backends.select("p")


def test_a_server_of_many_lengths_remembers_a_bounded_number_of_problems(room):
    backends = room(best=backend(None))
    for problem in range(10_000):
        backends.select(problem)
    assert 0 < len(backends._chosen) <= 4096


ROOMS = (
    "attention_decode", "bmm_fp8", "gemm_fp8_block", "gemm_fp8_grouped", "gemm_fp8_row", "gemm_int4", "gemm_int4_fp8",
    "gemm_int4_grouped", "mla_decode", "quantize_fp8", "rmsnorm_quantize", "rope", "swiglu_quantize",
)  # fmt: skip


@pytest.mark.parametrize("name", ROOMS)
def test_configurations_of_a_bounded_number_of_problems_are_remembered(name):
    backends = importlib.import_module(f"quantlab_kernels.{name}.op").BACKENDS
    for module in map(backends.module, backends.names):
        for function in vars(module).values():
            keyed = callable(function) and "problem" in getattr(function, "__annotations__", {})
            if keyed and function.__name__ != "kernel" and hasattr(function, "cache_parameters"):
                assert function.cache_parameters()["maxsize"] is not None, f"{module.__name__}.{function.__name__}"
