// E4M3 and INT4 latents as operands of 8-bit MMA in rows.cu. Queries are sums of two E4M3 numbers, weights are rounded
// to one.
//
// The second product is transposed, channels on M, because 8-bit operands in shared memory must have tokens side by
// side and those in registers can be arranged: four words of four channels are turned by permutations of bytes. Weights
// lie in the order in which tokens are read without bank conflicts. Matrix units add 8-bit products with 13 bits or so:
// the products of a tile are added to float32 sums by themselves.
//
// INT4 codes become E4M3 numbers, which have all odd numbers to 15: two tiles ahead, by the warpgroups that add
// outputs, each those that it will read. A half of a tile is then 128 channels and the 128 that share their bytes.

DEVICE u16 e4m3_pair(float low, float high) {
  u16 r;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(r) : "f"(high), "f"(low));
  return r;
}
DEVICE float2 e4m3_floats(u16 pair) {
  const u32 halves = fp8_pair(pair);
  return {Float16::unpack(halves & 0xFFFF), Float16::unpack(halves >> 16)};
}
DEVICE u32 e4m3_four(const float* x) { return e4m3_pair(x[0], x[1]) | static_cast<u32>(e4m3_pair(x[2], x[3])) << 16; }

// Four channels of a query, raised, as sums of two numbers.
DEVICE void write_numbers(u32 to, const float* x, float raised) {
  float four[4], rest[4];
#pragma unroll
  for (int k = 0; k < 4; k++) four[k] = x[k] * raised;
  const u32 first = e4m3_four(four);
  const float2 low = e4m3_floats(static_cast<u16>(first)), high = e4m3_floats(static_cast<u16>(first >> 16));
  rest[0] = four[0] - low.x, rest[1] = four[1] - low.y, rest[2] = four[2] - high.x, rest[3] = four[3] - high.y;
  write(to, __uint_as_float(first));
  write(to + CHUNKS * CHUNK, __uint_as_float(e4m3_four(rest)));
}

// Rows of queries, the largest of each near 128 by a power of two, as two E4M3 numbers; a warp takes a row.
DEVICE void stage_queries(const Params& p, const Work& work, u32 base) {
  const int lane = threadIdx.x % 32;
#pragma unroll 3
  for (int n = threadIdx.x / 32; n < 64; n += THREADS / 32) {
    const int row = work.first_row + n, head = row % p.heads, query = row / p.heads;
    const char* latent = p.q_latent + 2 * (work.batch * p.ql_batch + query * p.ql_token + head * p.ql_head);
    const char* rope = p.q_rope + 2 * (work.batch * p.qr_batch + query * p.qr_token + head * p.qr_head);
    float x[L / 32], turned[2], most = 0.0f;
#pragma unroll
    for (int i = 0; i < L / 256; i++) {
      const uint4 piece = row < p.rows ? load_piece(latent + 512 * i + 16 * lane) : uint4{0, 0, 0, 0};
      const u32 words[4] = {piece.x, piece.y, piece.z, piece.w};
#pragma unroll
      for (int j = 0; j < 8; j++) {
        const u16 bits = static_cast<u16>(words[j / 2] >> (16 * (j % 2)));
        x[8 * i + j] = QUERY == 1 ? BFloat16::unpack(bits) : Float16::unpack(bits);
      }
    }
#pragma unroll
    for (int j = 0; j < 2; j++) turned[j] = row < p.rows ? load_float<QUERY>(rope, 2 * lane + j) : 0.0f;
#pragma unroll
    for (int i = 0; i < L / 32; i++) most = fmaxf(most, fabsf(x[i]));
    most = fmaxf(most, fmaxf(fabsf(turned[0]), fabsf(turned[1])));
#pragma unroll
    for (int i = 1; i < 32; i *= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, i));
    const u32 exponent = max(__float_as_uint(most) >> 23, 27u);
    const float raised = __uint_as_float((260 - exponent) << 23);
#pragma unroll
    for (int i = 0; i < L / 256; i++) {
      const int chunk = PACKED ? lane / 16 * 2 + i : 2 * i + lane / 16;
      const u32 to = base + OFFSET_QUERIES + chunk * CHUNK + swizzled(n, lane % 16 * 8);
      write_numbers(to, x + 8 * i, raised);
      write_numbers(to + 4, x + 8 * i + 4, raised);
    }
    const u32 both = pack<KEPT>(turned[0] * raised, turned[1] * raised);
    write(base + OFFSET_QUERIES + 2 * CHUNKS * CHUNK + swizzled(n, 4 * lane), __uint_as_float(both));
    if (lane == 0) write(base + OFFSET_FACTOR + 4 * n, p.factor / raised);
  }
}
struct Queries {
  DEVICE void load(const Params&, const Work&, const Shared&, const Thread&) {
    if (PACKED) named_barrier_sync(14, THREADS);
  }
};

DEVICE void multiply_latents(float (&x)[32], const Shared& s, int tile) {
  const u32 a = descriptor_low(s.base + OFFSET_QUERIES);
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const Turn at(2 * tile + half, HALVES);
    barrier_wait(s.half_full(at.slot), at.parity);
    const u32 b = descriptor_low(s.half(at.slot));
#pragma unroll
    for (int i = 0; i < 4 * HALF_CHUNKS; i++) {
      const u64 tokens = descriptor(b + i / 4 * (CHUNK / 16) + 2 * (i % 4));
#pragma unroll
      for (int part = 0; part < 2; part++) {
        const int chunk = part * CHUNKS + half * HALF_CHUNKS + i / 4;
        wgmma_scores(x, descriptor(a + chunk * (CHUNK / 16) + 2 * (i % 4)), tokens, half + i + part > 0);
      }
    }
  }
}

// Scores of the tile and logarithms of its tokens' scales, in powers of two.
DEVICE void compute_scores(float (&x)[32], const Queries&, const Shared& s, const Thread& me, const float (&factor)[2],
                           int tile, u32 scales) {
  float rope[32];
  pin(x);
  pin(rope);
  wgmma_fence();
  multiply_latents(x, s, tile);
  const Turn at(tile, ROPES);
  barrier_wait(s.rope_full(at.slot), at.parity);
  const u32 a = descriptor_low(s.base + OFFSET_QUERIES + 2 * CHUNKS * CHUNK), b = descriptor_low(s.rope(at.slot));
#pragma unroll
  for (int i = 0; i < 4; i++) wgmma_rope(rope, descriptor(a + 2 * i), descriptor(b + 2 * i), i > 0);
  wgmma_commit();
  wgmma_wait<0>();
  pin(x);
  pin(rope);
#pragma unroll
  for (int j = 0; j < 8; j++) {
    const float2 scale = read<float2>(scales + (8 * j + 2 * me.t) * 4);
    const float2 added = read<float2>(scales + LOGARITHMS + (8 * j + 2 * me.t) * 4);
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const float score = fmaf(x[4 * j + i], i % 2 ? scale.y : scale.x, rope[4 * j + i]);
      x[4 * j + i] = fmaf(score, factor[i / 2], i % 2 ? added.y : added.x);
    }
  }
}

// Token 8 j + 2 t + e is element 32 (j / 4) + 16 (j / 2 % 2) + 4 t + 2 (j % 2) + e. Sums are of rounded weights, which
// are free of the roundings that all tokens share.
DEVICE void write_weights(Softmax& softmax, float (&x)[32], const Shared& s, int slot, u32 scales, const Thread& me) {
  float sum[2][4] = {};
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const float2 first = read<float2>(scales + INVERSES + (16 * i + 2 * me.t) * 4);
    const float2 second = read<float2>(scales + INVERSES + (16 * i + 8 + 2 * me.t) * 4);
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const float* y = x + 8 * i + 2 * r;
      const u16 low = e4m3_pair(y[0], y[1]), high = e4m3_pair(y[4], y[5]);
      const u32 to = s.base + OFFSET_P + swizzled(16 * me.warp + me.g + 8 * r, slot * P_STEP + 16 * i) + 4 * me.t;
      write(to, __uint_as_float(low | static_cast<u32>(high) << 16));
      const float2 a = e4m3_floats(low), b = e4m3_floats(high);
      sum[r][0] += a.x * first.x, sum[r][1] += a.y * first.y, sum[r][2] += b.x * second.x, sum[r][3] += b.y * second.y;
    }
  }
#pragma unroll
  for (int r = 0; r < 2; r++) softmax.total[r] += (sum[r][0] + sum[r][1]) + (sum[r][2] + sum[r][3]);
}
constexpr int BLOCKS = L / 128;  // of 64 channels

struct Outputs {
  float sum[BLOCKS][32];
  DEVICE void clear() {
#pragma unroll
    for (int i = 0; i < 32 * BLOCKS; i++) sum[i / 32][i % 32] = 0.0f;
  }
  DEVICE void rescale(u32 from, const Thread& me) {
    float2 by[8];
    bool changed = false;
#pragma unroll
    for (int j = 0; j < 8; j++) {
      by[j] = read<float2>(from + (8 * j + 2 * me.t) * 4);
      changed |= by[j].x != 1.0f || by[j].y != 1.0f;
    }
    if (!__any_sync(~0u, changed)) return;
#pragma unroll
    for (int i = 0; i < 32 * BLOCKS; i++) sum[i / 32][i % 32] *= i % 2 ? by[i % 32 / 4].y : by[i % 32 / 4].x;
  }
  // Codes of 4 channels of tokens 8 j + 2 t + {0, 1}, j twice `pair` and one more, become 4 tokens of each channel.
  static DEVICE void turn(u32 (&channel)[4], u32 chunk, int pair, const Thread& me) {
    u32 word[4];
#pragma unroll
    for (int i = 0; i < 4; i++)
      word[i] = read<u32>(chunk + swizzled(16 * pair + i / 2 * 8 + 2 * me.t + i % 2, 32 * me.warp + 4 * me.g));
    const u32 a = __byte_perm(word[0], word[1], 0x5140), b = __byte_perm(word[2], word[3], 0x5140);
    const u32 c = __byte_perm(word[0], word[1], 0x7362), d = __byte_perm(word[2], word[3], 0x7362);
    channel[0] = __byte_perm(a, b, 0x5410), channel[1] = __byte_perm(a, b, 0x7632);
    channel[2] = __byte_perm(c, d, 0x5410), channel[3] = __byte_perm(c, d, 0x7632);
  }
  // Two products of 32 rows are under way while those before them are added.
  DEVICE void add(u32 weights, u32 half, const Thread& me) {
    const u32 b = descriptor_low(weights);
    u32 a[2][2][4];  // of both k-steps, for two blocks
    float x[2][16];
#pragma unroll
    for (int c = 0; c < HALF_CHUNKS; c++) {
#pragma unroll
      for (int i = 0; i < 4; i++) {
        u32 channel[4];
        turn(channel, half + c * CHUNK, i, me);
        a[i / 2][0][i % 2 * 2] = channel[0], a[i / 2][0][i % 2 * 2 + 1] = channel[1];
        a[i / 2][1][i % 2 * 2] = channel[2], a[i / 2][1][i % 2 * 2 + 1] = channel[3];
      }
#pragma unroll
      for (int i = 0; i < 4; i++) pin(a[i / 2][i % 2]);
#pragma unroll
      for (int unit = 0; unit < 5; unit++) {  // block unit / 2, rows 32 (unit % 2) and on
        if (unit < 4) {
          float(&now)[16] = x[unit % 2];
          const u32 rows = b + unit % 2 * (32 * 128 / 16);
          pin(now);
          wgmma_fence();
          wgmma_outputs(now, a[0][unit / 2], descriptor(rows), 0);
          wgmma_outputs(now, a[1][unit / 2], descriptor(rows + 2), 1);
          wgmma_commit();
        }
        if (unit == 0) continue;
        if (unit < 4)
          wgmma_wait<1>();
        else
          wgmma_wait<0>();
        const int done = unit - 1;
        pin(x[done % 2]);
#pragma unroll
        for (int i = 0; i < 16; i++) sum[2 * c + done / 2][done % 2 * 16 + i] += x[done % 2][i];
        pin(x[done % 2]);
      }
#pragma unroll
      for (int i = 0; i < 4; i++) pin(a[i / 2][i % 2]);
    }
  }
  static DEVICE void pin(u32 (&x)[4]) { asm volatile("" : "+r"(x[0]), "+r"(x[1]), "+r"(x[2]), "+r"(x[3])::"memory"); }
  template <int n>
  static DEVICE void pin(float (&x)[n]) {
    ::pin(x);
  }

  template <int KIND>
  DEVICE void store(char* to, const Params& p, const Work& work, const Shared& s, const Thread& me, i64 rows) const {
#pragma unroll
    for (int j = 0; j < 16; j++) {
      const int n = j / 2 * 8 + 2 * me.t + j % 2, row = work.first_row + n;
      if (row >= p.rows) continue;
      const float by = read<float>(s.base + OFFSET_TOTAL + 4 * n);
#pragma unroll
      for (int c = 0; c < HALF_CHUNKS; c++) {
        const int i = j / 2 * 4 + j % 2, half = me.group - 1;
        const int first = PACKED ? c * (L / 2) + half * 128 : (half * HALF_CHUNKS + c) * 128;
        const int channel = first + 32 * me.warp + 4 * me.g;
        const float(&low)[32] = sum[2 * c], (&high)[32] = sum[2 * c + 1];
        const float four[4] = {low[i] * by, low[i + 2] * by, high[i] * by, high[i + 2] * by};
        store_four<KIND>(to, (rows + row) * L + channel, four);
      }
    }
  }
};
#if FORMAT == 3
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

// This warpgroup's half of a tile to where both products read it.
DEVICE void unpack_half(const Shared& s, const Thread& me, int number) {
  const Turn from(number, RAWS), to(number, HALVES);
  const u32 raw = s.fetched(from.slot), half = s.half(to.slot);
  barrier_wait(s.fetched_full(from.slot), from.parity);
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const u32 at = swizzled(me.index / 2, me.index % 2 * 64 + 16 * i);
    const uint4 x = read<uint4>(raw + at);
    uint4 low, high;
    unpack(low.x, high.x, x.x), unpack(low.y, high.y, x.y), unpack(low.z, high.z, x.z), unpack(low.w, high.w, x.w);
    write(half + at, low);
    write(half + CHUNK + at, high);
  }
  async_proxy_fence();
  announce(me, s.half_full(to.slot));
}

// The first halves, before the place of queries is theirs.
DEVICE void unpack_first(const Params& p, const Work& work, const Shared& s, const Thread& me) {
  const int number = me.group - 1;
  for (int tile = 0; tile < min(AHEAD, work.count); tile++) unpack_half(s, me, 2 * tile + number);
  named_barrier_sync(14, THREADS);
  if (me.index != 0) return;
  for (int tile = 0; tile < AHEAD; tile++) {
    const int next = 2 * tile + number + RAWS;
    if (next < 2 * work.count) fetch_half(p, work, s, next);
  }
}
#endif
