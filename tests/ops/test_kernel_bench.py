"""Benchmarks run dry on a CPU, refuse where they must, and say what they measured."""

from __future__ import annotations

import time

import pytest
import torch

from quantlab_kernels import bench, tune
from quantlab_kernels.common.hardware import RATES, Gpu
from quantlab_kernels.common.timing import measure, rotations


@pytest.mark.parametrize("room", bench.ROOMS)
def test_dry_run(room: str, capsys):
    assert bench.main([room, "--dry-run"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(bench.cases(room))


def test_a_dry_run_lists_what_would_be_timed(capsys):
    assert bench.main(["moe_dispatch", "--dry-run", "--case", "16 qwen"]) == 0
    assert capsys.readouterr().out == "16 qwen3-30b\n"
    assert bench.main(["moe_dispatch", "--dry-run", "--case", "17 qwen"]) == 1
    assert "no case contains '17 qwen'" in capsys.readouterr().err


@pytest.mark.parametrize("room", bench.ROOMS)
def test_cases_have_a_roofline(room: str):
    for case in bench.cases(room):
        assert case.bytes > 0
        assert 0 < case.roofline_us(RATES["NVIDIA H200"]) < 1e5
        assert case.roofline_us(RATES["NVIDIA A100-SXM4-80GB"]) > 0


def test_refusals():
    with pytest.raises(ValueError, match="no room 'nonsense' with a benchmark; there are attention_decode"):
        bench.cases("nonsense")
    with pytest.raises(ValueError, match="no case contains 'nonsense'"):
        bench.cases("quantize_fp8", "nonsense")
    with pytest.raises(ValueError, match="no room 'nonsense' with a tuning table"):
        tune.tune("nonsense")


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_no_number_without_a_gpu(capsys):
    assert bench.main(["quantize_fp8"]) == 1
    assert "--dry-run works without one" in capsys.readouterr().err
    assert tune.main(["quantize_fp8"]) == 1


def test_no_number_while_the_tests_are_red(monkeypatch):
    class Red:
        returncode, stdout = 1, "1 failed"

    monkeypatch.setattr(bench.subprocess, "run", lambda *_, **__: Red())
    with pytest.raises(RuntimeError, match="tests of quantize_fp8 fail, no number is printed:\n1 failed"):
        bench.check("quantize_fp8")


@pytest.mark.gpu
def test_sustained_times_are_taken_after_so_long():
    x = torch.randn(1 << 24, device="cuda")
    begun = time.perf_counter()
    (timing,) = measure({"copy": [x.clone, x.clone]}, rounds=5, sustained=0.3).values()
    assert time.perf_counter() - begun > 0.3
    assert timing.graph
    assert 20 < timing.median_us < 2000  # 134 MB, at 4 TB/s 31 us


def test_a_row_as_text():
    row = bench.Row("a", "triton", 10.0, 9.0, 11.0, 800.0, 100.0, 0.5, {"quantlab": 10.0, "cuBLAS": 15.0})
    assert row.ratios() == {"cuBLAS": 1.5}
    assert "50% of roof" in bench.line(row)
    assert "cuBLAS 1.50x" in bench.line(row)


def test_rows_together_have_a_geometric_mean_over_the_cases_of_each_variant():
    times = ({"quantlab": 10.0, "cuBLAS": 20.0}, {"quantlab": 10.0, "cuBLAS": 5.0, "DeepGEMM": 30.0})
    rows = [bench.Row("a", "triton", 10.0, 9.0, 11.0, 800.0, 100.0, None, each) for each in times]
    assert bench.means(rows) == pytest.approx({"cuBLAS": 1.0, "DeepGEMM": 3.0})


def test_rotation_covers_more_than_the_l2():
    assert rotations(10, 50 * 2**20) == 64
    assert rotations(2**40, 50 * 2**20) == 2
    assert rotations(30 * 2**20, 50 * 2**20) == 5


def test_gpu_file_names_have_no_spaces():
    assert Gpu("NVIDIA H200", 90, 132, 1, 1).slug == "NVIDIA_H200"
    assert Gpu("Some GPU", 90, 132, 1, 1).rates is None
