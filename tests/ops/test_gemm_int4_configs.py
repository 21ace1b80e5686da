"""Configurations of the Hopper INT4 kernel: legal ones exist for every problem, its schedule covers all work once."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantlab_kernels.common.int4 import Int4Problem
from quantlab_kernels.gemm_int4_fp8 import sm90, sm90_configs, sm90_few
from quantlab_kernels.gemm_int4_fp8.sm90_configs import Config, candidates, deepest, default, reject

E4M3, BF16 = torch.float8_e4m3fn, torch.bfloat16


@pytest.mark.parametrize("x", [E4M3, BF16])
@pytest.mark.parametrize("m", [1, 17, 64, 100, 4096])
def test_every_problem_has_legal_configurations(m: int, x: torch.dtype):
    for n, k in ((4096, 7168), (200, 128), (28672, 4096), (257, 512)):
        for out in (BF16, torch.float32):
            problem = Int4Problem(m, n, k, x, out)
            assert reject(default(problem), problem) is None
            assert candidates(problem)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (Config(2, 1, 128, stages=20), "bytes of shared memory"),
        (Config(3, 2), "math groups"),
        (Config(4, 1, 128, stages=3), "registers a thread"),
        (Config(1, 4, 16, stages=14), "14 stages for 4 groups"),
        (Config(1, 2, 16, stages=8, split=2), "2 CTAs for each tile"),
    ],
)
def test_illegal_configurations_have_a_reason(config: Config, reason: str):
    assert reason in (reject(config, Int4Problem(16, 4096, 4096)) or "")


@pytest.mark.parametrize(
    ("config", "problem", "reason"),
    [
        (Config(token_scales=8192), Int4Problem(1, 4096, 4096), "copied at once of one tile's tokens"),
        (Config(token_scales=8192), Int4Problem(17, 4096, 4096, grouped=True), "copied at once of one tile's tokens"),
        (Config(token_scales=64), Int4Problem(16, 4096, 4096, grouped=True), "64 bytes for the scales of the tokens"),
        (Config(1, 4, 16, stages=4), Int4Problem(16, 4096, 4096, grouped=True), "4 stages for 4 groups"),
        (Config(2, 1, 160, stages=4, parts=2), Int4Problem(256, 4096, 4096, grouped=True), "2 parts of 160 tokens"),
        (Config(2, 1, 144, stages=4, parts=4), Int4Problem(256, 4096, 4096), "4 parts of 144 tokens"),
        (Config(2, 1, 256, stages=4, parts=4), Int4Problem(256, 4096, 4096), "registers a thread"),
    ],
)
def test_scales_of_tokens_that_do_not_fit_the_configuration(config: Config, problem: Int4Problem, reason: str):
    assert reason in (reject(config, problem) or "")


def test_few_tokens_have_their_scales_copied_at_once():
    def bytes_of(m: int, k: int, grouped: bool = True) -> int:
        return default(Int4Problem(m, 4096, k, grouped=grouped)).token_scales

    assert [bytes_of(1, 14336), bytes_of(64, 4096), bytes_of(64, 14336), bytes_of(256, 512)] == [8192, 8192, 0, 0]
    assert bytes_of(1, 4096, grouped=False) == 0


@pytest.mark.parametrize(("m", "n", "k"), [(128, 4096, 4096), (256, 4096, 14336), (512, 4096, 7168), (128, 6144, 4096)])
def test_each_processor_has_one_tile_where_a_shape_gives_that(m: int, n: int, k: int):
    problem = Int4Problem(m, n, k)
    config = default(problem)
    assert (config.stream, config.split) == (0, 1)
    assert 96 <= config.tiles(problem) <= 132


@pytest.mark.parametrize(
    ("change", "reason"),
    [({"sm": 89}, "sm_90 only"), ({"tiles": False}, "in words"), ({"x": torch.float32}, "takes activations"),
     ({"bias": torch.float64}, "adds a bias")],
)  # fmt: skip
def test_the_backend_says_what_it_does_not_take(change, reason: str):
    assert reason in (sm90.supports(replace(Int4Problem(1, 64, 128), **change)) or "")


@settings(max_examples=60)
@given(st.integers(1, 3000), st.integers(1, 9000), st.integers(1, 40), st.sampled_from([0, 1, 2]), st.booleans())
def test_the_schedule_covers_every_block_once(m: int, n: int, blocks: int, stream: int, wide: bool):
    """The arithmetic of `Schedule` in `sm90.cu`, for every CTA, and what is handed over is handed over first."""
    problem = Int4Problem(m, n, 128 * blocks)
    config = replace(default(problem), stream=stream, by=128 if wide else 16, split=1)
    ctas, streamed = config.schedule(problem, 132)
    tiles = config.tiles(problem)
    share, longer = divmod(streamed * blocks, ctas)
    begin = [cta * share + min(cta, longer) for cta in range(ctas + 1)]
    assert 0 < ctas <= 132
    assert begin[-1] == streamed * blocks
    assert not streamed or share >= 1
    seen = set()
    for cta in range(ctas):
        units = range(begin[cta], begin[cta + 1])
        seen |= {divmod(unit, blocks) for unit in units}
        whole = range(streamed + cta, tiles, ctas)
        seen |= {(tile, block) for tile in whole for block in range(blocks)}
        pieces = {unit // blocks for unit in units}
        middle = [tile for tile in pieces if tile * blocks < begin[cta]]
        assert len(middle) <= 1  # at most one piece is handed over, and it is the first
    assert len(seen) == tiles * blocks


def test_depth_fills_shared_memory_and_not_more():
    problem = Int4Problem(64, 4096, 4096)
    deep = deepest(Config(2, 1, 64), problem, most=100)
    assert deep.shared_bytes(problem) <= sm90_configs.SHARED_LIMIT
    assert deepest(Config(1, 4, 64), problem).stages % 4 == 0
    assert replace(deep, stages=deep.stages + 1).shared_bytes(problem) > sm90_configs.SHARED_LIMIT


@pytest.mark.parametrize(
    ("problem", "reason"),
    [
        (Int4Problem(1, 576, 7168, grouped=True), None),
        (Int4Problem(8, 2048, 2048), None),
        (Int4Problem(1, 4096, 4096), "`sm90` is as fast for M = 1 and a weight of 4096 x 4096"),
        (Int4Problem(17, 576, 7168), "up to 16 tokens and no experts, this is M = 17"),
        (Int4Problem(1, 576, 7168, experts=8), "no experts"),
        (Int4Problem(1, 576, 7168, BF16), "takes E4M3 activations, these are torch.bfloat16"),
        (Int4Problem(1, 576, 7168, tiles=False), "as `sm90`: the weight is in words"),
    ],
)
def test_few_tokens_of_narrow_weights_have_a_kernel_of_their_own(monkeypatch, problem, reason):
    monkeypatch.setattr(sm90.nvrtc, "missing", lambda: None)
    found = sm90_few.supports(problem)
    assert found is None if reason is None else reason in found


@pytest.mark.parametrize(("n", "k"), [(128, 128), (576, 7168), (896, 4864), (2048, 2048), (1536, 8960), (2048, 11008)])
def test_configurations_for_few_tokens_fit(n, k):
    for m in (1, 8, 9, 16):
        for config in sm90_few.candidates(Int4Problem(m, n, k)):
            assert 4 * config.tokens * (16 * config.tiles + 4) * (config.warps + config.cluster) <= 48 << 10
            assert 64 % (16 * config.tiles) == 0
            assert m <= config.tokens
            assert config.row == 1


def test_warmup_compiles_each_kernel_once(monkeypatch):
    compiled = []
    monkeypatch.setattr(sm90, "supports", lambda problem: None)
    monkeypatch.setattr(sm90.nvrtc, "cubin", compiled.append)
    problems = [Int4Problem(m, 4096, 4096) for m in (1, 8, 16)]
    assert sm90.warmup(problems) == len(compiled) == 1
    assert "gemm_int4" in compiled[0].text
