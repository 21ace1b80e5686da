"""The run-time compiler: what decides a kernel's key, and a cache that survives crowds and damage."""

from __future__ import annotations

import multiprocessing
import os

import pytest
import torch

from quantlab_kernels.common import nvrtc
from quantlab_kernels.common.nvrtc import CompileError, CompilerMissingError, Source
from quantlab_kernels.common.wgmma import wgmma_source

SOURCE = Source("add", 'extern "C" __global__ void add(float* x) { x[threadIdx.x] += N; }', macros={"N": 1})


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("QUANTLAB_CACHE", str(tmp_path))
    return tmp_path / "cubin"


@pytest.fixture
def compiled(monkeypatch):
    """A compiler that needs no CUDA: counts its calls and returns bytes that name the source."""
    calls = []

    def compile_source(source: Source) -> tuple[bytes, str]:
        calls.append(source)
        return f"code of {source.name} {dict(source.macros)}".encode(), ""

    monkeypatch.setattr(nvrtc, "compile_source", compile_source)
    monkeypatch.setattr(nvrtc, "compiler_version", lambda: "NVRTC 13.0")
    return calls


def test_a_second_call_reads_the_cache(cache, compiled):
    first = nvrtc.cubin(SOURCE)
    assert nvrtc.cubin(SOURCE) == first
    assert len(compiled) == 1
    assert [path.suffix for path in cache.iterdir()] == [".cubin"]


@pytest.mark.parametrize(
    "other",
    [
        Source("add", SOURCE.text, macros={"N": 2}),
        Source("add", SOURCE.text + " ", macros={"N": 1}),
        Source("add", SOURCE.text, {"h.cuh": ""}, {"N": 1}),
        Source("add", SOURCE.text, macros={"N": 1}, arch="sm_100a"),
    ],
    ids=["macro", "text", "header", "architecture"],
)
def test_whatever_changes_the_code_changes_the_key(other):
    assert other.key("NVRTC 13.0") != SOURCE.key("NVRTC 13.0")


def test_the_compiler_is_part_of_the_key_and_the_order_of_macros_is_not():
    assert SOURCE.key("NVRTC 13.0") != SOURCE.key("NVRTC 13.1")
    one, two = (Source("add", "", macros=dict(pairs)) for pairs in ([("A", 1), ("B", 2)], [("B", 2), ("A", 1)]))
    assert one.key("") == two.key("")


@pytest.mark.parametrize("damage", [b"", b"quantlab cubin 1\n", b"\0" * 500], ids=["empty", "cut", "zeros"])
def test_a_damaged_file_is_compiled_anew(cache, compiled, damage):
    code = nvrtc.cubin(SOURCE)
    (path,) = cache.iterdir()
    path.write_bytes(damage)
    assert nvrtc.cubin(SOURCE) == code
    assert len(compiled) == 2
    assert nvrtc.cubin(SOURCE) == code
    assert len(compiled) == 2


def test_one_flipped_bit_is_noticed(cache, compiled):
    code = nvrtc.cubin(SOURCE)
    (path,) = cache.iterdir()
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert nvrtc.cubin(SOURCE) == code
    assert len(compiled) == 2


def test_a_cache_that_cannot_be_written_only_costs_time(tmp_path, monkeypatch, compiled):
    blocker = tmp_path / "file"
    blocker.write_text("")
    monkeypatch.setenv("QUANTLAB_CACHE", str(blocker))
    assert nvrtc.cubin(SOURCE) == nvrtc.cubin(SOURCE)
    assert len(compiled) == 2


def _write_many(path) -> None:
    for _ in range(200):
        nvrtc._write(path, bytes(100_000))


def test_readers_never_see_a_half_written_file(tmp_path):
    path = tmp_path / "cubin" / "add-1.cubin"
    nvrtc._write(path, bytes(100_000))
    writers = [multiprocessing.get_context("fork").Process(target=_write_many, args=(path,)) for _ in range(2)]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        assert nvrtc._read(path) == bytes(100_000)
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert os.listdir(path.parent) == [path.name]


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        nvrtc._write(tmp_path / "x.cubin", b"code")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA")
def test_without_nvrtc_the_error_says_what_to_install(monkeypatch):
    monkeypatch.delenv("QUANTLAB_NVRTC", raising=False)
    nvrtc.library.cache_clear()
    with pytest.raises(CompilerMissingError, match=r"without CUDA.*nvidia-cuda-nvrtc"):
        nvrtc.library()


def test_a_library_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setenv("QUANTLAB_NVRTC", "/nowhere/libnvrtc.so.13")
    nvrtc.library.cache_clear()
    with pytest.raises(CompilerMissingError, match=r"tried /nowhere/libnvrtc\.so\.13"):
        nvrtc.library()


@pytest.mark.gpu(sm=80)
def test_the_real_compiler_and_its_errors(cache):
    code, _ = nvrtc.compile_source(SOURCE)
    assert code[:4] == b"\x7fELF"
    with pytest.raises(CompileError, match=r"add does not compile with NVRTC(.|\n)*identifier \"N\" is undefined"):
        nvrtc.cubin(Source("add", SOURCE.text))


@pytest.mark.parametrize("n", [0, 4, 12, 264])
def test_the_mma_has_no_such_width(n):
    with pytest.raises(ValueError, match=f"n = {n}, needs a multiple of 8"):
        wgmma_source(n)


def test_the_mma_names_each_accumulator_once():
    text = wgmma_source(24)
    assert "m64n24k32" in text
    assert all(text.count(f'"+f"(d[{i}])') == 1 for i in range(12))
    assert "d[12]" not in text
