"""Tuning tables: lookup, writing, and that the committed ones are legal."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import quantlab_kernels
from quantlab_kernels.common import tuning
from quantlab_kernels.common.gemm import GemmProblem
from quantlab_kernels.common.gemm_configs import Config, reject
from quantlab_kernels.quantize_fp8 import configs as quantize_configs
from quantlab_kernels.quantize_fp8.op import Problem

PACKAGE = Path(quantlab_kernels.__file__).parent
ENTRIES = {"N=8,K=128": {"1": {"x": 1}, "64": {"x": 64}, "4096": {"x": 4096}}}


@pytest.mark.parametrize(("m", "expected"), [(1, 1), (7, 1), (8, 64), (9, 64), (511, 64), (600, 4096), (10**6, 4096)])
def test_m_goes_to_the_nearest_bucket_in_log_space(m: int, expected: int):
    assert tuning.nearest(ENTRIES, 8, 128, m) == {"x": expected}


def test_an_unknown_shape_has_no_entry():
    assert tuning.nearest(ENTRIES, 9, 128, 1) is None
    assert tuning.lookup("gemm_fp8_block", "no such backend", n=1, k=1, m=1) is None


def test_saving_merges_and_sorts(monkeypatch, tmp_path):
    monkeypatch.setattr(tuning, "_PACKAGE", tmp_path)
    (tmp_path / "room").mkdir()
    tuning.save("room", "GPU", {"commit": "a"}, "triton", {"N=8,K=128": {"64": {"x": 1}}})
    path = tuning.save("room", "GPU", {"commit": "b"}, "triton", {"N=8,K=128": {"1": {"x": 2}, "64": {"x": 3}}})
    tuning.save("room", "GPU", {"commit": "b"}, "sm90", {"N=8,K=128": {"1": {"y": 2}}})
    content = json.loads(path.read_text())
    assert content["triton"] == {"N=8,K=128": {"1": {"x": 2}, "64": {"x": 3}}}
    assert list(content["triton"]["N=8,K=128"]) == ["1", "64"]
    assert content["about"] == {"commit": "b"}
    assert tuning.table("room", "GPU")["sm90"]["N=8,K=128"]["1"] == {"y": 2}
    tuning.table.cache_clear()


@pytest.mark.parametrize(
    "path", sorted(PACKAGE.glob("*/tuned/*.json")), ids=lambda p: f"{p.parent.parent.name}-{p.stem}"
)
def test_committed_tables_say_where_they_come_from_and_are_legal(path: Path):
    content = json.loads(path.read_text())
    assert {"gpu", "torch", "triton", "commit", "date"} <= set(content["about"])
    for backend, shapes in content.items():
        if backend == "about":
            continue
        for shape, by_m in shapes.items():
            n, k = (int(part.partition("=")[2]) for part in shape.split(","))
            for m, config in by_m.items():
                if path.parent.parent.name == "quantize_fp8":
                    problem = Problem(backend, int(m), k)
                    assert quantize_configs.reject(quantize_configs.Config(**config), problem) is None
                elif backend == "triton":
                    assert reject(Config(**config), GemmProblem(int(m), n, k)) is None
