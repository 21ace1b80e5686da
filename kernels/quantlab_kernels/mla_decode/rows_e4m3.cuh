// E4M3 latents where they lie as operands of both products, queries as sums of two E4M3 numbers.

// Four channels of a query, raised, as sums of two numbers.
DEVICE void write_numbers(u32 to, const float* x, float raised) {
  float four[4], rest[4];
#pragma unroll
  for (int k = 0; k < 4; k++) four[k] = x[k] * raised;
  const u32 first = e4m3_four(four);
  const float2 low = e4m3_floats(static_cast<u16>(first)), high = e4m3_floats(static_cast<u16>(first >> 16));
  rest[0] = four[0] - low.x, rest[1] = four[1] - low.y, rest[2] = four[2] - high.x, rest[3] = four[3] - high.y;
  write(to, __uint_as_float(first));
  write(to + CHUNK, __uint_as_float(e4m3_four(rest)));
}

// The largest of a row near 128 by a power of two.
DEVICE void stage_query(const float (&x)[L / 32], float2 turned, int n, int last, const Params& p, u32 base) {
  const int lane = threadIdx.x % 32;
  float most = fmaxf(fabsf(turned.x), fabsf(turned.y));
#pragma unroll
  for (int i = 0; i < L / 32; i++) most = fmaxf(most, fabsf(x[i]));
#pragma unroll
  for (int i = 1; i < 32; i *= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, i));
  const u32 exponent = max(__float_as_uint(most) >> 23, 27u);
  const float raised = __uint_as_float((260 - exponent) << 23);
#pragma unroll
  for (int i = 0; i < L / 256; i++) {
    const u32 to = base + OFFSET_QUERIES + 2 * (2 * i + lane / 16) * CHUNK + swizzled(n, lane % 16 * 8);
    write_numbers(to, x + 8 * i, raised);
    write_numbers(to + 4, x + 8 * i + 4, raised);
  }
  const u32 both = pack<KEPT>(turned.x * raised, turned.y * raised);
  write(base + OFFSET_QUERIES + 2 * CHUNKS * CHUNK + swizzled(n, 4 * lane), __uint_as_float(both));
  if (lane == 0) write_row(base, n, last, p.factor / raised);
}

constexpr int STEPS = 4 * CHUNKS;  // of 32 channels

struct Scores {
  float both[64];  // with the first and the second number of the queries
  // Products of some steps of a tile, which is waited for if it is `there`.
  template <int first, int last>
  DEVICE void multiply(const Shared& s, const Thread&, int tile, bool there) {
    constexpr int HALF_STEPS = 4 * HALF_CHUNKS;
    const u32 queries = descriptor_low(s.base + OFFSET_QUERIES);
    if (first == 0) pin(both);
    wgmma_fence();
#pragma unroll
    for (int step = first; step < last; step++) {
      const Turn at(2 * tile + step / HALF_STEPS, HALVES);
      if (step % HALF_STEPS == 0 && there) barrier_wait(s.half_full(at.slot), at.parity);
      const int i = step % HALF_STEPS;
      const u32 latents = descriptor_low(s.half(at.slot)) + i / 4 * (CHUNK / 16) + 2 * (i % 4);
      const u32 numbers = queries + step / 4 * (2 * CHUNK / 16) + 2 * (step % 4);
      wgmma_scores(both, descriptor(latents), descriptor(numbers), step > 0);
    }
    wgmma_commit();
  }
  DEVICE void drop() {
    wgmma_wait<0>();
    pin(both);
  }
  // In units of the rows' factors; positions are on their way.
  DEVICE void take(float (&x)[32], const Tokens& tokens, const Shared& s, const Thread&, int tile) {
    drop();
#pragma unroll
    for (int i = 0; i < 32; i++) x[i] = (both[i] + both[32 + i]) * tokens.scale[i / 2 % 2];
    pin(both);
    multiply_positions(x, s, tile);
  }
  DEVICE void wait_for_positions(float (&x)[32]) {
    wgmma_wait<AHEAD ? 1 : 0>();
    pin(x);
  }
};

// Operands of both k-steps from words [channel][16 tokens], block k of two channels.
constexpr int NIBBLES = 1;
DEVICE void make_operands(u32 (&a)[NIBBLES][2][4], const u32 (&channel)[4][4], int k) {
#pragma unroll
  for (int i = 0; i < 8; i++) a[0][i / 4][i % 4] = channel[2 * k + i % 2][i / 2];
}
