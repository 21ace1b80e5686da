// What kernels that read packed tokens share: approximate functions, codes to pairs of float16, parts of a sequence.

DEVICE float exp2_(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
DEVICE float log2_(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
DEVICE float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// (a & mask) | bits
DEVICE u32 spread(u32 a, u32 mask, u32 bits) {
  u32 r;
  asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(r) : "r"(a), "r"(mask), "r"(bits));
  return r;
}
DEVICE u32 fp8_pair(u32 pair) {
  u32 r;
  asm("{.reg .b16 a, b; mov.b32 {a, b}, %1; cvt.rn.f16x2.e4m3x2 %0, a;}" : "=r"(r) : "r"(pair));
  return r;
}
DEVICE u32 minus(u32 a, u32 b) {
  u32 r;
  asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  return r;
}
DEVICE u32 times_plus(u32 a, u32 b, u32 c) {
  u32 r;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
  return r;
}
// Four INT8 codes each of two tokens as float16 numbers: register i gets code i of both.
template <int COUNT>
DEVICE void int8_turned(u32 (&r)[COUNT], u32 first, u32 second) {
  const u32 x = first ^ 0x80808080u, y = second ^ 0x80808080u;
  const u32 low = __byte_perm(x, y, 0x5140), high = __byte_perm(x, y, 0x7362);
  r[0] = minus(__byte_perm(low, 0x64646464u, 0x4140), 0x64806480u);
  r[1] = minus(__byte_perm(low, 0x64646464u, 0x4342), 0x64806480u);
  r[2] = minus(__byte_perm(high, 0x64646464u, 0x4140), 0x64806480u);
  r[3] = minus(__byte_perm(high, 0x64646464u, 0x4342), 0x64806480u);
}

// One warp weighs the parts that a sequence was divided into: `sums` holds (largest score, sum of weights) of each, a part
// every `stride` pairs. shares [MOST] are factors relative to the largest of all, which goes to `both` with the whole sum.
template <int MOST>
DEVICE void weigh_parts(const float* sums, long long stride, long long at, int parts, float* shares, float* both) {
  const float lowest = -__int_as_float(0x7f800000);
  float tops[MOST / 32], totals[MOST / 32], top = lowest, whole = 0.0f;
#pragma unroll
  for (int j = 0; j < MOST / 32; j++) {
    const int part = threadIdx.x + 32 * j;
    tops[j] = part < parts ? sums[2 * (part * stride + at)] : lowest;
    totals[j] = part < parts ? sums[2 * (part * stride + at) + 1] : 0.0f;
    top = fmaxf(top, tops[j]);
  }
#pragma unroll
  for (int step = 1; step < 32; step *= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, step));
  const float reference = top == lowest ? 0.0f : top;
#pragma unroll
  for (int j = 0; j < MOST / 32; j++) {
    const float share = exp2_(tops[j] - reference);
    whole += share * totals[j];
    shares[threadIdx.x + 32 * j] = share;
  }
#pragma unroll
  for (int step = 1; step < 32; step *= 2) whole += __shfl_xor_sync(~0u, whole, step);
  if (threadIdx.x == 0) both[0] = reference, both[1] = whole;
}
