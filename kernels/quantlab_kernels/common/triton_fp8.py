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
def divide(x, scale, POWER2: tl.constexpr, SHORT: tl.constexpr):
    """x / scale with the e4m3 code of the correctly rounded quotient; scale broadcasts to x.

    POWER2  the scale is a power of two: its reciprocal is exact
    SHORT   x holds bfloat16 or float16 values and scale is `scale_of` their largest magnitude

    A correctly rounded division is a dozen instructions and makes the kernel wait for them instead of for memory. A
    short x needs two: the reciprocal as the sum of two floats gives x / scale to 46 bits, and no quotient of so few
    bits lies nearer than that to a place where the code changes. A test runs through all of them. (One float is not
    enough: 140 of 335936 cases of bfloat16 get the neighbouring code.) Triton's interpreter cannot fuse and must not
    be asked for SHORT.
    """
    one = tl.full(scale.shape, 1.0, tl.float32)
    if POWER2:
        return x * tl.math.div_rn(one, scale)
    if not SHORT:
        return tl.math.div_rn(x, tl.broadcast_to(scale, x.shape))
    # Above 2**64 the lower part would leave the range of floats.
    down = tl.where(scale > 18446744073709551616.0, 5.421010862427522e-20, one)
    divisor = scale * down
    upper = tl.math.div_rn(one, divisor)
    # Rounded down, so that the lower part is not negative and keeps the sign of a zero.
    below = (upper.to(tl.int32, bitcast=True) - 1).to(tl.float32, bitcast=True)
    upper = tl.where(tl.fma(-upper, divisor, one) < 0.0, below, upper)
    lower = tl.fma(-upper, divisor, one) * upper
    lower = tl.where(scale == float("inf"), 0.0, lower)
    x = x * down
    return tl.fma(x, tl.broadcast_to(upper, x.shape), x * lower)


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
