"""Streaming: the right bytes, the same bytes however the work is cut, bounded memory, and NaN refused."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from quantlab import jobs, stream
from quantlab.checkpoint import MANIFEST, SUMMARY
from quantlab.errors import PreflightError, UsageError
from quantlab.jobs import nearest
from quantlab.pipeline import quantize
from quantlab.scheme import SCHEMES, Recipe
from quantlab_kernels import qtensor
from quantlab_kernels.packing import unpack_int4

Make = Callable[..., Path]
ROOT = Path(__file__).parents[2]


def contents(folder: Path) -> dict[str, str]:
    """Hashes of all files but those that tell the time a run took."""
    files = (path for path in folder.rglob("*") if path.is_file())
    named = {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    return {name: value for name, value in named.items() if name not in (MANIFEST, SUMMARY)}


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_tensor_is_what_the_definition_says(scheme: str, raw_checkpoint: Make, tmp_path: Path) -> None:
    source = raw_checkpoint(shards=2)
    summary = quantize(source, scheme, tmp_path / "out", device="cpu")
    before, after = tensors_of(source), tensors_of(tmp_path / "out")
    suffix = "_scale_inv" if scheme == "fp8-block" else "_scale"
    quantized = [name for name in before if name + suffix in after]
    assert len(quantized) == 14
    packed = SCHEMES[scheme].layout == "pack-quantized"
    for name in quantized:
        wanted = nearest(before[name], SCHEMES[scheme].weight)
        if packed:
            assert after.pop(name + "_shape").tolist() == list(before[name].shape)
            after[name] = unpack_int4(after.pop(name + "_packed"), before[name].shape[1])
        assert torch.equal(after[name].view(torch.uint8), wanted.codes.view(torch.uint8)), name
        assert torch.equal(after[name + suffix].float(), wanted.scale), name
        assert after[name + suffix].dtype == (torch.float32 if scheme == "fp8-block" else torch.bfloat16)
    for name in before.keys() - set(quantized):
        assert torch.equal(before[name].view(torch.int16), after[name].view(torch.int16)), name
    assert len(after) == len(before) + 14
    stored = tensors_of(tmp_path / "out").values()
    assert summary.bytes_after == sum(tensor.nbytes for tensor in stored)
    assert summary.bytes_before == sum(tensor.nbytes for tensor in before.values())


def test_scales_are_what_readers_keep_exactly(raw_checkpoint: Make, tmp_path: Path) -> None:
    """Powers of two survive vLLM's requantization, bfloat16 values a reader that casts scales to the model's dtype."""
    source = raw_checkpoint()
    quantize(source, "fp8-block", tmp_path / "block", device="cpu")
    quantize(source, "fp8-dynamic", tmp_path / "row", device="cpu")
    for name, scale in tensors_of(tmp_path / "block").items():
        if name.endswith("_scale_inv"):
            assert (torch.frexp(scale)[0] == 0.5).all()
    for name, scale in tensors_of(tmp_path / "row").items():
        if name.endswith("_scale"):
            assert scale.dtype == torch.bfloat16


@pytest.mark.parametrize("scheme", SCHEMES)
def test_bytes_depend_on_neither_workers_nor_pieces(
    scheme: str, raw_checkpoint: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = raw_checkpoint(shards=3)
    quantize(source, scheme, tmp_path / "1", device="cpu", workers=1)
    wanted = contents(tmp_path / "1")
    assert "model.safetensors" in wanted
    for workers, elements, copied in ((1, 1, 64), (2, 1 << 15, 1 << 12), (7, 1 << 14, 1000)):
        monkeypatch.setitem(jobs.PIECE_ELEMENTS, "cpu", elements)
        monkeypatch.setattr(jobs, "COPY_BYTES", copied // 4 * 4)
        out = tmp_path / f"{workers}-{elements}"
        quantize(source, scheme, out, device="cpu", workers=workers)
        assert contents(out) == wanted


@pytest.mark.gpu(sm=80)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_gpu_writes_the_same_bytes(scheme: str, raw_checkpoint: Make, tmp_path: Path) -> None:
    source = raw_checkpoint(shards=2)
    quantize(source, scheme, tmp_path / "cpu", device="cpu")
    quantize(source, scheme, tmp_path / "gpu", device="cuda")
    assert contents(tmp_path / "gpu") == contents(tmp_path / "cpu")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_source_dtypes(dtype: torch.dtype, raw_checkpoint: Make, tmp_path: Path) -> None:
    weight = torch.randn(256, 256).to(dtype)
    norm = torch.ones(256, dtype=dtype)
    source = raw_checkpoint({"l.up_proj.weight": weight, "norm.weight": norm})
    quantize(source, "fp8-block", tmp_path / "out", device="cpu")
    after = tensors_of(tmp_path / "out")
    wanted = qtensor.quantize(weight, SCHEMES["fp8-block"].weight)
    assert torch.equal(after["l.up_proj.weight"].float(), wanted.codes.float())
    assert after["norm.weight"].dtype == dtype


def test_empty_and_odd_tensors_are_copied(raw_checkpoint: Make, tmp_path: Path) -> None:
    tensors = {
        "l.up_proj.weight": torch.randn(128, 128).bfloat16(), "empty": torch.zeros(0, 4), "scalar": torch.tensor(2),
        "flags": torch.tensor([True, False, True]), "mask": torch.full((3,), -float("inf")),
    }  # fmt: skip
    quantize(raw_checkpoint(tensors), "fp8-block", tmp_path / "out", device="cpu")
    after = tensors_of(tmp_path / "out")
    assert all(torch.equal(after[name], tensors[name]) for name in ("empty", "scalar", "flags", "mask"))


def test_output_in_several_shards(raw_checkpoint: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "SHARD_BYTES", 400_000)
    source = raw_checkpoint()
    summary = quantize(source, "fp8-block", tmp_path / "out", device="cpu")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    shards = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 2
    assert shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    assert index["metadata"]["total_size"] == summary.bytes_after
    for shard in shards:
        with safe_open(tmp_path / "out" / shard, "pt") as file:
            assert file.metadata() == {"format": "pt"}
            assert all(index["weight_map"][name] == shard for name in file.keys())  # noqa: SIM118
    for name, shard in index["weight_map"].items():
        if name.endswith("_scale_inv"):
            assert index["weight_map"][name.removesuffix("_scale_inv")] == shard, "scales lie beside their weights"


@pytest.mark.parametrize("workers", [1, 4])
@pytest.mark.parametrize(
    ("name", "bad", "said"),
    [
        ("model.layers.1.mlp.up_proj.weight", [float("nan")] * 3, "3 NaN and 0 Inf among its 98,304 values"),
        ("model.layers.0.self_attn.q_proj.weight", [float("inf"), -float("inf")], "0 NaN and 2 Inf among its 65,536"),
        ("model.norm.weight", [float("nan")], "1 NaN and 0 Inf among its 256 values; the source is damaged"),
        ("model.embed_tokens.weight", [float("inf")], "0 NaN and 1 Inf among its 81,920 values"),
    ],
)
def test_nan_and_inf_are_refused(
    name: str, bad: list[float], said: str, workers: int, raw_checkpoint: Make, tmp_path: Path
) -> None:
    source = raw_checkpoint()
    tensors = tensors_of(source)
    tensors[name].view(-1)[-len(bad) :] = torch.tensor(bad, dtype=torch.bfloat16)
    source = raw_checkpoint(tensors, name="damaged")
    with pytest.raises(PreflightError, match=re.escape(f"{name}: {said}")):
        quantize(source, "fp8-block", tmp_path / "out", device="cpu", workers=workers)
    assert {path.name for path in tmp_path.iterdir()} == {"model", "damaged"}


def test_of_several_damaged_tensors_the_first_is_named(raw_checkpoint: Make, tmp_path: Path) -> None:
    tensors = tensors_of(raw_checkpoint())
    for name in ("model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight", "lm_head.weight"):
        tensors[name][0, 0] = float("nan")
    source = raw_checkpoint(tensors, name="damaged")
    said = set()
    for attempt in range(3):
        with pytest.raises(PreflightError) as error:
            quantize(source, "fp8-block", tmp_path / f"out{attempt}", device="cpu", workers=4)
        said.add(str(error.value))
    assert len(said) == 1
    assert said.pop().startswith("lm_head.weight: 1 NaN")


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "meta", "cpu:x"])
def test_devices_that_are_not_there(device: str, raw_checkpoint: Make, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"device '{device}': "):
        quantize(raw_checkpoint(), "fp8-block", tmp_path / "out", device=device)


def test_no_workers(raw_checkpoint: Make, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="workers = 0: needs at least one"):
        quantize(raw_checkpoint(), "fp8-block", tmp_path / "out", device="cpu", workers=0)
    assert not list(tmp_path.glob("out*"))


def test_progress_and_summary(raw_checkpoint: Make, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    source = raw_checkpoint()
    summary = quantize(
        source, Recipe("fp8-block"), tmp_path / "out", device="cpu", progress=lambda *event: seen.append(event)
    )
    assert seen[-1][1] == seen[-1][2] == summary.bytes_before
    assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)
    assert "model.layers.1" in {label for label, _, _ in seen}
    assert json.loads((tmp_path / "out" / SUMMARY).read_text())["bytes_after"] == summary.bytes_after
    assert summary.stages.keys() == {"read", "quantize", "write"}
    assert sum(summary.shares().values()) == pytest.approx(1)
    assert summary.groups["quantized: fp8-block"][0] == 14
    titles = [title for title, _, _ in summary.tables()]
    assert titles == ["what happened to the tensors", str(tmp_path / "out")]


def test_threads_of_the_caller_are_left_as_they_were(raw_checkpoint: Make, tmp_path: Path) -> None:
    before = torch.get_num_threads()
    quantize(raw_checkpoint(), "fp8-block", tmp_path / "out", device="cpu")
    assert torch.get_num_threads() == before


MEMORY = """
import json, os, resource, sys
from pathlib import Path
from quantlab.pipeline import plan, quantize
folder = Path(sys.argv[1])
rows, columns = 16384, 8192                                   # one weight of 256 MB, a sparse file of zeros
entry = {"dtype": "BF16", "shape": [rows, columns], "data_offsets": [0, 2 * rows * columns]}
header = json.dumps({"l.up_proj.weight": entry})
with open(folder / "model.safetensors", "wb") as file:
    file.write(len(header).to_bytes(8, "little") + header.encode())
    file.truncate(8 + len(header) + 2 * rows * columns)
(folder / "config.json").write_text("{}")
plan(folder)                                                  # imports are not what is measured
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
quantize(folder, "fp8-block", folder.parent / "out", device="cpu", workers=4)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def test_memory_does_not_grow_with_a_tensor(tmp_path: Path) -> None:
    """A weight of 256 MB is quantized in pieces: four workers together hold less than half of it."""
    (tmp_path / "model").mkdir()
    path = os.pathsep.join(str(ROOT / part) for part in ("", "kernels", "calib"))
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path / "model")],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(done.stdout) < 128
