// Absorbed attention over packed latents for 64 rows (heads times queries) a tile, which lie on the M of warpgroup MMA.
//
// Of three warpgroups one computes scores, with queries in registers (16-bit ones half in shared memory), and hands
// weights through shared memory to two that add half of the channels each: while they multiply weights of a tile with
// its latents, the first is at scores and exponentials of the next. Whoever is the last to read a part of a tile has
// the copy engine bring the next one to its place.
//
// E4M3 latents (FORMAT 1) are operands as they are. Queries are sums of two E4M3 numbers, weights are rounded to one. The
// second product is transposed, channels on M, because 8-bit operands in shared memory must have tokens side by side
// and those in registers can be arranged: four words of four channels are turned by permutations of bytes. Weights lie
// in the order in which tokens are read without bank conflicts.
//
// INT4 codes become E4M3 numbers, which have all odd numbers to 15: two tiles ahead, by the warpgroups that add outputs, each
// those that it will read. A half of a tile is then 128 channels and the 128 that share their bytes.
//
// References of exponentials are raised when a score exceeds them by more than LAZY, which is seldom.
//
// Macros: L, FORMAT (0 16 bits, 1 E4M3, 3 INT4), KEPT, QUERY, PAGED, BOX, SHARED as in sm90.cu;   HALVES  of tiles, by channels, in the ring;   RAWS  of packed codes;
//   ROPES  position parts;   PARTS  E4M3 numbers for a query, 1 or 2;   IN_TURN  outputs wait for the next tile's scores, 0 or 1;
//   EARLY  scores of the next tile are under way during exponentials, 0 or 1
#include "sm90.cuh"
#include "attention.cuh"
#include "wgmma.cuh"
#include "work.cuh"

constexpr int HALF_CHUNKS = L * (FORMAT == 0 ? 2 : 1) / 256, HALF = HALF_CHUNKS * CHUNK;  // of channels of a tile
constexpr int THREADS = 384;
constexpr int CHUNKS = 2 * HALF_CHUNKS;
constexpr bool PACKED = FORMAT == 3;
constexpr int FETCHED_CHUNKS = PACKED ? HALF_CHUNKS / 2 : HALF_CHUNKS, PLACES = PACKED ? RAWS : HALVES;
constexpr int AHEAD = PACKED ? 2 : 0;  // tiles between a half's fetching place and its use
static_assert(!PACKED || (L == 512 && HALVES == 6 && RAWS % 2 == 0), "a warpgroup unpacks to the place that it read last");
constexpr int KEPT_CHUNKS = FORMAT != 0 && EARLY ? 0 : CHUNKS < 4 ? CHUNKS : 4;  // of queries, in registers
constexpr bool WIDE = EARLY && FORMAT == 0;
constexpr int SCORE_REGISTERS = WIDE ? 184 : EARLY ? 136 : 152, OUTPUT_REGISTERS = WIDE ? 160 : EARLY ? 184 : 176;
constexpr float LOG2_WEIGHT = FORMAT == 0 ? 8.0f : 7.0f, LAZY = FORMAT == 0 ? 6.0f : 1.75f;
constexpr float WEIGHT = FORMAT == 0 ? 256.0f : 128.0f;  // of a token at the reference
constexpr int P_STEP = FORMAT == 0 ? CHUNK : 64;         // 8-bit weights take half of a row of 128 bytes

constexpr int OFFSET_ROPE = HALVES * HALF;
constexpr int OFFSET_RAW = OFFSET_ROPE + ROPES * CHUNK;
constexpr int OFFSET_P = OFFSET_RAW + (PACKED ? RAWS * CHUNK : 0);
constexpr int OFFSET_QUERIES = OFFSET_P + (FORMAT == 0 ? 2 : 1) * CHUNK;  // that are not in registers, or second parts
constexpr int OFFSET_RESCALE = OFFSET_QUERIES + (CHUNKS * PARTS - KEPT_CHUNKS) * CHUNK;  // [2][64]
constexpr int OFFSET_TOTAL = OFFSET_RESCALE + 512;  // [64], as is the next
constexpr int OFFSET_FACTOR = OFFSET_TOTAL + 256;
constexpr int OFFSET_SCALES = OFFSET_FACTOR + 256;  // [2][3][64] scales of tokens, their inverses and logarithms
constexpr int OFFSET_BARRIERS = OFFSET_SCALES + (FORMAT == 0 ? 0 : 6 * 256);
constexpr int LATE = HALVES - KEPT_CHUNKS / HALF_CHUNKS;  // first half that comes where queries wait for their registers
constexpr int OFFSET_STAGED = KEPT_CHUNKS > 0 ? LATE * HALF : OFFSET_QUERIES + (PARTS - 1) * CHUNKS * CHUNK;
static_assert(OFFSET_BARRIERS + 8 * (HALVES + ROPES + 6 + (PACKED ? RAWS : 0)) <= SHARED, "the host allocates what is laid out here");

// Where the `number`th of something lies among `count` places, and the parity of its barriers.
struct Turn {
  int slot;
  u32 parity;
  DEVICE Turn(int number, int count) : slot(number % count), parity(number / count & 1) {}
};

struct Shared {
  u32 base;
  DEVICE u32 half(int slot) const { return base + slot * HALF; }
  DEVICE u32 fetched(int slot) const { return PACKED ? base + OFFSET_RAW + slot * CHUNK : half(slot); }
  DEVICE u32 rope(int slot) const { return base + OFFSET_ROPE + slot * CHUNK; }
  DEVICE u32 weights(int slot) const { return base + OFFSET_P + slot * P_STEP; }
  DEVICE u32 half_full(int slot) const { return barrier(slot); }
  DEVICE u32 fetched_full(int slot) const { return PACKED ? barrier(HALVES + ROPES + 6 + slot) : half_full(slot); }
  DEVICE u32 rope_full(int slot) const { return barrier(HALVES + slot); }
  DEVICE u32 weights_full(int slot) const { return barrier(HALVES + ROPES + slot); }
  DEVICE u32 weights_empty(int slot) const { return barrier(HALVES + ROPES + 2 + slot); }
  DEVICE u32 scored(int slot) const { return barrier(HALVES + ROPES + 4 + slot); }

 private:
  DEVICE u32 barrier(int i) const { return base + OFFSET_BARRIERS + 8 * i; }
};

DEVICE void initialize_barriers(const Shared& s) {
  for (int i = 0; i < HALVES; i++) barrier_init(s.half_full(i), PACKED ? 4 : 1);
  for (int i = 0; PACKED && i < RAWS; i++) barrier_init(s.fetched_full(i), 1);
  for (int i = 0; i < ROPES; i++) barrier_init(s.rope_full(i), 1);
  for (int i = 0; i < 2; i++) {
    barrier_init(s.weights_full(i), 4);
    barrier_init(s.weights_empty(i), 8);
    barrier_init(s.scored(i), 4);
  }
  barrier_init_fence();
}

// ---- fetching: one thread ----

// Boxes of a tile's tokens that somebody sees, and where they lie in the cache.
struct Boxes {
  int y[TILE / BOX], bytes;  // of 128 bytes of each token
  bool needed[TILE / BOX];
  DEVICE Boxes(const Params& p, const Work& work, int tile, int row) : bytes(0) {
#pragma unroll
    for (int i = 0; i < TILE / BOX; i++) {
      const int first = work.begin + tile * TILE + i * BOX;
      needed[i] = first < work.end && first + BOX > work.low;
      bytes += needed[i] ? BOX * 128 : 0;
      y[i] = work.batch * row + first;
      if (PAGED && needed[i])
        y[i] = p.table[static_cast<i64>(work.batch) * p.table_row + first / p.capacity] * row + first % p.capacity;
    }
  }
  DEVICE void load(const Params& p, const TensorMap* map, int x, u32 to, u32 full) const {
    const u64 policy = p.tiles == 1 ? kEvictFirst : kEvictNormal;
#pragma unroll
    for (int i = 0; i < TILE / BOX; i++)
      if (needed[i]) tma_load(to + i * BOX * 128, map, full, x, y[i], policy);
  }
};

DEVICE void fetch_half(const Params& p, const Shared& s, const Boxes& boxes, int number) {
  const Turn at(number, PLACES);
  const u32 full = s.fetched_full(at.slot);
  barrier_arrive_expect(full, FETCHED_CHUNKS * boxes.bytes);
#pragma unroll
  for (int c = 0; c < FETCHED_CHUNKS; c++)
    boxes.load(p, &p.latent, (number % 2 * FETCHED_CHUNKS + c) * (FORMAT == 0 ? 64 : 128), s.fetched(at.slot) + c * CHUNK, full);
}

DEVICE void fetch_rope(const Params& p, const Work& work, const Shared& s, int tile) {
  const Turn at(tile, ROPES);
  const Boxes boxes(p, work, tile, p.rope_row);
  const u32 full = s.rope_full(at.slot);
  barrier_arrive_expect(full, boxes.bytes);
  boxes.load(p, &p.rope, 0, s.rope(at.slot), full);
}

// Halves from `first` to before `last`, of those that there are.
DEVICE void fetch_halves(const Params& p, const Work& work, const Shared& s, int first, int last) {
#pragma unroll 1
  for (int number = first; number < min(last, 2 * work.count); number++)
    fetch_half(p, s, Boxes(p, work, number / 2, p.latent_row), number);
}

// ---- queries ----

// Byte `column` of row n where rows of 128 bytes are swizzled.
DEVICE u32 swizzled(int n, int column) { return n * 128 + ((column / 16 ^ n % 8) * 16) + column % 16; }

DEVICE uint4 load_piece(const char* from) { return *reinterpret_cast<const uint4*>(from); }
DEVICE void write(u32 to, uint4 x) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w) : "memory");
}

#if FORMAT == 0
// Queries as they are, in chunks as latents have them; the position's where weights will be.
DEVICE void stage_queries(const Params& p, const Work& work, u32 base) {
  constexpr int PIECES = (L + ROPE) / 8;
#pragma unroll 6
  for (int i = threadIdx.x; i < 64 * PIECES; i += THREADS) {
    const int n = i / PIECES, piece = i % PIECES, row = work.first_row + n;
    const int head = row % p.heads, query = row / p.heads;
    const char* from = piece < L / 8
                           ? p.q_latent + 2 * (work.batch * p.ql_batch + query * p.ql_token + head * p.ql_head + piece * 8)
                           : p.q_rope + 2 * (work.batch * p.qr_batch + query * p.qr_token + head * p.qr_head + piece * 8 - L);
    const int chunk = piece / 8, shared = chunk - KEPT_CHUNKS;
    const u32 to = base + (piece >= L / 8 ? OFFSET_P : shared >= 0 ? OFFSET_QUERIES + shared * CHUNK : OFFSET_STAGED + chunk * CHUNK);
    write(to + swizzled(n, piece % 8 * 16), row < p.rows ? load_piece(from) : uint4{0, 0, 0, 0});
  }
}
#else
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

// Rows of queries, the largest of each near 128 by a power of two, as one or two E4M3 numbers; a warp takes a row.
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
      const u32 to = chunk * CHUNK + swizzled(n, lane % 16 * 8);
#pragma unroll
      for (int j = 0; j < 2; j++) {
        float four[4], rest[4];
#pragma unroll
        for (int k = 0; k < 4; k++) four[k] = x[8 * i + 4 * j + k] * raised;
        const u32 first = e4m3_four(four);
        const float2 low = e4m3_floats(static_cast<u16>(first)), high = e4m3_floats(static_cast<u16>(first >> 16));
        rest[0] = four[0] - low.x, rest[1] = four[1] - low.y, rest[2] = four[2] - high.x, rest[3] = four[3] - high.y;
        write(base + OFFSET_STAGED + to + 4 * j, __uint_as_float(first));
        if (PARTS == 2) write(base + OFFSET_QUERIES + to + 4 * j, __uint_as_float(e4m3_four(rest)));
      }
    }
    write(base + OFFSET_P + swizzled(n, 4 * lane), __uint_as_float(pack<KEPT>(turned[0] * raised, turned[1] * raised)));
    if (lane == 0) write(base + OFFSET_FACTOR + 4 * n, p.factor / raised);
  }
}
#endif

// ---- consumers ----

struct Thread {
  int group, index, warp, lane, g, t;  // group: 0 scores, 1 and 2 outputs;  index, warp: of the warpgroup
  DEVICE Thread() {
    group = uniform(threadIdx.x / 128);
    index = threadIdx.x % 128;
    warp = uniform(threadIdx.x / 32) % 4;
    lane = threadIdx.x % 32;
    g = lane / 4, t = lane % 4;
  }
};

DEVICE void group_sync(const Thread& me) { named_barrier_sync(1 + me.group, 128); }

DEVICE void announce(const Thread& me, u32 barrier) {
  __syncwarp();
  if (me.lane == 0) barrier_arrive(barrier);
}

DEVICE void load_matrix_x4(u32 (&r)[4], u32 from) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(from) : "memory");
}

constexpr int LATENT_STEPS = 4 * KEPT_CHUNKS, ROPE_STEPS = 4;  // of 32 bytes

// The operands of the scores that stay in registers.
struct Queries {
  u32 latent[LATENT_STEPS > 0 ? LATENT_STEPS : 1][4], rope[ROPE_STEPS][4];
  DEVICE void load(const Shared& s, const Thread& me) {
    const int row = 16 * me.warp + me.lane % 16, right = me.lane / 16 * 16;
#pragma unroll
    for (int i = 0; i < LATENT_STEPS; i++)
      load_matrix_x4(latent[i], s.base + OFFSET_STAGED + i / 4 * CHUNK + swizzled(row, i % 4 * 32 + right));
#pragma unroll
    for (int i = 0; i < ROPE_STEPS; i++)
      load_matrix_x4(rope[i], s.base + OFFSET_P + swizzled(row, i * 32 + right));
  }
};

constexpr int INVERSES = 256, LOGARITHMS = 512;  // bytes from scales to what is made of them

struct Softmax {
  float reference[2], total[2];  // of rows 16 warp + g and 8 below;  total: of this thread's tokens
};

DEVICE void multiply_rope(float (&x)[32], const Queries& q, const Shared& s, int tile) {
  const Turn at(tile, ROPES);
  barrier_wait(s.rope_full(at.slot), at.parity);
  const u32 b = descriptor_low(s.rope(at.slot));
#pragma unroll
  for (int i = 0; i < ROPE_STEPS; i++) wgmma_rope(x, q.rope[i], descriptor(b + 2 * i), FORMAT == 0 || i > 0);
}

DEVICE void multiply_latents(float (&x)[32], const Queries& q, const Shared& s, int tile) {
  const u32 a = descriptor_low(s.base + OFFSET_QUERIES);
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const Turn at(2 * tile + half, HALVES);
    barrier_wait(s.half_full(at.slot), at.parity);
    const u32 b = descriptor_low(s.half(at.slot));
#pragma unroll
    for (int i = 0; i < 4 * HALF_CHUNKS; i++) {
      const u64 tokens = descriptor(b + i / 4 * (CHUNK / 16) + 2 * (i % 4));
      const int step = half * 4 * HALF_CHUNKS + i, shared = PARTS == 2 ? step : step - LATENT_STEPS;
      if (step < LATENT_STEPS) wgmma_scores(x, q.latent[step < LATENT_STEPS ? step : 0], tokens, FORMAT != 0 || step > 0);
      if (shared >= 0) wgmma_shared(x, descriptor(a + shared / 4 * (CHUNK / 16) + 2 * (shared % 4)), tokens, 1);
      if (KEPT_CHUNKS == 0 && PARTS == 2)
        wgmma_shared(x, descriptor(a + (CHUNKS + step / 4) * (CHUNK / 16) + 2 * (step % 4)), tokens, 1);
    }
  }
}

// Scales of a tile's tokens, on their way one tile ahead; every thread of the warpgroup is here.
struct Scales {
  float next;
  DEVICE static float load(const Params& p, const Work& work, int token) {
    if (token < work.low || token >= work.end) return 1.0f;
    i64 at = work.batch * p.scale_row + token;
    if (PAGED) {
      const int page = p.table[static_cast<i64>(work.batch) * p.table_row + token / p.capacity];
      at = page * p.scale_row + token % p.capacity;
    }
    return p.scale[at];
  }
  DEVICE Scales(const Params& p, const Work& work, const Thread& me) {
    next = FORMAT != 0 && me.index < TILE ? load(p, work, work.begin + me.index) : 1.0f;
  }
  DEVICE u32 publish(const Params& p, const Work& work, const Shared& s, const Thread& me, int tile) {
    const u32 to = s.base + OFFSET_SCALES + tile % 2 * 768;
    if (FORMAT != 0 && me.index < TILE) {
      write(to + 4 * me.index, next);
      write(to + INVERSES + 4 * me.index, reciprocal(next));
      write(to + LOGARITHMS + 4 * me.index, log2_(next));
      next = load(p, work, work.begin + (tile + 1) * TILE + me.index);
    }
    group_sync(me);
    return to;
  }
};

// Scores become powers of two relative to the reference; returns by what earlier sums are multiplied.
DEVICE float raise_reference(Softmax& softmax, const float (&x)[32], int r) {
  float top = -INFINITE;
#pragma unroll
  for (int j = 0; j < 16; j++) top = fmaxf(top, x[j / 2 * 4 + j % 2 + 2 * r]);
  top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
  top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
  if (!(top > softmax.reference[r] + LAZY)) return 1.0f;
  const float by = exp2_(softmax.reference[r] - top);  // 0 for the first
  softmax.reference[r] = top;
  softmax.total[r] *= by;
  return by;
}

#if FORMAT == 0
DEVICE void write_weights(Softmax& softmax, float (&x)[32], const Shared& s, int slot, u32, const Thread& me) {
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const int row = 16 * me.warp + me.lane % 16, piece = 2 * i + me.lane / 16;
    const float* y = x + 8 * i;
    store_matrix_x4(s.weights(slot) + swizzled(row, piece * 16), pack<KEPT>(y[0], y[1]), pack<KEPT>(y[2], y[3]),
                    pack<KEPT>(y[4], y[5]), pack<KEPT>(y[6], y[7]));
  }
#pragma unroll
  for (int i = 0; i < 32; i++) softmax.total[i / 2 % 2] += x[i];
}
#else
// Token 8 j + 2 t + e is element 32 (j / 4) + 16 (j / 2 % 2) + 4 t + 2 (j % 2) + e. Sums are those of rounded weights, which
// are free of the roundings that all tokens share.
DEVICE void write_weights(Softmax& softmax, float (&x)[32], const Shared& s, int slot, u32 scales, const Thread& me) {
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
      softmax.total[r] += a.x * first.x + a.y * first.y + b.x * second.x + b.y * second.y;
    }
  }
}
#endif

// Starts the products of a tile; those of the position divided by the scales of tokens come first where there are any.
DEVICE void begin_scores(float (&x)[32], const Queries& q, const Shared& s, const Thread& me, int tile, u32 scales) {
  pin(x);
  wgmma_fence();
#if FORMAT != 0
  multiply_rope(x, q, s, tile);
  wgmma_commit();
  wgmma_wait<0>();
  pin(x);
#pragma unroll
  for (int j = 0; j < 8; j++) {
    const float2 by = read<float2>(scales + INVERSES + (8 * j + 2 * me.t) * 4);
    x[4 * j] *= by.x, x[4 * j + 1] *= by.y, x[4 * j + 2] *= by.x, x[4 * j + 3] *= by.y;
  }
  pin(x);
  wgmma_fence();
#endif
  multiply_latents(x, q, s, tile);
#if FORMAT == 0
  multiply_rope(x, q, s, tile);
#endif
  wgmma_commit();
}

// From scores to weights, which the other warpgroups read.
DEVICE void weigh_tile(Softmax& softmax, const Params& p, const Work& work, const Shared& s, const Thread& me,
                       const float (&factor)[2], const int (&last)[2], int tile, u32 scales, float (&x)[32]) {
#pragma unroll
  for (int j = 0; j < 8; j++) {
    float2 scale = {1.0f, 1.0f}, added = {0.0f, 0.0f};
    if (FORMAT != 0) {
      scale = read<float2>(scales + (8 * j + 2 * me.t) * 4);
      added = read<float2>(scales + LOGARITHMS + (8 * j + 2 * me.t) * 4);
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const float by = factor[i / 2] * (i % 2 ? scale.y : scale.x);
      x[4 * j + i] = FORMAT == 0 ? x[4 * j + i] * factor[i / 2] : fmaf(x[4 * j + i], by, i % 2 ? added.y : added.x);
    }
  }
  const int position = work.begin + tile * TILE;
  if (position < work.low || position + TILE > work.length - p.sq + 1) {
#pragma unroll
    for (int i = 0; i < 32; i++) {
      const int token = position + i / 4 * 8 + 2 * me.t + i % 2;
      if (token < work.low || token > last[i / 2 % 2]) x[i] = -INFINITE;
    }
  }
  float by[2];
#pragma unroll
  for (int r = 0; r < 2; r++) {
    by[r] = raise_reference(softmax, x, r);
    const float zero = softmax.reference[r] == -INFINITE ? 0.0f : softmax.reference[r] - LOG2_WEIGHT;
#pragma unroll
    for (int j = 0; j < 16; j++) x[j / 2 * 4 + j % 2 + 2 * r] = exp2_(x[j / 2 * 4 + j % 2 + 2 * r] - zero);
  }
  const Turn at(tile, 2);
  barrier_wait(s.weights_empty(at.slot), at.parity ^ 1);
  write_weights(softmax, x, s, at.slot, scales, me);
  if (me.t == 0) {
    write(s.base + OFFSET_RESCALE + at.slot * 256 + (16 * me.warp + me.g) * 4, by[0]);
    write(s.base + OFFSET_RESCALE + at.slot * 256 + (16 * me.warp + me.g + 8) * 4, by[1]);
  }
  async_proxy_fence();
  announce(me, s.weights_full(at.slot));
}

// Sums of all tokens of a row, for the other warpgroups and whoever merges.
DEVICE void publish(const Softmax& softmax, const Params& p, const Work& work, const Shared& s, const Thread& me) {
#pragma unroll
  for (int r = 0; r < 2; r++) {
    float total = softmax.total[r];
    total += __shfl_xor_sync(~0u, total, 1);
    total += __shfl_xor_sync(~0u, total, 2);
    total *= 1.0f / WEIGHT;
    const int n = 16 * me.warp + me.g + 8 * r, row = work.first_row + n;
    const bool some = total > 0.0f;
    if (me.t != 0) continue;
    write(s.base + OFFSET_TOTAL + 4 * n, (p.splits > 1 ? 1.0f : some ? 1.0f / total : 0.0f) * (1.0f / WEIGHT));
    if (row >= p.rows) continue;
    if (p.splits > 1) {
      const i64 at = (static_cast<i64>(work.split) * p.batches + work.batch) * p.rows + row;
      p.sums[2 * at] = softmax.reference[r], p.sums[2 * at + 1] = total;
    } else {
      const int head = row % p.heads, query = row / p.heads;
      p.lse[(static_cast<i64>(work.batch) * p.heads + head) * p.sq + query] =
          some ? (softmax.reference[r] + log2_(total)) / LOG2E : -INFINITE;
    }
  }
}

DEVICE void score(const Params& p, const Work& work, const Shared& s, const Thread& me) {
  Queries q;
  q.load(s, me);
  async_proxy_fence();
  group_sync(me);
  if (PACKED)
    named_barrier_sync(14, THREADS);
  else if (KEPT_CHUNKS > 0 && me.index == 0)
    fetch_halves(p, work, s, LATE, HALVES);
  Softmax softmax = {{-INFINITE, -INFINITE}, {0.0f, 0.0f}};
  float factor[2];
  int last[2];
#pragma unroll
  for (int r = 0; r < 2; r++) {
    const int n = 16 * me.warp + me.g + 8 * r;
    factor[r] = FORMAT == 0 ? p.factor : read<float>(s.base + OFFSET_FACTOR + 4 * n);
    last[r] = work.length - p.sq + min((work.first_row + n) / p.heads, p.sq - 1);
  }
  Scales scales(p, work, me);
  float x[32];
#if EARLY
  u32 at = scales.publish(p, work, s, me, 0);
  if (work.count > 0) begin_scores(x, q, s, me, 0, at);
#endif
#pragma unroll 1
  for (int tile = 0; tile < work.count; tile++) {
#if !EARLY
    const u32 at = scales.publish(p, work, s, me, tile);
    if (me.index == 0 && tile > 0 && tile - 1 + ROPES < work.count) fetch_rope(p, work, s, tile - 1 + ROPES);
    begin_scores(x, q, s, me, tile, at);
#endif
    wgmma_wait<0>();
    pin(x);
    if (IN_TURN) announce(me, s.scored(tile % 2));
#if EARLY
    float y[32];
#pragma unroll
    for (int i = 0; i < 32; i++) y[i] = x[i];
    pin(y);
    const u32 now = at;
    at = scales.publish(p, work, s, me, tile + 1);
    if (me.index == 0 && tile + ROPES < work.count) fetch_rope(p, work, s, tile + ROPES);
    if (tile + 1 < work.count) begin_scores(x, q, s, me, tile + 1, at);
    weigh_tile(softmax, p, work, s, me, factor, last, tile, now, y);
#else
    weigh_tile(softmax, p, work, s, me, factor, last, tile, at, x);
#endif
  }
  publish(softmax, p, work, s, me);
  named_barrier_sync(15, THREADS);
}

// ---- outputs ----

// Rows of this half of a tile that hold nothing become zeros: NaN times a weight of 0 would be NaN.
DEVICE void clear_hidden(const Work& work, const Thread& me, u32 half, int position) {
  const int row = me.index / 2, token = position + row;
  if (token < work.low || token >= work.length)
    for (int c = 0; c < HALF_CHUNKS; c++)
      for (int i = 0; i < 4; i++) write_zeros(half + c * CHUNK + row * 128 + me.index % 2 * 64 + i * 16);
  async_proxy_fence();
  group_sync(me);
}

#if FORMAT == 0
constexpr int OUT = L / 4;  // sums of a thread

struct Outputs {
  float sum[OUT];
  DEVICE void rescale(u32 from, const Thread& me) {
    const float a = read<float>(from + (16 * me.warp + me.g) * 4), b = read<float>(from + (16 * me.warp + me.g + 8) * 4);
    if (!__any_sync(~0u, a != 1.0f || b != 1.0f)) return;
#pragma unroll
    for (int i = 0; i < OUT; i++) sum[i] *= i / 2 % 2 ? b : a;
  }
  DEVICE void add(u32 weights, u32 half, const Thread&) {
    const u32 a = descriptor_low(weights), b = descriptor_turned(half);
    pin(sum);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < 4; i++) wgmma_outputs(sum, descriptor(a + 2 * i), descriptor(b + 128 * i), 1);
    wgmma_commit();
    wgmma_wait<0>();
    pin(sum);
  }
  // Chunks of 64 channels lie CHUNK bytes apart.
  static DEVICE u32 descriptor_turned(u32 address) { return (CHUNK / 16) << 16 | (address & 0x3FFFF) >> 4; }

  template <int KIND>
  DEVICE void store(char* to, const Params& p, const Work& work, const Shared& s, const Thread& me, i64 first) const {
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const int n = 16 * me.warp + me.g + 8 * r, row = work.first_row + n;
      if (row >= p.rows) continue;
      const float by = read<float>(s.base + OFFSET_TOTAL + 4 * n);
      const i64 at = (first + row) * L + (me.group - 1) * (L / 2) + 2 * me.t;
#pragma unroll
      for (int j = 0; j < OUT / 4; j++) {
        const float a = sum[4 * j + 2 * r] * by, b = sum[4 * j + 2 * r + 1] * by;
        if (KIND == 0) *reinterpret_cast<float2*>(to + 4 * (at + 8 * j)) = {a, b};
        if (KIND != 0) *reinterpret_cast<u32*>(to + 2 * (at + 8 * j)) = pack<KIND>(a, b);
      }
    }
  }
};
#else
constexpr int BLOCKS = L / 128;  // of 64 channels

struct Outputs {
  float sum[BLOCKS][32];
  DEVICE void rescale(u32 from, const Thread& me) {
#pragma unroll
    for (int j = 0; j < 8; j++) {
      const float2 by = read<float2>(from + (8 * j + 2 * me.t) * 4);
      if (!__any_sync(~0u, by.x != 1.0f || by.y != 1.0f)) continue;
#pragma unroll
      for (int block = 0; block < BLOCKS; block++) {
        float(&x)[32] = sum[block];
        x[4 * j] *= by.x, x[4 * j + 1] *= by.y, x[4 * j + 2] *= by.x, x[4 * j + 3] *= by.y;
      }
    }
  }
  // Codes of 4 channels of tokens 8 j + 2 t + {0, 1}, where j is twice `pair` and one more, become 4 tokens of each channel.
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
  DEVICE void add(u32 weights, u32 half, const Thread& me) {
    const u32 b = descriptor_low(weights);
    u32 a[2][2][4];
#pragma unroll
    for (int c = 0; c < HALF_CHUNKS; c++) {
#pragma unroll
      for (int step = 0; step < 2; step++) {
        u32(&now)[2][4] = a[step];
        u32 low[4], high[4];
        turn(low, half + c * CHUNK, 2 * step, me);
        turn(high, half + c * CHUNK, 2 * step + 1, me);
        wgmma_wait<1>();
        pin(now);
#pragma unroll
        for (int k = 0; k < 2; k++) {
          now[k][0] = low[2 * k], now[k][1] = low[2 * k + 1];
          now[k][2] = high[2 * k], now[k][3] = high[2 * k + 1];
        }
        pin(now);
#pragma unroll
        for (int k = 0; k < 2; k++) pin(sum[2 * c + k]);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < 2; k++) wgmma_outputs(sum[2 * c + k], now[k], descriptor(b + 2 * step), 1);
        wgmma_commit();
      }
    }
    wgmma_wait<0>();
#pragma unroll
    for (int block = 0; block < BLOCKS; block++) pin(sum[block]);
  }
  static DEVICE void pin(u32 (&x)[2][4]) {
#pragma unroll
    for (int i = 0; i < 2; i++)
      asm volatile("" : "+r"(x[i][0]), "+r"(x[i][1]), "+r"(x[i][2]), "+r"(x[i][3])::"memory");
  }
  template <int n>
  static DEVICE void pin(float (&x)[n]) { ::pin(x); }

  template <int KIND>
  DEVICE void store(char* to, const Params& p, const Work& work, const Shared& s, const Thread& me, i64 rows) const {
#pragma unroll
    for (int j = 0; j < 16; j++) {
      const int n = j / 2 * 8 + 2 * me.t + j % 2, row = work.first_row + n;
      if (row >= p.rows) continue;
      const float by = read<float>(s.base + OFFSET_TOTAL + 4 * n);
#pragma unroll
      for (int c = 0; c < HALF_CHUNKS; c++) {
        const int i = j / 2 * 4 + j % 2, first = PACKED ? c * (L / 2) + (me.group - 1) * 128 : ((me.group - 1) * HALF_CHUNKS + c) * 128;
        const int channel = first + 32 * me.warp + 4 * me.g;
        const float four[4] = {sum[2 * c][i] * by, sum[2 * c][i + 2] * by, sum[2 * c + 1][i] * by, sum[2 * c + 1][i + 2] * by};
        store_four<KIND>(to, (rows + row) * L + channel, four);
      }
    }
  }
};
#endif

// Bytes of a word's low nibbles (codes of E4M3 numbers 2 c - 15) and of its high ones.
DEVICE void unpack(u32& low, u32& high, u32 word) {
  constexpr u32 MAGNITUDES[2] = {0x4E4A4438, 0x57555351};  // 1, 3, 5, 7 and 9, 11, 13, 15
  const u32 negative = ~word & 0x88888888u;                // where 7 - c is the place of the magnitude, not c - 8
  const u32 place = (word & 0x77777777u) ^ (negative - (negative >> 3));
  const u32 a = __byte_perm(MAGNITUDES[0], MAGNITUDES[1], place), b = __byte_perm(MAGNITUDES[0], MAGNITUDES[1], place >> 16);
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
    if (next < 2 * work.count) fetch_half(p, s, Boxes(p, work, next / 2, p.latent_row), next);
  }
}

DEVICE void output(const Params& p, const Work& work, const Shared& s, const Thread& me) {
  Outputs outputs;
  float* sums = reinterpret_cast<float*>(&outputs);
#pragma unroll
  for (int i = 0; i < L / 4; i++) sums[i] = 0.0f;
  if (PACKED) unpack_first(p, work, s, me);
#pragma unroll 1
  for (int tile = 0; tile < work.count; tile++) {
    const int number = 2 * tile + me.group - 1, next = number + 2 * AHEAD + PLACES;
    const Turn at(number, HALVES), weights(tile, 2);
    const Boxes boxes(p, work, next / 2, p.latent_row);
    const int position = work.begin + tile * TILE;
    const u32 half = s.half(at.slot);
    if (PACKED && tile + AHEAD < work.count) unpack_half(s, me, number + 2 * AHEAD);
    barrier_wait(s.half_full(at.slot), at.parity);
    barrier_wait(s.weights_full(weights.slot), weights.parity);
    if (IN_TURN && tile + 1 < work.count) barrier_wait(s.scored((tile + 1) % 2), (tile + 1) / 2 & 1);
    if (!PACKED && (position < work.low || position + TILE > work.length)) clear_hidden(work, me, half, position);
    outputs.rescale(s.base + OFFSET_RESCALE + weights.slot * 256, me);
    outputs.add(s.weights(weights.slot), half, me);
    announce(me, s.weights_empty(weights.slot));
    group_sync(me);
    if (me.index == 0 && next < 2 * work.count) fetch_half(p, s, boxes, next);
  }
  named_barrier_sync(15, THREADS);
  if (p.splits > 1)
    outputs.store<0>(reinterpret_cast<char*>(p.part), p, work, s, me, (static_cast<i64>(work.split) * p.batches + work.batch) * p.rows);
  else
    outputs.store<QUERY>(p.out, p, work, s, me, static_cast<i64>(work.batch) * p.rows);
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) mla_decode(const __grid_constant__ Params p) {
  extern __shared__ __align__(1024) unsigned char memory[];
  const Shared s = {shared_address(memory)};
  if (threadIdx.x == 0) {
    initialize_barriers(s);
    prefetch_tensor_map(&p.latent);
    prefetch_tensor_map(&p.rope);
  }
  __syncthreads();
  wait_for_previous_kernel();
  let_next_kernel_start();
  const Work work(p);
  const Thread me;
  if (threadIdx.x == 0) {
    fetch_halves(p, work, s, 0, PACKED ? RAWS : LATE);
    for (int tile = 0; tile < min(ROPES, work.count); tile++) fetch_rope(p, work, s, tile);
  }
  stage_queries(p, work, s.base);
  async_proxy_fence();
  __syncthreads();
  if (me.group == 0) {
#if FORMAT == 0 && EARLY
    registers_increase<SCORE_REGISTERS>();
#else
    registers_decrease<SCORE_REGISTERS>();
#endif
    score(p, work, s, me);
  } else {
#if FORMAT == 0 && EARLY
    registers_decrease<OUTPUT_REGISTERS>();
#else
    registers_increase<OUTPUT_REGISTERS>();
#endif
    output(p, work, s, me);
  }
}

#include "merge.cuh"
