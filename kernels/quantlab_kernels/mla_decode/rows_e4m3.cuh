// E4M3 latents as operands of 8-bit MMA: in the scores where they lie, queries being sums of two E4M3 numbers; in the
// outputs turned on their way to registers, weights being one E4M3 number, in the order in which the scorers have them.

// Of two pairs of float16 numbers.
DEVICE u32 e4m3_four(u32 low, u32 high) {
  u32 r;
  asm("{\n.reg .b16 a, b;\ncvt.rn.satfinite.e4m3x2.f16x2 a, %1;\ncvt.rn.satfinite.e4m3x2.f16x2 b, %2;\n"
      "mov.b32 %0, {a, b};\n}" : "=r"(r) : "r"(low), "r"(high));
  return r;
}

// Four channels of a query, raised, as sums of two numbers. What float16 would round is beneath both.
DEVICE uint2 two_numbers(u32 a, u32 b, float raised) {
  const float2 x = unpack<QUERY>(a), y = unpack<QUERY>(b);
  const u32 low = Float16::pack(x.x * raised, x.y * raised), high = Float16::pack(y.x * raised, y.y * raised);
  const u32 first = e4m3_four(low, high);
  return {first, e4m3_four(minus(low, fp8_pair(first)), minus(high, fp8_pair(first >> 16)))};
}

// The larger of absolute values of two numbers of 16 bits each; signs are not theirs.
DEVICE u32 larger(u32 a, u32 b) {
  u32 r;
  if (QUERY == 1) asm("max.xorsign.abs.bf16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  if (QUERY == 2) asm("max.xorsign.abs.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  return r;
}
DEVICE u32 larger(uint4 x) { return larger(larger(x.x, x.y), larger(x.z, x.w)); }
// Of the 16 lanes that share a row.
DEVICE float largest(u32 most) {
#pragma unroll
  for (int i = 1; i < 16; i *= 2) most = larger(most, __shfl_xor_sync(~0u, most, i));
  const float2 both = unpack<QUERY>(most);
  return fmaxf(fabsf(both.x), fabsf(both.y));
}

// A lane's pieces lane + 16 i of row n, 16 bytes each, and its part of the row's position. The largest of a row comes
// near 128 by a power of two, `raised`, whose inverse is `lowered`.
constexpr int PIECES = L / 128;
DEVICE void stage_row(const uint4 (&latent)[PIECES], uint2 rope, u32 n, int last, const Params& p, u32 base) {
  const u32 lane = threadIdx.x % 16;
  u32 most = larger(rope.x, rope.y);
#pragma unroll
  for (int i = 0; i < PIECES; i++) most = larger(most, larger(latent[i]));
  const u32 exponent = max(__float_as_uint(largest(most)) >> 23, 27u);
  const float raised = __uint_as_float((260 - exponent) << 23), lowered = __uint_as_float((exponent - 6) << 23);
  const u32 to = base + OFFSET_QUERIES + swizzled(n, lane * 8);
#pragma unroll
  for (int i = 0; i < PIECES; i++) {
    const uint2 a = two_numbers(latent[i].x, latent[i].y, raised), b = two_numbers(latent[i].z, latent[i].w, raised);
    write(to + 2 * i * QUERY_CHUNK, uint2{a.x, b.x});
    write(to + (2 * i + 1) * QUERY_CHUNK, uint2{a.y, b.y});
  }
  const float2 a = unpack<QUERY>(rope.x), b = unpack<QUERY>(rope.y);
  write(to + 2 * CHUNKS * QUERY_CHUNK,
        uint2{pack<KEPT>(a.x * raised, a.y * raised), pack<KEPT>(b.x * raised, b.y * raised)});
  if (lane == 0) write_row(base, n, last, p.factor * lowered);
}

// A warp takes two rows at a time.
DEVICE void stage_queries(const Params& p, const Work& work, const Shared& s) {
  barrier_wait(s.queries_full(), 0);
  const u32 lane = threadIdx.x % 16;
#pragma unroll 1
  for (u32 n = threadIdx.x / 16; n < N; n += 2 * STAGING_WARPS) {
    const int row = work.first_row + n;
    const bool there = row < p.rows;
    uint4 latent[PIECES];
#pragma unroll
    for (int i = 0; i < PIECES; i++)
      latent[i] = there ? read<uint4>(s.raw_latent(n) + 256 * i + 16 * lane) : uint4{0, 0, 0, 0};
    const uint2 rope = there ? read<uint2>(s.raw_rope(n) + 8 * lane) : uint2{0, 0};
    stage_row(latent, rope, n, work.length - p.sq + min(query_of(p, row), p.sq - 1), p, s.base);
  }
}

constexpr int STEPS = 4 * CHUNKS;  // of 32 channels

struct Scores {
  float both[N];  // with the first and the second number of the queries
  // Products of a tile.
  DEVICE void multiply(const Shared& s, const Thread&, int tile) {
    constexpr int HALF_STEPS = 4 * HALF_CHUNKS;
    const u32 queries = descriptor_low(s.base + OFFSET_QUERIES);
    pin(both);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < STEPS; step++) {
      const Turn at(2 * tile + step / HALF_STEPS, HALVES);
      if (step % HALF_STEPS == 0) barrier_wait(s.half_full(at.slot), at.parity);
      const int i = step % HALF_STEPS;
      const u32 latents = descriptor_low(s.half(at.slot)) + i / 4 * (CHUNK / 16) + 2 * (i % 4);
      const u32 numbers = queries + step / 4 * (2 * QUERY_CHUNK / 16) + 2 * (step % 4);
      wgmma_scores(both, descriptor(latents), descriptor(numbers), step > 0);
    }
    wgmma_commit();
  }
  DEVICE void drop() {
    wgmma_wait<0>();
    pin(both);
  }
  // In units of the rows' factors; positions are on their way.
  DEVICE void take(float (&x)[N / 2], const Tokens& tokens, const Shared& s, const Thread&, int tile) {
    drop();
#pragma unroll
    for (int i = 0; i < N / 2; i++) x[i] = (both[i] + both[N / 2 + i]) * tokens.scale[i / 2 % 2];
    pin(both);
    multiply_positions(x, s, tile);
  }
  DEVICE void wait_for_positions(float (&x)[N / 2]) {
    wgmma_wait<0>();
    pin(x);
  }
};

// Tokens g and g + 8 of a warp lie side by side. Sums are of rounded weights, which are free of the roundings that all
// tokens share.
struct Weights {
  u32 four[(N + 31) / 32 * 4];  // both tokens of two rows; four words are stored at a time
  DEVICE void make(Softmax& softmax, const float (&x)[N / 2], const Tokens& tokens) {
    const float inverse[2] = {reciprocal(tokens.scale[0]), reciprocal(tokens.scale[1])};
#pragma unroll
    for (int j = 0; j < N / 8; j++) {
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const u16 pair = e4m3_pair(exp2_(x[4 * j + i]), exp2_(x[4 * j + i + 2]));
        const float2 rounded = e4m3_floats(pair);
        softmax.total[2 * j + i] += rounded.x * inverse[0] + rounded.y * inverse[1];
        four[j] = i == 0 ? pair : four[j] | static_cast<u32>(pair) << 16;
      }
    }
#pragma unroll
    for (int j = N / 8; j % 4 != 0; j++) four[j] = 0;
  }
  DEVICE void store(const Shared& s, int slot, const Thread& me) const {
#pragma unroll
    for (int j = 0; j < N / 8; j += 4)
      store_matrix_x4_transposed(s.weights(0) + swizzled(8 * j + me.lane, 64 * slot + 16 * me.warp), four[j],
                                 four[j + 1], four[j + 2], four[j + 3]);
  }
};

// Matrix units add 8-bit products with 13 bits or so: the products of a tile are added to float32 sums by themselves.
struct Outputs : Sums {
  DEVICE void add(u32 weights, u32 half, const Thread& me) {
#pragma unroll
    for (int i = 0; i < BLOCKS; i++) {
      const u32 codes = half + i / 2 * CHUNK + swizzled(me.lane, 32 * me.warp + i % 2 * 16);
      u32 a[2][4];
      turn(a[0], codes);
      turn(a[1], codes + 32 * 128);
      add_products(sum[i], a, weights);
    }
  }
  static DEVICE void add_products(float (&sum)[N / 2], u32 (&a)[2][4], u32 weights) {
    const u32 b = descriptor_low(weights);
    float x[N / 2];
    pin(a[0]);
    pin(a[1]);
    pin(x);
    wgmma_fence();
    wgmma_outputs(x, a[0], descriptor(b), 0);
    wgmma_outputs(x, a[1], descriptor(b + 2), 1);
    wgmma_commit();
    wgmma_wait<0>();
    pin(x);
    pin(a[0]);
    pin(a[1]);
#pragma unroll
    for (int i = 0; i < N / 2; i++) sum[i] += x[i];
  }
  DEVICE void finish(const Shared&, const Thread&) {}

  // Averages of rows from the `first`th on.
  DEVICE void store(char* to, const Params& p, const Work& work, const Shared& s, const Thread& me, i64 first) const {
    const int channel = me.half() * (L / 2) + 32 * me.warp + 2 * me.g;
    const int left = p.rows - work.first_row - 2 * me.t;
    char* at = to + ((first + 2 * me.t) * L + channel) * 2;
#pragma unroll
    for (int j = 0; j < N / 8; j++) {
      const float2 both = read<float2>(s.base + OFFSET_TOTAL + (8 * j + 2 * me.t) * 4);
#pragma unroll
      for (int r = 0; r < 2; r++) {
        if (8 * j + r >= left) continue;
        const float by = r ? both.y : both.x;
#pragma unroll
        for (int i = 0; i < BLOCKS; i++) {
          const float* x = sum[i] + 4 * j + r;
          store_two<QUERY>(at, (8 * j + r) * L + i / 2 * 128 + i % 2 * 16, x[0] * by, x[2] * by);
        }
      }
    }
  }
};
