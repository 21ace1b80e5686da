// E4M3 latents as operands of 8-bit MMA: in the scores where they lie, queries being sums of two E4M3 numbers; in the
// outputs turned on their way to registers, weights being one E4M3 number, in the order in which the scorers have them.

// Of two pairs of float16 numbers.
DEVICE u32 e4m3_four(u32 low, u32 high) {
  u32 r;
  asm("{\n.reg .b16 a, b;\ncvt.rn.satfinite.e4m3x2.f16x2 a, %1;\ncvt.rn.satfinite.e4m3x2.f16x2 b, %2;\n"
      "mov.b32 %0, {a, b};\n}" : "=r"(r) : "r"(low), "r"(high));
  return r;
}

// Eight channels of each 256 of a query, and two of its position.
struct Query {
  uint4 latent[L / 256];
  u32 rope;
  int last;
  DEVICE Query(const Params& p, const Work& work, int n) {
    const Row row(p, work, n);
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < L / 256; i++)
      latent[i] = row.there ? *reinterpret_cast<const uint4*>(row.latent + 512 * i + 16 * lane) : uint4{0, 0, 0, 0};
    rope = row.there ? reinterpret_cast<const u32*>(row.rope)[lane] : 0;
    last = row.last;
  }
};
DEVICE float2 query_floats(u32 x) {
  const u16 low = static_cast<u16>(x), high = static_cast<u16>(x >> 16);
  if (QUERY == 1) return {BFloat16::unpack(low), BFloat16::unpack(high)};
  return {Float16::unpack(low), Float16::unpack(high)};
}

// Four channels of a query, raised, as sums of two numbers. What float16 would round is beneath both.
DEVICE void write_numbers(u32 to, const float* x, float raised) {
  const u32 low = Float16::pack(x[0] * raised, x[1] * raised), high = Float16::pack(x[2] * raised, x[3] * raised);
  const u32 first = e4m3_four(low, high);
  write(to, first);
  write(to + QUERY_CHUNK, e4m3_four(minus(low, fp8_pair(first)), minus(high, fp8_pair(first >> 16))));
}

DEVICE u32 warp_max(u32 x) {
  u32 r;
  asm volatile("redux.sync.max.u32 %0, %1, 0xffffffff;" : "=r"(r) : "r"(x));
  return r;
}

// The largest of a row near 128 by a power of two, `raised`, whose inverse is `lowered`.
DEVICE void stage_query(const float (&x)[L / 32], float2 turned, int n, int last, const Params& p, u32 base) {
  const int lane = threadIdx.x % 32;
  float most[4] = {fabsf(turned.x), fabsf(turned.y), 0.0f, 0.0f};
#pragma unroll
  for (int i = 0; i < L / 32; i++) most[i % 4] = fmaxf(most[i % 4], fabsf(x[i]));
  const float of_lane = fmaxf(fmaxf(most[0], most[1]), fmaxf(most[2], most[3]));
  const u32 exponent = max(warp_max(__float_as_uint(of_lane)) >> 23, 27u);
  const float raised = __uint_as_float((260 - exponent) << 23), lowered = __uint_as_float((exponent - 6) << 23);
#pragma unroll
  for (int i = 0; i < L / 256; i++) {
    const u32 to = base + OFFSET_QUERIES + 2 * (2 * i + lane / 16) * QUERY_CHUNK + swizzled(n, lane % 16 * 8);
    write_numbers(to, x + 8 * i, raised);
    write_numbers(to + 4, x + 8 * i + 4, raised);
  }
  const u32 both = pack<KEPT>(turned.x * raised, turned.y * raised);
  write(base + OFFSET_QUERIES + 2 * CHUNKS * QUERY_CHUNK + swizzled(n, 4 * lane), __uint_as_float(both));
  if (lane == 0) write_row(base, n, last, p.factor * lowered);
}

// A warp takes a row, the next one under way. The first fetches latents.
DEVICE void stage_queries(const Params& p, const Work& work, const Shared& s) {
  if (threadIdx.x < 32) return;
  Query next(p, work, threadIdx.x / 32 - 1);
#pragma unroll 1
  for (int n = threadIdx.x / 32 - 1; n < N; n += STAGERS) {
    const Query now = next;
    next = Query(p, work, n + STAGERS);
    float x[L / 32];
#pragma unroll
    for (int i = 0; i < L / 256; i++) {
      const u32 words[4] = {now.latent[i].x, now.latent[i].y, now.latent[i].z, now.latent[i].w};
#pragma unroll
      for (int j = 0; j < 4; j++) {
        const float2 pair = query_floats(words[j]);
        x[8 * i + 2 * j] = pair.x, x[8 * i + 2 * j + 1] = pair.y;
      }
    }
    stage_query(x, query_floats(now.rope), n, now.last, p, s.base);
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
