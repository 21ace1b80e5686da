// INT4 latents, odd numbers 2 code - 15, of which both products take what they want in registers: 8 times them as INT8,
// queries being INT8 numbers with a scale, and themselves as E4M3.

// Positions are raised to near 128 by a power of two.
DEVICE void stage_query(const float (&x)[L / 32], float2 turned, int n, int last, const Params& p, u32 base) {
  const int lane = threadIdx.x % 32;
  float most = 1e-30f, all = fmaxf(fabsf(turned.x), fabsf(turned.y));
#pragma unroll
  for (int i = 0; i < L / 32; i++) most = fmaxf(most, fabsf(x[i]));
#pragma unroll
  for (int i = 1; i < 32; i *= 2) {
    most = fmaxf(most, __shfl_xor_sync(~0u, most, i));
    all = fmaxf(all, __shfl_xor_sync(~0u, all, i));
  }
  const u32 exponent = max(__float_as_uint(fmaxf(most, all)) >> 23, 27u);
  const float raised = __uint_as_float((260 - exponent) << 23), by = 127.0f / most;
#pragma unroll
  for (int i = 0; i < L / 256; i++) {
#pragma unroll
    for (int j = 0; j < 2; j++) {
      u32 four = 0;
#pragma unroll
      for (int k = 0; k < 4; k++) four |= (__float2int_rn(x[8 * i + 4 * j + k] * by) & 255) << (8 * k);
      const int step = lane / 16 * 8 + lane % 4 * 2 + j;
      write(base + OFFSET_QUERIES + step / 4 * CHUNK + swizzled(n, step % 4 * 32 + 16 * i + lane % 16 / 4 * 4),
            __uint_as_float(four));
    }
  }
  const u32 pair = pack<KEPT>(turned.x * raised, turned.y * raised);
  write(base + OFFSET_QUERIES + 2 * CHUNKS * CHUNK + swizzled(n, 4 * lane), __uint_as_float(pair));
  if (lane == 0) write_row(base, n, last, p.factor / raised);
  if (lane == 0) write(base + OFFSET_UNITS + 4 * n, most * raised / (8.0f * 127.0f));
}

constexpr int STEPS = 16;  // of 32 channels

struct Scores {
  int sums[32];
  u32 a[4][4];
  // Products of some groups of four steps of a tile, which is waited for if it is `there`.
  template <int first, int last>
  DEVICE void multiply(const Shared& s, const Thread& me, int tile, bool there) {
    const u32 queries = descriptor_low(s.base + OFFSET_QUERIES);
    if (first == 0) pin(sums);
#pragma unroll
    for (int part = first / 4; part < last / 4; part++) {
      const Turn at(2 * tile + part / 2, HALVES);
      if (part % 2 == 0 && there) barrier_wait(s.half_full(at.slot), at.parity);
      if (part > 0) wgmma_wait<0>();
      pin_operands();
      load(s.half(at.slot) + part % 2 * 0, part % 2, me);
      pin_operands();
      wgmma_fence();
#pragma unroll
      for (int i = 0; i < 4; i++)
        wgmma_scores(sums, a[i], descriptor(queries + part * (CHUNK / 16) + 2 * i), part + i > 0);
      wgmma_commit();
    }
  }
  // Words 4 part to + 3 of the eight that the thread has of two tokens, as INT8 numbers.
  DEVICE void load(u32 chunk, int part, const Thread& me) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const uint4 four = read<uint4>(chunk + swizzled(16 * me.warp + me.g + 8 * r, 32 * me.t + 16 * part));
      const u32 word[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
      for (int i = 0; i < 4; i++) {
        a[i][r] = ((word[i] << 4) & 0xF0F0F0F0u) ^ 0x88888888u;
        a[i][r + 2] = (word[i] & 0xF0F0F0F0u) ^ 0x88888888u;
      }
    }
  }
  DEVICE void drop() {
    wgmma_wait<0>();
    pin(sums);
    pin_operands();
  }
  // In units of the factor; positions are on their way.
  DEVICE void take(float (&x)[32], const Tokens& tokens, const Shared& s, const Thread& me, int tile) {
    drop();
#pragma unroll
    for (int j = 0; j < 8; j++) {
      const float2 unit = read<float2>(s.base + OFFSET_UNITS + (8 * j + 2 * me.t) * 4);
#pragma unroll
      for (int i = 0; i < 4; i++)
        x[4 * j + i] = static_cast<float>(sums[4 * j + i]) * (tokens.scale[i / 2] * (i % 2 ? unit.y : unit.x));
    }
    pin(sums);
    multiply_positions(x, s, tile);
  }
  DEVICE void wait_for_positions(float (&x)[32]) {
    wgmma_wait<AHEAD ? 1 : 0>();
    pin(x);
  }

 private:
  static DEVICE void pin(int (&x)[32]) {
#pragma unroll
    for (int i = 0; i < 32; i++) asm volatile("" : "+r"(x[i])::"memory");
  }
  static DEVICE void pin(float (&x)[32]) { ::pin(x); }
  DEVICE void pin_operands() {
#pragma unroll
    for (int i = 0; i < 16; i++) asm volatile("" : "+r"(a[i / 4][i % 4])::"memory");
  }
};

// Bytes of a word's low nibbles (codes of E4M3 numbers 2 c - 15) and of its high ones.
DEVICE void unpack(u32& low, u32& high, u32 word) {
  constexpr u32 MAGNITUDES[2] = {0x4E4A4438, 0x57555351};  // 1, 3, 5, 7 and 9, 11, 13, 15
  const u32 negative = ~word & 0x88888888u;                // where 7 - c is the place of the magnitude, not c - 8
  const u32 place = (word & 0x77777777u) ^ (negative - (negative >> 3));
  const u32 a = __byte_perm(MAGNITUDES[0], MAGNITUDES[1], place);
  const u32 b = __byte_perm(MAGNITUDES[0], MAGNITUDES[1], place >> 16);
  low = __byte_perm(a, b, 0x6420) | (negative << 4 & 0x80808080u);
  high = __byte_perm(a, b, 0x7531) | (negative & 0x80808080u);
}

// Operands of low and high nibbles, of both k-steps, from words [channel][16 tokens], block k of two channels.
constexpr int NIBBLES = 2;
DEVICE void make_operands(u32 (&a)[NIBBLES][2][4], const u32 (&channel)[4][4], int k) {
#pragma unroll
  for (int i = 0; i < 8; i++) unpack(a[0][i / 4][i % 4], a[1][i / 4][i % 4], channel[2 * k + i % 2][i / 2]);
}
