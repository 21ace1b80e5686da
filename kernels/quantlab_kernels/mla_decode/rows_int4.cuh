// INT4 latents, odd numbers 2 code - 15, of which both products take what they want in registers: the scores 8 times
// them as INT8, queries being INT8 numbers with a scale, the outputs codes as float16, as weights are. A nibble in a
// float16 whose other bits are 0 is 2^-24 or 2^-20 of it: operands are masked, not converted, and 15 times the sum of
// the weights is subtracted at the end.

constexpr int PIECES = L / 64;  // of 16 bytes of a query that a lane takes

// The larger of absolute values, as bits of two numbers of 16.
DEVICE u32 larger(u32 most, u32 x) {
  u32 r;
  asm("max.u16x2 %0, %1, %2;" : "=r"(r) : "r"(most), "r"(x & 0x7FFF7FFFu));
  return r;
}
DEVICE u32 larger(u32 most, uint4 x) { return larger(larger(larger(larger(most, x.x), x.y), x.z), x.w); }
// Of the eight lanes that share a row.
DEVICE float largest(u32 most) {
#pragma unroll
  for (int i = 1; i < 8; i *= 2) most = larger(most, __shfl_xor_sync(~0u, most, i));
  const u16 bits = static_cast<u16>(max(most & 0xFFFF, most >> 16));
  return QUERY == 1 ? BFloat16::unpack(bits) : Float16::unpack(bits);
}
// The power of two by which it comes near 128.
DEVICE float raising(float most) { return __uint_as_float((260 - max(__float_as_uint(most) >> 23, 27u)) << 23); }

DEVICE void write_positions(u32 base, int n, uint4 piece, float raised) {
  float x[8];
  unpack<QUERY>(x, piece);
  write(base + OFFSET_QUERIES + (QUERY_CHUNKS - 1) * QUERY_CHUNK + swizzled(n, threadIdx.x % 8 * 16),
        uint4{pack<KEPT>(x[0] * raised, x[1] * raised), pack<KEPT>(x[2] * raised, x[3] * raised),
              pack<KEPT>(x[4] * raised, x[5] * raised), pack<KEPT>(x[6] * raised, x[7] * raised)});
}

// A lane's pieces lane % 8 + 8 i of row n, and its piece of the row's position, raised to near 128 by a power of two.
DEVICE void stage_row(const uint4 (&latent)[PIECES], uint4 rope, int n, int last, const Params& p, u32 base) {
  constexpr float INTEGERS = 12582912.0f;  // 1.5 * 2^23, to which an integer is added as it is
  const int lane = threadIdx.x % 8;
  u32 each[2] = {0, 0};
#pragma unroll
  for (int i = 0; i < PIECES; i++) each[i % 2] = larger(each[i % 2], latent[i]);
  const u32 bits = larger(each[0], each[1]);
  const float most = fmaxf(largest(bits), 1e-30f), raised = raising(largest(larger(bits, rope))), by = 127.0f / most;
#pragma unroll
  for (int i = 0; i < PIECES; i++) {
    const int piece = 8 * i + lane;
    float x[8];
    unpack<QUERY>(x, latent[i]);
#pragma unroll
    for (int j = 0; j < 2; j++) {
      u32 code[4];
#pragma unroll
      for (int k = 0; k < 4; k++) code[k] = __float_as_uint(fmaf(x[4 * j + k], by, INTEGERS));
      const u32 low = __byte_perm(code[0], code[1], 0x0040), high = __byte_perm(code[2], code[3], 0x0040);
      const int step = piece % 32 / 16 * 8 + piece % 4 * 2 + j;
      const int column = step % 4 * 32 + piece / 32 * 16 + piece % 16 / 4 * 4;
      write(base + OFFSET_QUERIES + step / 4 * QUERY_CHUNK + swizzled(n, column), __byte_perm(low, high, 0x5410));
    }
  }
  write_positions(base, n, rope, raised);
  if (lane == 0) write_row(base, n, last, p.factor / raised);
  if (lane == 0) write(base + OFFSET_UNITS + 4 * n, most * raised / (8.0f * 127.0f));
}

// A warp takes four rows at a time.
DEVICE void stage_queries(const Params& p, const Work& work, const Shared& s) {
  barrier_wait(s.queries_full(), 0);
  const int lane = threadIdx.x % 32;
#pragma unroll 1
  for (int n = threadIdx.x / 32 * 4 + lane / 8; n < N; n += 4 * STAGING_WARPS) {
    const int row = work.first_row + n;
    const bool there = row < p.rows;
    uint4 latent[PIECES];
#pragma unroll
    for (int i = 0; i < PIECES; i++)
      latent[i] = there ? read<uint4>(s.raw_latent(n) + (8 * i + lane % 8) * 16) : uint4{0, 0, 0, 0};
    const uint4 rope = there ? read<uint4>(s.raw_rope(n) + lane % 8 * 16) : uint4{0, 0, 0, 0};
    stage_row(latent, rope, n, work.length - p.sq + min(query_of(p, row), p.sq - 1), p, s.base);
  }
}

struct Scores {
  int sums[N / 2];
  u32 a[2][4];
  // Products of a tile: 16 bytes of each of two tokens are four steps of 32 channels, two of which are made at a time.
  DEVICE void multiply(const Shared& s, const Thread& me, int tile) {
    const u32 queries = descriptor_low(s.base + OFFSET_QUERIES);
    pin(sums);
#pragma unroll
    for (int part = 0; part < 4; part++) {
      const Turn at(2 * tile + part / 2, HALVES);
      if (part % 2 == 0) barrier_wait(s.half_full(at.slot), at.parity);
      uint4 four[2];
#pragma unroll
      for (int r = 0; r < 2; r++)
        four[r] = read<uint4>(s.half(at.slot) + swizzled(16 * me.warp + me.g + 8 * r, 32 * me.t + 16 * (part % 2)));
#pragma unroll
      for (int i = 0; i < 4; i += 2) {
        if (part + i > 0) wgmma_wait<0>();
        pin_operands();
#pragma unroll
        for (int r = 0; r < 2; r++) {
          make(r, 0, i == 0 ? four[r].x : four[r].z);
          make(r, 1, i == 0 ? four[r].y : four[r].w);
        }
        pin_operands();
        wgmma_fence();
#pragma unroll
        for (int j = 0; j < 2; j++)
          wgmma_scores(sums, a[j], descriptor(queries + part * (QUERY_CHUNK / 16) + 2 * (i + j)), part + i + j > 0);
        wgmma_commit();
      }
    }
  }
  // A word of nibbles as INT8 numbers.
  DEVICE void make(int r, int step, u32 word) {
    a[step][r] = ((word << 4) & 0xF0F0F0F0u) ^ 0x88888888u;
    a[step][r + 2] = (word & 0xF0F0F0F0u) ^ 0x88888888u;
  }
  DEVICE void drop() {
    wgmma_wait<0>();
    pin(sums);
    pin_operands();
  }
  // In units of the factor; positions are on their way.
  DEVICE void take(float (&x)[N / 2], const Tokens& tokens, const Shared& s, const Thread& me, int tile) {
    drop();
#pragma unroll
    for (int j = 0; j < N / 8; j++) {
      const float2 unit = read<float2>(s.base + OFFSET_UNITS + (8 * j + 2 * me.t) * 4);
#pragma unroll
      for (int i = 0; i < 4; i++)
        x[4 * j + i] = static_cast<float>(sums[4 * j + i]) * (tokens.scale[i / 2] * (i % 2 ? unit.y : unit.x));
    }
    multiply_positions(x, s, tile);
  }
  DEVICE void wait_for_positions(float (&x)[N / 2]) {
    wgmma_wait<0>();
    pin(x);
  }

 private:
  static DEVICE void pin(int (&x)[N / 2]) {
#pragma unroll
    for (int i = 0; i < N / 2; i++) asm volatile("" : "+r"(x[i])::"memory");
  }
  static DEVICE void pin(float (&x)[N / 2]) { ::pin(x); }
  DEVICE void pin_operands() {
#pragma unroll
    for (int i = 0; i < 8; i++) asm volatile("" : "+r"(a[i / 4][i % 4])::"memory");
  }
};

constexpr int PIECE = 1024;  // of weights: 8 tokens of each row
struct Weights {
  u32 pairs[N / 4];
  DEVICE void make(Softmax& softmax, float (&x)[N / 2], const Tokens& tokens) {
    const float inverse[2] = {reciprocal(tokens.scale[0]), reciprocal(tokens.scale[1])};
#pragma unroll
    for (int i = 0; i < N / 2; i++) x[i] = exp2_(x[i]);
#pragma unroll
    for (int i = 0; i < N / 4; i++) {
      const float a = x[i / 2 * 4 + i % 2], b = x[i / 2 * 4 + i % 2 + 2];
      softmax.total[i] += a * inverse[0] + b * inverse[1];
      pairs[i] = pack<2>(x[2 * i], x[2 * i + 1]);
    }
  }
  DEVICE void store(const Shared& s, int slot, const Thread& me) const {
#pragma unroll
    for (int j = 0; j < N / 8; j += 2) {
      const int row = 8 * (j + me.lane / 16) + me.lane % 8, piece = 2 * me.warp + me.lane / 8 % 2;
      store_matrix_x4_transposed(s.weights(slot) + piece * PIECE + 16 * row, pairs[2 * j], pairs[2 * j + 1],
                                 pairs[2 * j + 2], pairs[2 * j + 3]);
    }
  }
};

constexpr int UNITS = 8;  // of 16 tokens and two blocks, low and high nibbles of two of four bytes

struct Outputs : Sums {
  float weight[4] = {};  // sums of rows 16 warp + g and 8 below over half of the tokens, twice each
  DEVICE void rescale(u32 from, const Thread& me) {
    Sums::rescale(from, me);
    weight[0] *= read<float>(from + (16 * me.warp + me.g) * 4);
    weight[2] *= read<float>(from + (16 * me.warp + me.g + 8) * 4);
  }
  // Bytes 16 (i / 2) + 2 g and + 1 of tokens 16 k + 8 (i % 2) + 2 t and + 1.
  static DEVICE void fetch(u32 (&pairs)[4], u32 half, int k, const Thread& me) {
    const int token = 16 * k + me.lane % 16, byte = 32 * me.warp + me.lane / 16 * 16;
    load_matrix_x4_transposed(pairs, half + swizzled(token, byte));
  }
  DEVICE void add(u32 weights, u32 half, const Thread& me) {
    u32 pairs[4], a[2][4];
    fetch(pairs, half, 0, me);
    add_weights(weights, me);
#pragma unroll
    for (int i = 0; i < BLOCKS; i++) pin(sum[i]);
#pragma unroll
    for (int unit = 0; unit < UNITS; unit++) {
      if (unit > 0) wgmma_wait<0>();
      pin(a[0]);
      pin(a[1]);
      make_operands(a, pairs, unit % 2);
      pin(a[0]);
      pin(a[1]);
      wgmma_fence();
#pragma unroll
      for (int i = 0; i < 2; i++)
        wgmma_outputs(sum[unit % 2 * 2 + i], a[i], plain_descriptor(weights + unit / 2 * 2 * PIECE), 1);
      wgmma_commit();
      if (unit % 2 && unit + 1 < UNITS) fetch(pairs, half, unit / 2 + 1, me);
    }
    wgmma_wait<0>();
#pragma unroll
    for (int i = 0; i < BLOCKS; i++) pin(sum[i]);
    pin(a[0]);
    pin(a[1]);
  }
  // Low nibbles of half of the bytes, and high ones.
  static DEVICE void make_operands(u32 (&a)[2][4], const u32 (&pairs)[4], int part) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const u32 w = pairs[2 * part + i];
      a[0][2 * i] = w & 0x000F000Fu, a[0][2 * i + 1] = w >> 8 & 0x000F000Fu;
      a[1][2 * i] = w & 0x00F000F0u, a[1][2 * i + 1] = w >> 8 & 0x00F000F0u;
    }
  }
  // Weights of half of the tokens, times ones.
  DEVICE void add_weights(u32 weights, const Thread& me) {
#pragma unroll
    for (int k = 0; k < 2; k++) {
      const int row = 16 * me.warp + me.lane % 16, piece = 4 * me.half() + 2 * k + me.lane / 16;
      u32 a[4];
      load_matrix_x4(a, weights + piece * PIECE + 16 * row);
      asm volatile(
          "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %8}, "
          "{%0, %1, %2, %3};"
          : "+f"(weight[0]), "+f"(weight[1]), "+f"(weight[2]), "+f"(weight[3])
          : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(0x3C003C00u));
    }
  }
  // Sums of weights, for all threads that add outputs.
  DEVICE void finish(const Shared& s, const Thread& me) const {
    const u32 to = s.base + OFFSET_WEIGHTS + me.half() * 256 + (16 * me.warp + me.g) * 4;
    if (me.t == 0) write(to, weight[0]), write(to + 32, weight[2]);
    barrier_arrive(s.totals_full());
  }

  // Averages of rows from the `first`th on.
  DEVICE void store(char* to, const Params& p, const Work& work, const Shared& s, const Thread& me, i64 first) const {
    constexpr float UNIT[2] = {33554432.0f, 2097152.0f};  // 2^25, 2^21
    const int channel = me.half() * 128 + 32 * me.warp + 2 * me.g, left = p.rows - work.first_row - 2 * me.t;
    char* at = to + ((first + 2 * me.t) * L + channel) * 2;
#pragma unroll
    for (int j = 0; j < N / 8; j++) {
      const u32 rows = (8 * j + 2 * me.t) * 4, weights = s.base + OFFSET_WEIGHTS + rows;
      const float2 both = read<float2>(s.base + OFFSET_TOTAL + rows);
      const float2 even = read<float2>(weights), odd = read<float2>(weights + 256);
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int r = i % 2, nibble = i / 2;
        const float total = r ? both.y : both.x, less = 15.0f * (r ? even.y + odd.y : even.x + odd.x) * total;
        const float by = total * UNIT[nibble], *low = sum[nibble] + 4 * j + r, *high = sum[nibble + 2] + 4 * j + r;
        const int to = (8 * j + r) * L + nibble * (L / 2);
        if (8 * j + r >= left) continue;
        store_two<QUERY>(at, to, low[0] * by - less, low[2] * by - less);
        store_two<QUERY>(at, to + 16, high[0] * by - less, high[2] * by - less);
      }
    }
  }
};
