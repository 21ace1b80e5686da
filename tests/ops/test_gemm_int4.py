"""Layouts of INT4 weights and both INT4 GEMM ops on a CPU: exact inverses, error bound, refusals, tracing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantlab_kernels import (
    gemm_int4,
    gemm_int4_fp8,
    prepare_int4,
    quantize_fp8_group,
    quantize_fp8_token,
    repack_int4,
    unrepack_int4,
)
from quantlab_kernels.common.bounds import gemm_bound, worst
from quantlab_kernels.common.gemm import as_group_scale, is_group_scale
from quantlab_kernels.common.int4 import decode, has_minus_eight
from quantlab_kernels.common.operands import KINDS, operand
from quantlab_kernels.gemm_int4 import reference as reference16
from quantlab_kernels.gemm_int4_fp8 import reference as reference8
from quantlab_kernels.packing import pack_int4


def codes(n: int, k: int, lowest: int = -7, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(lowest, 8, (n, k), dtype=torch.int8, generator=generator)


def scales(n: int, groups: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    spread = torch.rand(n, groups, generator=torch.Generator().manual_seed(3)) + 0.01
    return (spread * torch.logspace(-3, 0, n)[:, None]).to(dtype)


def weight(form: str, n: int = 200, k: int = 384, bits: int = 8):
    words = pack_int4(codes(n, k))
    return (words if form == "words" else repack_int4(words, activation_bits=bits)), scales(n, k // 128)


@settings(max_examples=20)
@given(st.integers(1, 200), st.integers(1, 3), st.sampled_from([8, 16]), st.integers(0, 1000))
def test_repack_has_an_inverse(n: int, groups: int, bits: int, seed: int):
    words = pack_int4(codes(n, 128 * groups, -7 if bits == 8 else -8, seed))
    tiles = repack_int4(words, activation_bits=bits)
    assert tiles.shape[:2] == (-(-n // 64), groups)
    assert torch.equal(unrepack_int4(tiles, n), words)


def test_tiles_hold_what_the_registers_of_the_mma_ask_for():
    """Walks over the fragments of wgmma m64nNk32 and m64nNk16 (PTX ISA) and decodes words as the kernel does."""
    given_codes = codes(64, 128)
    for bits in (8, 16):
        tile = repack_int4(pack_int4(given_codes), activation_bits=bits).flatten().tolist()
        for thread in range(0, 128, 5):
            warp, row, quad = thread // 32, thread % 32 // 4, thread % 4
            words = [tile[v * 512 + 4 * thread + j] & 0xFFFFFFFF for v in (0, 1) for j in range(4)]
            for step in range(4 if bits == 8 else 8):
                for register in range(4):
                    n, half = 16 * warp + 8 * (register % 2) + row, register // 2
                    if bits == 8:
                        word = words[2 * step + half]
                        turned = (word << 4 | word >> 28) if register % 2 else word
                        fp8 = [(turned & 0x87878787) >> 8 * i & 255 for i in range(4)]
                        found = [-(byte & 7) if byte & 128 else byte & 7 for byte in fp8]
                        k = 32 * step + 16 * half + 4 * quad
                    else:
                        nibbles = words[step] >> 4 * register
                        found = [(nibbles >> 16 * e & 15) - 8 for e in (0, 1)]
                        k = 16 * step + 8 * half + 2 * quad
                    assert found == given_codes[n, k : k + len(found)].tolist()


def test_a_code_of_minus_eight_is_found_and_kept():
    for place in range(8):
        some = codes(3, 128)
        assert not has_minus_eight(pack_int4(some))
        some[2, 64 + place] = -8
        words = pack_int4(some)
        assert has_minus_eight(words)
        with pytest.raises(ValueError, match="codes of -8"):
            repack_int4(words)
        assert torch.equal(unrepack_int4(repack_int4(words, activation_bits=16), 3), words)
        assert torch.equal(decode(words, torch.ones(3, 1)), some.double())
    a, a_scale = quantize_fp8_token(torch.randn(4, 128))
    out = gemm_int4_fp8(a, a_scale, words, torch.ones(3, 1), out_dtype=torch.float32)
    torch.testing.assert_close(out, (a.float() * a_scale) @ some.float().t())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda w: repack_int4(w[:, :5]), r"torch.int32 \(8, 5\), needs int32 \[N, K / 8\] with K a multiple of 128"),
        (lambda w: repack_int4(w.long()), "torch.int64"),
        (lambda w: repack_int4(w, activation_bits=4), "activation_bits = 4, needs 8 or 16"),
        (lambda w: unrepack_int4(w, 8), "needs tiles of a weight of 8 rows"),
        (lambda w: unrepack_int4(repack_int4(w), 65), "needs tiles of a weight of 65 rows"),
    ],
)
def test_layouts_refuse_what_they_are_not(call, message: str):
    with pytest.raises(ValueError, match=message):
        call(pack_int4(codes(8, 128)))


def test_without_hopper_words_stay_words():
    words = pack_int4(codes(8, 128))
    assert prepare_int4(words, activation_bits=8) is words


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_group_scales_of_any_dtype_start_columns_at_sixteen_bytes(dtype: torch.dtype):
    arranged = as_group_scale(scales(67, 3, dtype))
    assert is_group_scale(arranged)
    assert arranged.stride(1) * dtype.itemsize % 16 == 0
    assert torch.equal(arranged, scales(67, 3, dtype))


@pytest.mark.parametrize("form", ["words", "tiles"])
@pytest.mark.parametrize("kind", KINDS)
def test_fp8_activations_are_inside_the_bound(form: str, kind: str):
    b, b_scale = weight(form)
    x = operand(kind, 9, 384, seed=1)
    for quantize in (quantize_fp8_token, quantize_fp8_group):
        a, a_scale = quantize(x)
        for out_dtype, bias in ((torch.bfloat16, None), (torch.float16, None), (torch.float32, torch.randn(200))):
            out = gemm_int4_fp8(a, a_scale, b, b_scale, bias, out_dtype=out_dtype)
            exact = reference8.gemm(a, a_scale, b, b_scale, bias)
            size = (a.double() * a_scale.double().repeat_interleave(384 // a_scale.shape[1], 1)).abs()
            magnitude = size @ decode(b, b_scale).abs().t() + (0 if bias is None else bias.double().abs())
            found = worst(out, exact, gemm_bound(exact, magnitude, 384, out_dtype, "float32"))
            assert found.ratio <= 1, found


@pytest.mark.parametrize("form", ["words", "tiles"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_wide_activations_are_inside_the_bound(form: str, dtype: torch.dtype):
    b, b_scale = weight(form, bits=16)
    for kind in ("rows", "outliers"):
        x = operand(kind, 9, 384, seed=1).to(dtype)
        for bias in (None, torch.randn(200)):
            out = gemm_int4(x, b, b_scale, bias)
            exact = reference16.gemm(x, b, b_scale, bias)
            magnitude = x.double().abs() @ decode(b, b_scale).abs().t() + (0 if bias is None else bias.double().abs())
            found = worst(out, exact, gemm_bound(exact, magnitude, 384, dtype, "float32"))
            assert out.dtype == dtype
            assert found.ratio <= 1, found


def test_the_reference_is_the_product_of_the_dequantized_operands():
    some, b_scale = codes(40, 256), scales(40, 2)
    w = some.double() * b_scale.double().repeat_interleave(128, 1)
    a, a_scale = quantize_fp8_group(torch.randn(3, 256))
    wide = a.double() * a_scale.double().repeat_interleave(128, 1)
    assert torch.equal(reference8.gemm(a, a_scale, pack_int4(some), b_scale, None), wide @ w.t())
    x = torch.randn(3, 256, dtype=torch.float64)
    assert torch.equal(reference16.gemm(x, repack_int4(pack_int4(some)), b_scale, None), x @ w.t())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a": lambda t: t.float()}, "a is torch.float32"),
        ({"a": lambda t: t[:, :-1]}, "K = 383, needs a multiple of 128"),
        ({"a": lambda t: t[:, :-128]}, r"b \(4, 3, 1024\) does not fit activations \(5, 256\)"),
        ({"a_scale": lambda t: t[:-1]}, r"a_scale is torch.float32 \(4, 1\), needs float32 \(5, 1\) or \(5, 3\)"),
        ({"b": lambda t: t.long()}, r"b is torch.int64 \(4, 3, 1024\), needs int32 words"),
        ({"b": lambda t: t.view(4, 3, 2, 512)}, "b is in tiles for 16-bit activations, needs 8"),
        ({"b_scale": lambda t: t.double()}, "b_scale"),
        ({"b_scale": lambda t: t[:-20]}, r"does not fit activations \(5, 384\) and b_scale \(180, 3\)"),
        ({"b_scale": lambda t: t[:, :2]}, r"b_scale is torch.bfloat16 \(200, 2\), needs \[200, 3\]"),
        ({"bias": lambda t: torch.ones(3)}, r"bias is torch.float32 \(3,\), needs floats of shape \(200,\)"),
        ({"out_dtype": lambda t: torch.int8}, "out_dtype torch.int8, needs one of"),
    ],
)
def test_refusals_name_what_disagrees(change, message: str):
    a, a_scale = quantize_fp8_token(torch.randn(5, 384))
    b, b_scale = weight("tiles")
    arguments = {"a": a, "a_scale": a_scale, "b": b, "b_scale": b_scale, "bias": None, "out_dtype": torch.bfloat16}
    for name, function in change.items():
        arguments[name] = function(arguments[name])
    with pytest.raises(RuntimeError, match=f"gemm_int4_fp8: .*{message}"):
        gemm_int4_fp8(**arguments)


def test_wide_activations_refuse_tiles_of_the_other_width():
    b, b_scale = weight("tiles")
    with pytest.raises(RuntimeError, match="gemm_int4: b is in tiles for 8-bit activations, needs 16"):
        gemm_int4(torch.randn(2, 384), b, b_scale)
    with pytest.raises(RuntimeError, match=r"gemm_int4: x is torch\.float64"):
        gemm_int4(torch.randn(2, 384, dtype=torch.float64), b, b_scale)


def test_operator_registration_tracing_and_empty_batches():
    b, b_scale = weight("tiles")
    a, a_scale = quantize_fp8_token(torch.randn(5, 384))
    checks = ("test_faketensor", "test_aot_dispatch_dynamic", "test_autograd_registration")
    overload = torch.ops.quantlab.gemm_int4_fp8.default
    torch.library.opcheck(overload, (a, a_scale, b, b_scale, torch.randn(200), torch.bfloat16), test_utils=checks)
    assert gemm_int4_fp8(a[:0], a_scale[:0], b, b_scale).shape == (0, 200)
    b, b_scale = weight("words", bits=16)
    x = torch.randn(5, 384).bfloat16()
    torch.library.opcheck(torch.ops.quantlab.gemm_int4.default, (x, b, b_scale, None), test_utils=checks)
    compiled = torch.compile(gemm_int4, fullgraph=True, dynamic=True, backend="aot_eager")
    for m in (0, 3, 8):
        x = torch.randn(m, 384).bfloat16()
        assert torch.equal(compiled(x, b, b_scale), gemm_int4(x, b, b_scale))
