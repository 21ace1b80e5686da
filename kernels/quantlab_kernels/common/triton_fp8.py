"""E4M3 in Triton: casts that equal `formats.E4M3` bit for bit, also on GPUs that have no FP8 unit (before sm_89).

Triton refuses the type there, so such GPUs see codes as uint8 and use the integer versions below. All are tested over
every code and against every neighbourhood of a rounding tie.
"""

import triton
import triton.language as tl


@triton.jit
def saturate_e4m3(x):
    """float32 clamped to ±448; NaN stays NaN."""
    return tl.clamp(x, -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def encode_e4m3(x):
    """float32 -> e4m3 code in uint8: to nearest, ties to even, saturating; NaN gives 0x7f."""
    bits = saturate_e4m3(x).to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    # Below 2**-6 codes are multiples of 2**-9: adding 2**14, whose unit in the last place that is, rounds to them.
    small = (magnitude.to(tl.float32, bitcast=True) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    # Above, drop 20 bits of the mantissa (adding half of a unit, less one where the kept part is even) and rebias.
    normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - (120 << 3)
    code = tl.where(magnitude < 0x3C800000, small, normal)
    code = tl.where(magnitude > 0x7F800000, 0x7F, code | ((bits >> 24) & 0x80))
    return code.to(tl.uint8)


@triton.jit
def decode_e4m3(code):
    """e4m3 code in uint8 -> float16, exact."""
    wide = code.to(tl.int16)
    # The bits of e4m3 inside a float16 stand for the value times 2**-8, subnormals included.
    value = (((wide & 0x80) << 8) | ((wide & 0x7F) << 7)).to(tl.float16, bitcast=True) * 256.0
    return tl.where((wide & 0x7F) == 0x7F, float("nan"), value).to(tl.float16)


@triton.jit
def _larger(x, y):
    return tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def largest_magnitude(values, axis: tl.constexpr, NATIVE: tl.constexpr = False):
    """Largest magnitude of float32 values along an axis; NaN if there is one.

    As integers, magnitudes order like the floats and NaN is above all of them; a float maximum that propagates NaN
    costs one instruction less per element, and is left to GPUs because Triton's interpreter takes minutes for it.
    """
    if NATIVE:
        return tl.reduce(tl.abs(values), axis, _larger)
    bits = values.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return tl.max(bits, axis=axis).to(tl.float32, bitcast=True)


@triton.jit
def divide(x, scale, POWER2: tl.constexpr, NATIVE: tl.constexpr):
    """x / scale, correctly rounded wherever the e4m3 code is not zero, with the sign of x; scale broadcasts to x.

    scale comes from `scale_of`: positive, at least 2**-126 and, where finite, at least amax / 449. One reciprocal per
    scale, then Markstein's two corrections per element, the second of which rounds correctly (P. Markstein, "Computation
    of elementary functions on the IBM RISC System/6000", 1990): five instructions where `div_rn` has a dozen. Scales
    that are powers of two need the product only. Triton's interpreter does not fuse its fma and takes `div_rn`.
    """
    if not NATIVE:
        return tl.math.div_rn(x, tl.broadcast_to(scale, x.shape))
    one = tl.full(scale.shape, 1.0, tl.float32)
    if POWER2:
        return x * tl.math.div_rn(one, scale)
    # Far below 1, remainders would be subnormal and not exact: move both operands up. An infinite scale has reciprocal
    # 0, and any finite divisor then leaves 0 for finite x and NaN for others.
    up = tl.where(scale < 8.673617379884035e-19, 18446744073709551616.0, one)
    reciprocal = tl.broadcast_to(tl.math.div_rn(one, scale * up), x.shape)
    divisor = tl.broadcast_to(tl.where(scale == float("inf"), one, scale * up), x.shape)
    x = x * up
    quotient = x * reciprocal
    quotient = tl.fma(tl.fma(-quotient, divisor, x), reciprocal, quotient)
    quotient = tl.fma(tl.fma(-quotient, divisor, x), reciprocal, quotient)
    # The corrections make -0 out to be +0.
    sign = x.to(tl.int32, bitcast=True) & -0x80000000
    return (quotient.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)


@triton.jit
def scale_of(amax, POWER2: tl.constexpr):
    """`qtensor.scale_of` for E4M3."""
    smallest = tl.full(amax.shape, 1.1754943508222875e-38, tl.float32)
    scale = tl.maximum(tl.math.div_rn(amax, tl.full(amax.shape, 448.0, tl.float32)), smallest, tl.PropagateNan.ALL)
    if POWER2:
        bits = scale.to(tl.int32, bitcast=True)
        rounded = ((bits + 0x7FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)
        scale = tl.where(bits < 0x7F800000, rounded, scale)
    return tl.where(amax == 0.0, 1.0, scale)


@triton.jit
def store_codes(pointers, values, mask, NATIVE: tl.constexpr):
    """Values as e4m3 codes; the hardware's conversion saturates, and keeps NaN, by itself."""
    if NATIVE:
        tl.store(pointers, values.to(tl.float8e4nv), mask=mask)
    else:
        tl.store(pointers, encode_e4m3(values), mask=mask)
