"""The Hopper kernel's configurations: legal, ordered by cost, and refused with a reason."""

from __future__ import annotations

import copy
import dataclasses
import itertools

import pytest
import torch

from quantlab_kernels.common import nvrtc, tuning
from quantlab_kernels.common.backends import Mendable
from quantlab_kernels.common.gemm import GemmProblem
from quantlab_kernels.common.launches import settled
from quantlab_kernels.gemm_fp8_block import sm90, sm90_configs, sm90_few
from quantlab_kernels.gemm_fp8_block.sm90_configs import SHARED_LIMIT, Config

TOKENS = (1, 3, 16, 17, 64, 65, 128, 200, 256, 1000, 4096, 8192)
WEIGHTS = ((128, 128), (576, 7168), (4096, 4096), (28672, 4096), (7168, 16384), (1000, 256), (4096, 128))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("n", "k"), WEIGHTS)
def test_every_problem_has_a_legal_configuration(n, k, dtype):
    for m in TOKENS:
        problem = GemmProblem(m, n, k, dtype)
        found = sm90_configs.candidates(problem)
        assert found[0] == sm90_configs.default(problem)
        for config in found:
            assert config.shared_bytes() <= SHARED_LIMIT
            assert config.by % 8 == 0
            assert config.bx <= 256
            assert config.by <= 256
            assert config.cluster in (1, 2, 4, 8)
            assert config.by // 8 % config.split == 0


def test_tuned_configurations_are_legal_where_they_were_tuned():
    entries = tuning.table("gemm_fp8_block", "NVIDIA_H200")["sm90"]
    assert len(entries) >= 30
    for shape, by_m in entries.items():
        n, k = (int(part.split("=")[1]) for part in shape.split(","))
        for m, found in by_m.items():
            assert sm90_configs.reject(Config(**found), GemmProblem(int(m), n, k)) is None


@pytest.mark.parametrize(
    "changes", [{"unroll": 1, "math_groups": 3, "stages": 4}, {"unroll": 1}, {"split": 4, "stages": 2}]
)
def test_a_launch_refuses_what_would_hang(changes):
    """Before it asks anything of a GPU: 3 blocks of K are no whole rings, and no four parts."""
    a, b = (torch.zeros(rows, 384, dtype=torch.float8_e4m3fn) for rows in (256, 512))
    out = torch.zeros(256, 512, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"cannot run M=256 N=512 K=384: (the unrolled loop|4 parts of 3 blocks)"):
        sm90.launch(a, torch.ones(3, 256).t(), b, torch.ones(4, 3), None, out, Config(**changes))


def test_candidates_come_in_the_order_of_their_estimate():
    problem = GemmProblem(512, 4096, 7168)
    costs = [sm90_configs.estimate_us(config, problem) for config in sm90_configs.candidates(problem)]
    assert costs == sorted(costs)


def test_rings_of_few_tokens_leave_half_a_multiprocessor_to_the_next_launch():
    """Where all tiles are made at once and a CTA's blocks of K are few; what was tuned is cut like what is chosen."""
    deep = Config(by=16, math_groups=1, split=2, stages=20, swap=1, output_tma=0)
    short = sm90_configs.shallow(deep, GemmProblem(16, 2048, 2048))
    assert short == dataclasses.replace(deep, stages=8)
    assert sm90_configs.default(GemmProblem(16, 2048, 2048)) == short
    for n, k in ((4096, 4096), (4096, 7168)):
        assert sm90_configs.shallow(deep, GemmProblem(16, n, k)).shared_bytes() <= sm90_configs.SHARED_HALF
    for problem in (GemmProblem(16, 8192, 2048), GemmProblem(16, 2048, 11008), GemmProblem(17, 2048, 2048)):
        assert sm90_configs.shallow(deep, problem) == deep


def test_a_few_tokens_take_the_short_side_of_the_mma_and_many_do_not():
    assert sm90_configs.default(GemmProblem(8, 4096, 7168)).swap
    assert not sm90_configs.default(GemmProblem(4096, 4096, 7168)).swap


@pytest.mark.parametrize(
    ("changes", "problem", "reason"),
    [
        ({"stages": 12}, GemmProblem(64, 4096, 4096), "bytes of shared memory"),
        ({}, GemmProblem(64, 4096, 4096, torch.float32), "16-bit rows"),
        ({}, GemmProblem(64, 4100, 4096), "multiple of 16 bytes"),
        ({"swap": 1}, GemmProblem(64, 4096, 4096), "transposed through shared memory"),
        ({"split": 4, "output_tma": 0, "stages": 2}, GemmProblem(64, 4096, 256), "4 parts of 2 blocks"),
        ({"stream": 1, "tail": 4}, GemmProblem(256, 4096, 4096), "cut along K in one way"),
        ({"stream": 1}, GemmProblem(4096, 4096, 4096), "32 tiles of tokens leave few CTAs"),
        ({"stream": 1, "cluster_x": 2}, GemmProblem(300, 4096, 4096), "share weights and have different tokens"),
        ({"math_groups": 3, "stages": 4, "unroll": 1}, GemmProblem(4096, 4096, 640), "rings of 4 blocks, K is 640"),
        ({"unroll": 1}, GemmProblem(4096, 4096, 768), "the unrolled loop takes tall tiles, whole"),
        ({"rotate": 1, "tail": 4}, GemmProblem(4096, 4096, 4096), "keep their places"),
    ],
)
def test_refusals_say_why(changes, problem, reason):
    assert reason in str(sm90_configs.reject(dataclasses.replace(Config(), **changes), problem))


@pytest.mark.parametrize(("m", "n", "k"), [(1, 4096, 128), (200, 7168, 16384), (256, 28672, 4096), (1000, 200, 512)])
@pytest.mark.parametrize("swap", [0, 1])
def test_tiles_cut_along_k_are_covered_once(m: int, n: int, k: int, swap: int):
    """The arithmetic of `Schedule` in `sm90.cu` with STREAM: what a CTA hands over is the first thing it computes."""
    config, blocks = Config(stream=1, swap=swap, output_tma=1 - swap), k // 128
    lanes, ctas = config.token_tiles(m), config.ctas(m, n, 132)
    assert 132 - lanes < ctas <= 132
    workers, total = ctas // lanes, -(-n // (config.bx if swap else config.by)) * blocks
    share, longer = divmod(total, workers)
    begin = [worker * share + min(worker, longer) for worker in range(workers + 1)]
    assert begin[-1] == total
    for first, end in itertools.pairwise(begin):
        handed_over = {unit // blocks for unit in range(first, end) if unit // blocks * blocks < first}
        assert len(handed_over) <= 1
    empty = [worker for worker in range(workers) if begin[worker] == begin[worker + 1]]
    assert not empty or begin[empty[0]] == total  # an owner waits for nobody who has nothing to give


@pytest.mark.parametrize(("tiles", "ctas"), [(5632, 132), (131, 132), (7, 3), (1, 1), (133, 132)])
def test_ctas_that_change_places_make_every_tile_once(tiles: int, ctas: int):
    """The arithmetic of `Schedule` in `sm90.cu` with ROTATE; experts are looked up in ascending order of tiles."""
    made = [[(cta + wave) % ctas + wave * ctas for wave in range(-(-tiles // ctas))] for cta in range(ctas)]
    made = [[tile for tile in of_one if tile < tiles] for of_one in made]
    assert sorted(itertools.chain(*made)) == list(range(tiles))
    assert all(of_one == sorted(of_one) for of_one in made)
    assert max(map(len, made)) - min(map(len, made)) <= 1


def test_clusters_of_four_do_not_fill_the_chip():
    assert [sm90_configs.clusters_at_once(size, 132) for size in (1, 2, 4, 8)] == [132, 66, 30, 15]


@pytest.mark.parametrize(
    ("problem", "reason"),
    [
        (GemmProblem(64, 256, 256, sm=89), "sm_90 only, the GPU is sm_89"),
        (GemmProblem(64, 256, 200), "K in multiples of 128, this is K = 200"),
        (GemmProblem(64, 256, 256, bias=torch.float64), "this is torch.float64"),
    ],
)
def test_the_backend_refuses_with_a_reason(problem, reason):
    assert reason in str(sm90.supports(problem))


def test_a_missing_compiler_is_something_the_user_can_mend(monkeypatch):
    def missing():
        raise nvrtc.CompilerMissingError("nothing there")

    monkeypatch.setattr(nvrtc, "library", missing)
    reason = sm90.supports(GemmProblem(64, 256, 256))
    assert isinstance(reason, Mendable)
    assert "NVRTC not found (nothing there)" in reason


@pytest.mark.parametrize(
    ("problem", "reason"),
    [
        (GemmProblem(1, 2048, 2048), None),
        (GemmProblem(16, 896, 896), None),
        (GemmProblem(17, 896, 896), "up to 16 tokens, this is M = 17"),
        (GemmProblem(8, 4096, 7168), None),
        (GemmProblem(1, 17920, 1536), None),
        (GemmProblem(9, 2048, 2048), "`sm90` is as fast for M = 9 and a weight of 2048 x 2048"),
        (GemmProblem(2, 17920, 1536), "`sm90` is as fast for M = 2"),
        (GemmProblem(1, 6144, 4096), "`sm90` is as fast for M = 1"),
        (GemmProblem(1, 896, 900), "as `sm90`: needs K in multiples of 128"),
    ],
)
def test_few_tokens_of_small_weights_have_a_kernel_of_their_own(monkeypatch, problem, reason):
    monkeypatch.setattr(nvrtc, "missing", lambda: None)
    found = sm90_few.supports(problem)
    assert found is None if reason is None else reason in found


@pytest.mark.parametrize(("n", "k"), [*WEIGHTS, (2048, 2048), (896, 4864), (1536, 8960), (17920, 1536)])
def test_configurations_for_few_tokens_fit(n, k):
    """48 KB of shared memory without asking, 64 K registers, and channels that share scales."""
    for m in (1, 8, 9, 16):
        for config in sm90_few.candidates(GemmProblem(m, n, k)):
            stride = 16 * config.tiles + 4
            assert 4 * config.tokens * stride * (config.warps + config.cluster) <= 48 << 10
            assert config.at_once * 32 * config.warps <= 512
            assert 128 % (16 * config.tiles) == 0
            assert m <= config.tokens


def test_a_weight_is_settled_once_it_was_read_as_it_is():
    weight = torch.zeros(2)
    assert [settled(weight), settled(weight)] == [False, True]
    weight.add_(1)
    assert [settled(weight), settled(weight)] == [False, True]
    assert not settled(copy.deepcopy(weight))
    with torch.inference_mode():
        fresh = torch.zeros(2)
        assert not settled(fresh)
        assert not settled(fresh)


def test_warmup_compiles_each_kernel_once(monkeypatch):
    compiled = []
    monkeypatch.setattr(sm90, "supports", lambda problem: None if problem.k % 128 == 0 else "no")
    monkeypatch.setattr(nvrtc, "cubin", compiled.append)
    problem = GemmProblem(4096, 4096, 4096)
    assert sm90.warmup([problem, problem, GemmProblem(4096, 4096, 100)]) == 1
    assert len(compiled) == 1
    assert compiled[0].macros["SHARED"] == sm90.config(problem).shared_bytes()
