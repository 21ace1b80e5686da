"""What `tools/sanitize.py` makes of a checker's output, without a GPU."""

from __future__ import annotations

import importlib
import itertools

import pytest

CLEAN = "========= COMPUTE-SANITIZER\nright 1e-03: 3 tokens\n"
NO_HAZARD = "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n"
HAZARD = "========= Error: Race reported between Write access at few+0x10\n"
HAZARDS = "========= RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)\n"
WARNING = "========= RACECHECK SUMMARY: 1 hazard displayed (0 errors, 1 warning)\n"
WRONG = "WRONG nan: 16 tokens\n"


@pytest.fixture(scope="module")
def sanitize():
    return importlib.import_module("sanitize")


@pytest.mark.parametrize(
    ("tool", "code", "output", "reason"),
    [
        ("racecheck", 0, CLEAN + NO_HAZARD, ""),
        ("memcheck", 0, CLEAN + "========= ERROR SUMMARY: 0 errors\n", ""),
        ("plain", 0, CLEAN, ""),
        ("racecheck", 1, CLEAN + HAZARD + HAZARDS, "2 reported, the first: Error: Race"),
        ("racecheck", 0, CLEAN + HAZARD + WARNING, "1 reported"),
        ("racecheck", 3, CLEAN + WRONG + NO_HAZARD, "1 wrong results, the first: WRONG nan: 16 tokens"),
        ("racecheck", None, CLEAN, "not done after 9 s; 1 calls were"),
        ("plain", 1, CLEAN + "RuntimeError: no GPU\n", "exit code 1: RuntimeError: no GPU"),
        ("memcheck", 0, CLEAN, "checked nothing: no summary"),
        ("memcheck", 0, "========= Error: Device not supported\n" + CLEAN, "checked nothing: Error: Device not"),
    ],
)
def test_only_a_checked_room_is_clean(sanitize, tool, code, output, reason):
    found = sanitize.judge(tool, code, output, 9)
    assert found.startswith(reason)
    assert bool(found) == bool(reason)


def test_a_room_that_takes_too_long_is_ended_with_its_children(sanitize, tmp_path):
    checker = tmp_path / "checker"
    checker.write_text("#!/bin/sh\nsleep 60 & echo right; wait\n")
    checker.chmod(0o755)
    found = sanitize.run("memcheck", "absorbed", sanitize.Settings(str(checker), 1, tmp_path))
    assert found.reason == "not done after 1 s; 1 calls were"
    assert found.seconds < 30
    assert "FAILED" in sanitize.table([found])


def test_rooms_of_latents_take_the_tiles_in_their_names(sanitize, monkeypatch: pytest.MonkeyPatch):
    """The quickest tile of calls so short is nearly always the smallest: wider ones would never be checked."""
    op, sm90 = (importlib.import_module(f"quantlab_kernels.mla_decode.{name}") for name in ("op", "sm90"))
    small_calls = importlib.import_module("small_calls")
    monkeypatch.setattr(sm90.nvrtc, "missing", lambda: None)
    taken = {}
    calls = (20, 32, False), (80, 16, False), (80, 64, True), (40, 48, True)
    for code, (heads, tile, wide) in itertools.product(("float", "e4m3", "int4", "int8"), calls):
        problem = op.Problem(1, heads, 1, 512, 64, 256, code)
        with small_calls.tiles_of(tile, wide):
            chosen = op.BACKENDS.select(problem)
            name = chosen.__name__.rpartition(".")[2]
            taken[code, heads, tile] = name, chosen.config(problem).rows
    assert [taken[code, 20, 32] for code in ("float", "e4m3", "int4", "int8")] == [
        ("sm90", 32), ("sm90", 24), ("sm90", 24), ("sm90", 24),
    ]  # fmt: skip
    assert {taken[code, 80, 16] for code in ("float", "e4m3", "int4", "int8")} == {("sm90", 16)}
    assert {taken[code, 80, 64] for code in ("float", "e4m3", "int4")} == {("sm90_rows", 64)}
    assert {taken[code, 40, 48] for code in ("e4m3", "int4")} == {("sm90_rows", 48)}
    assert taken["int8", 80, 64] == ("sm90", 64)


def test_rooms_of_cached_attention_take_every_number_of_warps(sanitize, monkeypatch: pytest.MonkeyPatch):
    """More than eight are of calls with nearly as many heads as processors, sixteen of long caches in INT4 at that."""
    op, sm90 = (importlib.import_module(f"quantlab_kernels.attention_decode.{name}") for name in ("op", "sm90"))
    small_calls = importlib.import_module("small_calls")
    taken = []

    def seen(q, cache, length, *, block_table, longest, **options):
        slots = 32 * block_table.shape[1] if block_table is not None else cache.capacity
        bound = slots if longest is None else min(longest, slots)
        taken.append(sm90.config(op._problem(q, cache, block_table, -1, 0.0, bound, 90)).warps)
        return (q,)

    monkeypatch.setattr(small_calls.ql, "attention_decode", seen)
    for name, most in (("decode_int4", 16), ("decode_fp8", 12), ("decode_k8v4", 12)):
        taken.clear()
        list(small_calls.ROOMS[name]())
        assert set(taken) == {8, most}


def test_every_room_has_calls(sanitize, monkeypatch: pytest.MonkeyPatch):
    """Whose results on the CPU are numbers."""
    monkeypatch.setenv("QUANTLAB_BMM_FP8_BACKEND", "sm90")  # a room sets it
    for name, room in sanitize.ROOMS.items():
        assert next(room()).exact.isfinite().all(), name
