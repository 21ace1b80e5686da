// out = softmax(q k^T) v for Hopper, with 8-bit operands as `attention_quantize` writes them.
//
// One producer thread brings tiles through the copy engine; consumer warpgroups of 64 queries each multiply Q K^T into
// integers (or floats, for E4M3), take exponentials, and multiply the probabilities, in 8 bits and straight from their
// registers, with V. Each has the scores of the next block multiplied while the product of the last one runs
// (FlashAttention-3, section 3.2). What is particular:
//
//   - The probabilities of 128 keys are scaled by the largest of their own row and block, not by the largest so far: 8
//     uniform bits then serve every block alike, and a sink at the start makes nothing after it underflow.
//   - The product of a block goes to a fresh accumulator, exact in int32, and is added, scaled, to the FP32 one. That is
//     the one multiplication per element that rescaling would cost anyway.
//   - What was added is rescaled only where a maximum has grown by 2^SLACK: float32 holds other powers of two as well.
//   - Three quarters of the exponentials come from the FMA units, two float16 at a time (`Fixed`). The unit that has
//     them would take as long for all as the tensor cores for both products.
//   - The row sum adds the quantized probabilities (dp4a), so that weights add up to 1 exactly.
//   - V's keys come in the order in which an accumulator's thread holds its scores: no shuffle, no transposition.
//   - At the end the output is turned back by the rotation of V with FP16 MMA.
//
// Compiled once per configuration, with these macros:
//   D          head dimension, a multiple of 16 up to 128
//   CONSUMERS  warpgroups of 64 queries
//   STAGES     tiles of K, and tiles of V, in flight
//   QK_FP8, PV_FP8   1: E4M3 operands, 0: INT8
//   SOFTCAP, SINKS   whether scores are capped, whether heads have a sink
//   OUTPUT     1 bfloat16, 2 float16
//   SHARED     bytes of dynamic shared memory that the launch provides
#include "sm90.cuh"
#include "attention.cuh"
#include "wgmma.cuh"

constexpr int BK = 128;              // keys of a block
constexpr int BM = 64 * CONSUMERS;   // queries of a tile
constexpr int THREADS = 128 * (CONSUMERS + 1);
constexpr int SCORES = BK / 2;       // registers of one thread
constexpr int SUMS = D / 2;
constexpr float LOG2E = 1.4426950408889634f;
constexpr float LN2 = 0.6931471805599453f;
constexpr float LOWEST = -1e30f;  // what weights refer to before the first block
constexpr float SLACK = 32.f;     // sums stay below 2^32 * 255 * 127 * Skv, far from the largest float

#if QK_FP8
using Score = float;
#else
using Score = int;
#endif
#if PV_FP8
using Sum = float;
using RowSum = float;
constexpr float LOG2_P = 8.f;  // probabilities up to 256
#else
using Sum = int;
using RowSum = u32;
constexpr float LOG2_P = 7.982993575f;  // probabilities up to 253, 254 by the error of `Fixed`
#endif
#if OUTPUT == 2
using Half = Float16;
#else
using Half = BFloat16;
#endif

constexpr int Q_BYTES = BM * 128;
constexpr int K_BYTES = BK * 128;
constexpr int V_BYTES = D * 128;
constexpr int TURN_CHUNKS = (D + 63) / 64;
constexpr int TURN_BYTES = TURN_CHUNKS * D * 128;
constexpr int OUT_STRIDE = 2 * D + 16;  // bytes; the padding spreads rows over the banks
constexpr int OFFSET_K = 2 * Q_BYTES;
constexpr int OFFSET_V = OFFSET_K + STAGES * K_BYTES;
constexpr int OFFSET_TURN = OFFSET_V + STAGES * V_BYTES;
constexpr int OFFSET_OUT = OFFSET_TURN + TURN_BYTES;
constexpr int OFFSET_BARRIERS = OFFSET_OUT + BM * OUT_STRIDE;
constexpr int OFFSET_ITEMS = OFFSET_BARRIERS + 8 * (4 * STAGES + 9);

struct Params {
  TensorMap q, k, v, turn;
  const float *q_scale, *q_shift, *k_scale, *v_scale, *v_mean;
  const float* sinks;        // [Hq] or null
  const int* key_range;      // [B, 2] or null
  const int *cu_q, *cu_k;    // [sequences + 1] or null
  void* out;                 // [B, Sq, Hq, D]
  float* lse;                // [B, Hq, Sq]
  u32* counters;             // items that were taken beyond the first of each CTA, CTAs that are done; 0 between launches
  int batch, heads_q, heads_kv, sq, skv, blocks, sequences, items;
  int left, right, together;
  float scale, softcap, unit;  // unit: 1 / sqrt(size of the rotation's blocks)
};

// One tile of queries: which keys they see, and in which blocks these lie. Query i stands at key i + place. Lives in shared
// memory, because consumers have no registers to spare.
struct Tile {
  int batch, head, kv, row, row_end, first, last, place, low_block, high_block;
  int full_low[CONSUMERS], full_high[CONSUMERS];  // blocks that all rows of a warpgroup see whole
  bool end;                                       // no tile: there are no more

  DEVICE Tile(const Params& p, int item) {
    end = item >= p.items;
    if (end) return;
    if (p.cu_q != nullptr) {
      packed(p, item);
    } else {
      const int tiles = (p.sq + BM - 1) / BM, begin = item / (p.together * tiles) * p.together;
      const int heads = min(p.together, p.batch * p.heads_q - begin), index = item - begin * tiles;
      const int pair = begin + index % heads;
      batch = pair / p.heads_q;
      head = pair - batch * p.heads_q;
      row = (tiles - 1 - index / heads) * BM;  // those that see most first
      row_end = p.sq;
      place = p.skv - p.sq;
      first = p.key_range == nullptr ? 0 : max(0, __ldg(p.key_range + 2 * batch));
      last = p.key_range == nullptr ? p.skv : min(p.skv, __ldg(p.key_range + 2 * batch + 1));
    }
    kv = batch * p.heads_kv + head / (p.heads_q / p.heads_kv);
    low_block = low(p, row) / BK;
    high_block = row < row_end ? (max(0, high(p, min(row + BM, row_end) - 1)) + BK - 1) / BK : 0;
    for (int i = 0; i < CONSUMERS; ++i) {
      const int top = min(row + 64 * i, row_end - 1), bottom = min(top + 63, row_end - 1);
      full_low[i] = (low(p, bottom) + BK - 1) / BK;
      full_high[i] = max(0, high(p, top)) / BK;
    }
  }

  // Tiles do not reach over the end of a sequence; the items beyond the last tile are empty.
  DEVICE void packed(const Params& p, int item) {
    const int tiles = p.items / p.heads_q;
    head = item / tiles;
    int index = item - head * tiles, sequence = 0, begin = 0, end = 0;
    for (; sequence < p.sequences; ++sequence) {
      begin = __ldg(p.cu_q + sequence);
      end = __ldg(p.cu_q + sequence + 1);
      const int count = (end - begin + BM - 1) / BM;
      if (index < count) break;
      index -= count;
    }
    batch = 0;
    const bool none = sequence == p.sequences;
    row = none ? p.sq : begin + ((end - begin + BM - 1) / BM - 1 - index) * BM;
    row_end = none ? p.sq : end;
    first = none ? 0 : __ldg(p.cu_k + sequence);
    last = none ? 0 : __ldg(p.cu_k + sequence + 1);
    place = last - end;
  }

  DEVICE int low(const Params& p, int query) const {
    return p.left < 0 ? first : max(first, query + place - p.left);
  }
  DEVICE int high(const Params& p, int query) const {
    return p.right < 0 ? last : min(last, query + place + p.right + 1);
  }
};

static_assert(OFFSET_ITEMS + 2 * sizeof(Tile) <= SHARED, "the host allocates what is laid out here");

// Places in the ring are counted; tile i lies in stage i % STAGES, and is the i / STAGES-th there.
static_assert((STAGES & (STAGES - 1)) == 0, "stages are a power of two");
DEVICE int stage_of(u32 count) { return count % STAGES; }
DEVICE u32 phase_of(u32 count) { return count / STAGES % 2; }

struct Shared {
  u32 base;
  Tile* tiles;  // two
  DEVICE u32 q(int i) const { return base + i * Q_BYTES; }
  DEVICE u32 k(int stage) const { return base + OFFSET_K + stage * K_BYTES; }
  DEVICE u32 v(int stage) const { return base + OFFSET_V + stage * V_BYTES; }
  DEVICE u32 turn() const { return base + OFFSET_TURN; }
  DEVICE u32 out() const { return base + OFFSET_OUT; }
  DEVICE u32 barrier(int i) const { return base + OFFSET_BARRIERS + 8 * i; }
  DEVICE u32 full_k(int stage) const { return barrier(stage); }
  DEVICE u32 empty_k(int stage) const { return barrier(STAGES + stage); }
  DEVICE u32 full_v(int stage) const { return barrier(2 * STAGES + stage); }
  DEVICE u32 empty_v(int stage) const { return barrier(3 * STAGES + stage); }
  DEVICE u32 full_q(int i) const { return barrier(4 * STAGES + i); }
  DEVICE u32 empty_q(int i) const { return barrier(4 * STAGES + 2 + i); }
  DEVICE u32 full_item(int i) const { return barrier(4 * STAGES + 4 + i); }
  DEVICE u32 empty_item(int i) const { return barrier(4 * STAGES + 6 + i); }
  DEVICE u32 full_turn() const { return barrier(4 * STAGES + 8); }
};

// ---- items: whichever CTA is free takes the next one ----

DEVICE const Tile& announce(const Params& p, const Shared& s, u32 taken, int item) {
  const int i = taken % 2;
  const Tile tile(p, item);
  barrier_wait(s.empty_item(i), taken / 2 % 2 ^ 1);
  s.tiles[i] = tile;
  barrier_arrive(s.full_item(i));
  return s.tiles[i];
}

// The last CTA to be done leaves zeros for the next launch.
DEVICE void leave(const Params& p) {
  __threadfence();
  if (atomicAdd(p.counters + 1, 1u) == gridDim.x - 1) p.counters[0] = p.counters[1] = 0;
}

// ---- producer: one thread ----

DEVICE void load_tile(const Params& p, const Shared& s, const Tile& tile, u32& count, u32& tiles) {
  const int kv = tile.kv;
  const int i = tiles % 2;
  barrier_wait(s.empty_q(i), tiles++ / 2 % 2 ^ 1);
  barrier_arrive_expect(s.full_q(i), Q_BYTES);
  tma_load(s.q(i), &p.q, s.full_q(i), 0, (tile.batch * p.heads_q + tile.head) * p.sq + tile.row, kEvictFirst);
  for (int block = tile.high_block - 1; block >= tile.low_block; --block, ++count) {
    const int stage = stage_of(count);
    barrier_wait(s.empty_k(stage), phase_of(count) ^ 1);
    barrier_arrive_expect(s.full_k(stage), K_BYTES);
    tma_load(s.k(stage), &p.k, s.full_k(stage), 0, kv * p.skv + block * BK, kEvictNormal);
    barrier_wait(s.empty_v(stage), phase_of(count) ^ 1);
    barrier_arrive_expect(s.full_v(stage), V_BYTES);
    tma_load(s.v(stage), &p.v, s.full_v(stage), block * BK, kv * D, kEvictNormal);
  }
}

DEVICE void produce(const Params& p, const Shared& s) {
  barrier_arrive_expect(s.full_turn(), TURN_BYTES);
  for (int i = 0; i < TURN_CHUNKS; ++i) {
    tma_load(s.turn() + i * D * 128, &p.turn, s.full_turn(), 64 * i, 0, kEvictNormal);
  }
  u32 count = 0, tiles = 0, taken = 0;
  int item = blockIdx.x;
  for (; item < p.items; item = gridDim.x + atomicAdd(p.counters, 1u)) {
    const Tile& tile = announce(p, s, taken++, item);
    if (tile.high_block > tile.low_block) load_tile(p, s, tile, count, tiles);
  }
  announce(p, s, taken, item);
  leave(p);
}

// ---- consumers ----

template <int n>
DEVICE void pin(int (&registers)[n]) {
#pragma unroll
  for (int i = 0; i < n; ++i) asm volatile("" : "+r"(registers[i])::"memory");
}

DEVICE u32 permute(u32 a, u32 b, u32 selector) {
  u32 r;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(selector));
  return r;
}

#define kHidden __int_as_float(0xff800000)  // minus infinity, the score of a key that is not seen

// Where this thread stands. Its two rows are row and row + 8 of its warpgroup.
struct Position {
  int group, lane, quad, row;
  DEVICE Position() {
    group = uniform(threadIdx.x / 128) - 1;
    lane = threadIdx.x % 32;
    quad = lane % 4;
    row = threadIdx.x % 128 / 32 * 16 + lane / 4;
  }
};

// Makes powers of two of dequantized scores; for a soft cap, twice their tanh's argument.
DEVICE float to_log2(const Params& p) { return SOFTCAP ? 2.f / p.softcap * LOG2E * p.scale : LOG2E * p.scale; }

// What is kept of a tile's rows from block to block.
struct Rows {
  float scale[2];   // of the queries, times `to_log2`
  float shift[2];   // of the scores, for a soft cap
  float reference[2], total[2];  // the score whose weight is 1, in units of log2; sum of the weights
};

DEVICE void multiply_scores(Score (&scores)[SCORES], const Shared& s, const Position& at, int buffer, int stage) {
  const u32 q = descriptor_low(s.q(0)) + (buffer * Q_BYTES + at.group * 64 * 128) / 16;
  const u32 k = descriptor_low(s.k(0)) + stage * (K_BYTES / 16);
  pin(scores);
  wgmma_fence();
#pragma unroll
  for (int i = 0; i < (D + 31) / 32; ++i) wgmma_qk(scores, descriptor(q + 2 * i), descriptor(k + 2 * i), i > 0);
  wgmma_commit();
}

DEVICE void multiply_values(Sum (&sums)[SUMS], const u32 (&p)[4][4], const Shared& s, int stage) {
  const u32 v = descriptor_low(s.v(0)) + stage * (V_BYTES / 16);
  pin(sums);
  wgmma_fence();
#pragma unroll
  for (int i = 0; i < 4; ++i) wgmma_pv(sums, p[i], descriptor(v + 2 * i), i > 0);
  wgmma_commit();
}

DEVICE void release(u32 barrier, const Position& at) {
  if (at.lane < ARRIVALS) barrier_arrive(barrier);
}

DEVICE float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffff, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffff, x, 2));
}

DEVICE float to_float(int x) { return static_cast<float>(x); }
DEVICE float to_float(float x) { return x; }

constexpr int kHiddenScore = -2147483647 - 1;  // of a key that is not seen, among integers

// Floats whose last bit is 1: integers of 22 bits are added to the bits of the second, and sums round to integers.
constexpr float kWhole = 8388608.f, kSigned = 12582912.f;
constexpr int kSignedBits = 0x4B400000;

DEVICE void hide(int& score) { score = kHiddenScore; }
DEVICE void hide(float& score) { score = kHidden; }

// Largest score of row r, -inf if there is none. Integers: three at a time.
DEVICE float largest_of(const int (&scores)[SCORES], int r) {
  int part[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) part[i] = max(scores[4 * i + 2 * r], scores[4 * i + 2 * r + 1]);
#pragma unroll
  for (int i = 4; i < SCORES / 4; ++i) {
    part[i % 4] = __vimax3_s32(part[i % 4], scores[4 * i + 2 * r], scores[4 * i + 2 * r + 1]);
  }
  const int largest = max(__vimax3_s32(part[0], part[1], part[2]), part[3]);
  return largest == kHiddenScore ? kHidden : static_cast<float>(largest);
}
DEVICE float largest_of(const float (&scores)[SCORES], int r) {
  float largest = scores[2 * r];
#pragma unroll
  for (int i = 0; i < SCORES / 4; ++i) {
    largest = fmaxf(largest, fmaxf(scores[4 * i + 2 * r], scores[4 * i + 2 * r + 1]));
  }
  return largest;
}

// Log2 of the probability, up to LOG2_P. Only a masked block has integers that are hidden.
template <bool masked>
DEVICE float power_of(int score, float factor, float offset) {
  const float x = fmaf(static_cast<float>(score), factor, offset);
  return masked && score == kHiddenScore ? kHidden : x;
}
template <bool masked>
DEVICE float power_of(float score, float factor, float offset) {
  return fmaf(score, factor, offset);
}

#if SOFTCAP
// Scores as the rest sees them: capped, in units of log2.
DEVICE void cap_scores(const Score (&scores)[SCORES], float (&x)[SCORES], const Params& p, const Rows& rows,
                       float k_scale) {
  const float cap = p.softcap * LOG2E;
#pragma unroll
  for (int i = 0; i < SCORES; ++i) {  // tanh(y) = 1 - 2 / (1 + exp(2 y)), to_log2 holds 2 log2(e) / softcap
    const int r = i / 2 % 2;
    const float y = fmaf(to_float(scores[i]), rows.scale[r] * k_scale, rows.shift[r]);
    x[i] = cap - 2.f * cap * reciprocal(1.f + exp2_(y));
  }
}
using Value = float;
constexpr bool INTEGERS = false;
#else
using Value = Score;
constexpr bool INTEGERS = !QK_FP8;
#endif

// Four powers of two and their 8-bit codes.
#if PV_FP8
struct Powers {
  float value[4];
  DEVICE void start(const float (&x)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) value[i] = exp2_(x[i]);
  }
  DEVICE void finish(u32& codes, float& sum) const {
    asm("{\n.reg .b16 low, high;\ncvt.rn.satfinite.e4m3x2.f32 low, %2, %1;\n"
        "cvt.rn.satfinite.e4m3x2.f32 high, %4, %3;\nmov.b32 %0, {low, high};\n}"
        : "=r"(codes)
        : "f"(value[0]), "f"(value[1]), "f"(value[2]), "f"(value[3]));
    sum += (value[0] + value[1]) + (value[2] + value[3]);
  }
};
#else
// Additions to 2^23 round to integers, and a product by 256 makes room for a second one in the low 16 bits: all on the
// FMA pipe, which has slots free.
struct Powers {
  float value[4];
  DEVICE void start(const float (&x)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) value[i] = exp2_(x[i]);
  }
  DEVICE static u32 pack(float low, float high) {
    return __float_as_uint(fmaf(high + kWhole, 256.f, kWhole - 256.f * kWhole) + low);
  }
  DEVICE void finish(u32& codes, u32& sum) const {
    codes = permute(pack(value[0], value[1]), pack(value[2], value[3]), 0x5410);
    sum = __dp4a(codes, 0x01010101u, sum);
  }
};

// The same without the unit for exponentials. A logarithm n + f, n whole and f a fraction of 10 bits, is the float16
// 2^n (1 + f) once 15 is added, and a polynomial of 1 + f makes up for the rest, 2^f / (1 + f), to 0.35 %. Added to
// 1024, the product is rounded to an integer, the low byte of the float16.
struct Fixed {
  u32 low, high;

  // x: numbers kWhole + 1024 (logarithm + 15), whose lower half has these bits.
  DEVICE void start(const float (&x)[4]) {
    low = permute(__float_as_uint(x[0]), __float_as_uint(x[1]), 0x5410);
    high = permute(__float_as_uint(x[2]), __float_as_uint(x[3]), 0x5410);
  }
  DEVICE static constexpr u32 twice(u32 half) { return half * 0x10001; }
  DEVICE static u32 code(u32 pair) {
    const u32 one_f = spread(pair, twice(0x03ff), twice(0x3c00));
    u32 rest = times_plus(one_f, twice(0x3380), twice(0xb98f));  // 0.2344, -0.6948
    rest = times_plus(rest, one_f, twice(0x3dd5));               // 1.4580
    return times_plus(pair, rest, twice(0x6400));
  }
  DEVICE void finish(u32& codes, u32& sum) const {
    codes = permute(code(low), code(high), 0x6420);
    sum = __dp4a(codes, 0x01010101u, sum);
  }
};
#endif

// What is known of a block once its scores are there: factor and offset make powers of two of them.
struct Block {
  float factor[2], largest[2], offset[2];
  float step[2], base[2];  // the same for `Fixed`, of integers as kSigned + score
  int lowest[2];           // bits of such a number: logarithms below -14 are taken for -14
  bool steep;              // too far from one integer to the next for that, in some row of the warp

  DEVICE void fix() {
    steep = false;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      step[r] = factor[r] * 1024.f;
      base[r] = fmaf(offset[r] + 15.f, 1024.f, kWhole);
      if (!INTEGERS) continue;
      base[r] = fmaf(step[r], -kSigned, base[r]);
      lowest[r] = __float_as_int(fmaxf(fmaf(-14.f - offset[r], reciprocal(factor[r]), kSigned), kWhole));
      steep |= factor[r] > 0.00390625f;
    }
    if (INTEGERS) steep = __any_sync(0xffffffff, steep);
  }

  DEVICE void start(const Value (&scores)[SCORES], const Rows& rows, float k_scale) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      factor[r] = SOFTCAP ? 1.f : fmaxf(rows.scale[r] * k_scale, 1e-30f);  // 0 times hidden would be NaN
      largest[r] = quad_max(largest_of(scores, r) * factor[r]);
      offset[r] = LOG2_P - (largest[r] == kHidden ? 0.f : largest[r]);
    }
  }
};

// Makes the largest score so far the reference of all that was added.
DEVICE void rescale(float (&out)[SUMS], Rows& rows, const Block& block) {
  float factor[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float reference = fmaxf(rows.reference[r], block.largest[r]);
    factor[r] = exp2_(rows.reference[r] - reference);
    rows.reference[r] = reference;
    rows.total[r] *= factor[r];
  }
#pragma unroll
  for (int i = 0; i < SUMS; ++i) out[i] *= factor[i / 2 % 2];
}

// The block whose product is under way: its weight among those added before.
struct Pending {
  float weight[2];

  // Called in the order of the blocks.
  DEVICE void start(float (&out)[SUMS], Rows& rows, const Block& block, const RowSum (&sum)[2], float v_scale) {
    const bool grown = block.largest[0] > rows.reference[0] + SLACK || block.largest[1] > rows.reference[1] + SLACK;
    if (__any_sync(0xffffffff, grown)) rescale(out, rows, block);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      weight[r] = exp2_(block.largest[r] - rows.reference[r]);
      rows.total[r] = fmaf(static_cast<float>(sum[r]), weight[r], rows.total[r]);
      weight[r] *= v_scale;
    }
  }

  DEVICE void add(float (&out)[SUMS], const Sum (&sums)[SUMS], int first, int last) const {
#pragma unroll
    for (int i = first; i < last; ++i) out[i] = fmaf(to_float(sums[i]), weight[i / 2 % 2], out[i]);
  }
};

#if !PV_FP8
DEVICE float fixed_of(int score, const Block& block, int r) {
  return fmaf(__int_as_float(__viaddmax_s32(score, kSignedBits, block.lowest[r])), block.step[r], block.base[r]);
}
DEVICE float fixed_of(float score, const Block& block, int r) {
  return fmaxf(fmaf(score, block.step[r], block.base[r]), kWhole + 1024.f);
}
DEVICE void start_fixed(Fixed& fixed, const Value (&scores)[SCORES], const Block& block, int i) {
  const int base = i / 2 * 8 + i % 2 * 2;
  float x[4];
#pragma unroll
  for (int e = 0; e < 4; ++e) x[e] = fixed_of(scores[base + e / 2 * 4 + e % 2], block, i % 2);
  fixed.start(x);
}
#endif

// Fragment i of the next product's operand (half of 16 keys, then row) as powers of two.
template <bool masked>
DEVICE void start_powers(Powers& powers, const Value (&scores)[SCORES], const Block& block, int i) {
  const int base = i / 2 * 8 + i % 2 * 2;
  float x[4];
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    x[e] = power_of<masked>(scores[base + e / 2 * 4 + e % 2], block.factor[i % 2], block.offset[i % 2]);
  }
  powers.start(x);
}

DEVICE constexpr bool by_fma(int i) { return i / 2 % 4 < 3; }

// Scores -> operand of the next product and the sums of its rows, and the product before is added. Exponentials need
// not wait for it.
template <bool masked, class Wait>
DEVICE void make_probabilities(u32 (&p)[4][4], RowSum (&sum)[2], float (&out)[SUMS], const Value (&scores)[SCORES],
                               const Block& block, const Sum (&sums)[SUMS], const Pending& pending, Wait&& wait) {
  Powers powers[16];
#pragma unroll
  for (int i = 0; i < 16; ++i) start_powers<masked>(powers[i], scores, block, i);
  wait();
  sum[0] = sum[1] = 0;
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    powers[i].finish(p[i / 4][i % 4], sum[i % 2]);
    pending.add(out, sums, i * SUMS / 16, (i + 1) * SUMS / 16);
  }
}

#if !PV_FP8
// The same of a block that is seen whole, by both ways side by side.
template <class Wait>
DEVICE void make_both_ways(u32 (&p)[4][4], RowSum (&sum)[2], float (&out)[SUMS], const Value (&scores)[SCORES],
                           const Block& block, const Sum (&sums)[SUMS], const Pending& pending, Wait&& wait) {
  Powers powers[16];
  Fixed fixed[16];
  sum[0] = sum[1] = 0;
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    if (by_fma(i)) {
      start_fixed(fixed[i], scores, block, i);
    } else {
      start_powers<false>(powers[i], scores, block, i);
    }
  }
  wait();
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    if (by_fma(i)) {
      fixed[i].finish(p[i / 4][i % 4], sum[i % 2]);
    } else {
      powers[i].finish(p[i / 4][i % 4], sum[i % 2]);
    }
    pending.add(out, sums, i * SUMS / 16, (i + 1) * SUMS / 16);
  }
}
#endif

DEVICE Rows start_rows(const Params& p, const Tile& tile, const Position& at) {
  Rows rows;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int query = min(tile.row + at.group * 64 + at.row + 8 * r, max(tile.row_end - 1, 0));
    const long long index = static_cast<long long>(tile.batch * p.heads_q + tile.head) * p.sq + query;
    rows.scale[r] = __ldg(p.q_scale + index) * to_log2(p);
    rows.shift[r] = SOFTCAP ? __ldg(p.q_shift + index) * to_log2(p) : 0.f;
    rows.reference[r] = LOWEST;
    rows.total[r] = 0.f;
  }
  return rows;
}

// Hides what the two rows of this thread do not see of a block.
DEVICE void hide_unseen(Value (&scores)[SCORES], const Params& p, const Tile& tile, const Position& at, int block) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int query = min(tile.row + at.group * 64 + at.row + 8 * r, tile.row_end - 1);
    const int first = block * BK + 2 * at.quad;
    const int low = tile.low(p, query) - first, high = tile.high(p, query) - first;
#pragma unroll
    for (int i = 0; i < SCORES / 2; ++i) {
      const int key = i / 2 * 8 + i % 2;
      if (key < low || key >= high) hide(scores[i / 2 * 4 + 2 * r + i % 2]);
    }
  }
}

DEVICE void attend(float (&out)[SUMS], Rows& rows, const Params& p, const Shared& s, const Tile& tile,
                   const Position& at, u32& count, u32 tiles) {
  // In uniform registers: every read of the tile again would be a wait.
  const int scales = uniform(tile.kv * p.blocks), low_block = uniform(tile.low_block);
  const int full_low = uniform(tile.full_low[at.group]), full_high = uniform(tile.full_high[at.group]);
  Score scores[SCORES];
  Sum sums[SUMS];
  u32 prob[4][4];
  RowSum sum[2];
  float k_scale, v_scale;
  Block block;
  Pending pending;
#if SOFTCAP
  float values[SCORES];
#else
  Score(&values)[SCORES] = scores;
#endif
  u32 values_count = count;
  auto start_scores = [&](int n) {
    k_scale = __ldg(p.k_scale + 4 * (scales + n) + at.quad);
    barrier_wait(s.full_k(stage_of(count)), phase_of(count));
    multiply_scores(scores, s, at, tiles % 2, stage_of(count));
  };
  auto masked = [&](int n) { return n < full_low || n >= full_high; };
  auto finish_scores = [&](int n) {
    pin(scores);
    release(s.empty_k(stage_of(count)), at);
    ++count;
#if SOFTCAP
    cap_scores(scores, values, p, rows, k_scale);
#endif
    if (masked(n)) hide_unseen(values, p, tile, at, n);
    block.start(values, rows, k_scale);
  };
  auto start_values = [&] {
    barrier_wait(s.full_v(stage_of(values_count)), phase_of(values_count));
    multiply_values(sums, prob, s, stage_of(values_count));
  };
  auto finish_values = [&] {
    wgmma_wait<0>();
    pin(sums);
    release(s.empty_v(stage_of(values_count)), at);
    ++values_count;
  };

  int n = uniform(tile.high_block) - 1;
  barrier_wait(s.full_q(tiles % 2), tiles / 2 % 2);
  start_scores(n);
  wgmma_wait<0>();
  finish_scores(n);
  sum[0] = sum[1] = 0;
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    Powers powers;
    start_powers<true>(powers, values, block, i);
    powers.finish(prob[i / 4][i % 4], sum[i % 2]);
  }
  for (--n; n >= low_block; --n) {
    v_scale = __ldg(p.v_scale + scales + n + 1);
    start_scores(n);
    start_values();
    pending.start(out, rows, block, sum, v_scale);
    wgmma_wait<1>();
    finish_scores(n);
#if !PV_FP8
    block.fix();
    if (!masked(n) && !block.steep) {
      make_both_ways(prob, sum, out, values, block, sums, pending, finish_values);
    } else {
      make_probabilities<true>(prob, sum, out, values, block, sums, pending, finish_values);
    }
#else
    if (masked(n)) {
      make_probabilities<true>(prob, sum, out, values, block, sums, pending, finish_values);
    } else {
      make_probabilities<false>(prob, sum, out, values, block, sums, pending, finish_values);
    }
#endif
  }
  release(s.empty_q(tiles % 2), at);
  v_scale = __ldg(p.v_scale + scales + n + 1);
  start_values();
  pending.start(out, rows, block, sum, v_scale);
  finish_values();
  pending.add(out, sums, 0, SUMS);
}

// Divides by the row sums (and the sink's share), writes lse.
// `share`: what part of the weights keys have, all but the sink's.
DEVICE void finish_rows(float (&out)[SUMS], Rows& rows, const Params& p, const Tile& tile, const Position& at,
                        float (&share)[2]) {
  float inverse[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float total = rows.total[r];
    total += __shfl_xor_sync(0xffffffff, total, 1);
    total += __shfl_xor_sync(0xffffffff, total, 2);
    const int query = tile.row + at.group * 64 + at.row + 8 * r;
    const long long index = static_cast<long long>(tile.batch * p.heads_q + tile.head) * p.sq + query;
    const bool inside = query < tile.row_end;
    const float shift = inside && !SOFTCAP ? __ldg(p.q_shift + index) * p.scale : 0.f;
    const float lse = total > 0.f ? (rows.reference[r] - LOG2_P + log2f(total)) * LN2 + shift : kHidden;
    if (inside && at.quad == 0) p.lse[index] = lse;
    share[r] = total > 0.f ? 1.f : 0.f;
    if (SINKS) share[r] = total > 0.f ? 1.f / (1.f + __expf(__ldg(p.sinks + tile.head) - lse)) : 0.f;
    inverse[r] = total > 0.f ? share[r] / total : 0.f;
  }
#pragma unroll
  for (int i = 0; i < SUMS; ++i) out[i] *= inverse[i / 2 % 2];
}

// Turns the rows back: FP16 operands, each row scaled by its largest element first.
DEVICE void turn_back(float (&out)[SUMS], const Params& p, const Shared& s) {
  float largest[2] = {0.f, 0.f};
#pragma unroll
  for (int i = 0; i < SUMS; ++i) largest[i / 2 % 2] = fmaxf(largest[i / 2 % 2], fabsf(out[i]));
  float inverse[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    largest[r] = fmaxf(quad_max(largest[r]), 1e-30f);
    inverse[r] = 1.f / largest[r];
  }
  u32 a[D / 16][4];
#pragma unroll
  for (int i = 0; i < D / 4; ++i) {
    const float scale = inverse[i % 2];
    a[i / 4][i % 4] = Float16::pack(out[2 * i] * scale, out[2 * i + 1] * scale);
  }
  pin(out);
  wgmma_fence();
#pragma unroll
  for (int i = 0; i < D / 16; ++i) {
    const u32 b = descriptor_low(s.turn()) + i / 4 * (D * 128 / 16) + i % 4 * 2;
    wgmma_turn(out, a[i], descriptor(b), i > 0);
  }
  wgmma_commit();
  wgmma_wait<0>();
  pin(out);
#pragma unroll
  for (int i = 0; i < SUMS; ++i) out[i] *= largest[i / 2 % 2] * p.unit;
}

// Adds the mean of the values and writes 16 bits, through shared memory for the sake of whole sectors.
DEVICE void store(const float (&out)[SUMS], const Params& p, const Shared& s, const Tile& tile, const Position& at,
                  const float (&share)[2]) {
  const float* mean = p.v_mean + static_cast<long long>(tile.kv) * D + 2 * at.quad;
  const u32 buffer = s.out() + at.group * 64 * OUT_STRIDE;
#pragma unroll
  for (int j = 0; j < D / 8; ++j) {
    const float2 m = __ldg(reinterpret_cast<const float2*>(mean + 8 * j));
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float* v = out + 4 * j + 2 * r;
      const u32 packed = Half::pack(fmaf(m.x, share[r], v[0]), fmaf(m.y, share[r], v[1]));
      const u32 address = buffer + (at.row + 8 * r) * OUT_STRIDE + 16 * j + 4 * at.quad;
      asm volatile("st.shared.b32 [%0], %1;" ::"r"(address), "r"(packed) : "memory");
    }
  }
  named_barrier_sync(8 + at.group, 128);
  for (int i = threadIdx.x % 128; i < 64 * (D / 8); i += 128) {
    const int row = i / (D / 8), column = i % (D / 8), query = tile.row + at.group * 64 + row;
    uint4 v;
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "r"(buffer + row * OUT_STRIDE + 16 * column)
                 : "memory");
    if (query < tile.row_end) {
      const long long index = (static_cast<long long>(tile.batch) * p.sq + query) * p.heads_q + tile.head;
      reinterpret_cast<uint4*>(p.out)[index * (D / 8) + column] = v;
    }
  }
  named_barrier_sync(8 + at.group, 128);
}

DEVICE void consume(const Params& p, const Shared& s) {
  const Position at;
  u32 count = 0, tiles = 0;
  bool turn_here = false;
  for (u32 taken = 0;; ++taken) {
    const int slot = taken % 2;
    barrier_wait(s.full_item(slot), taken / 2 % 2);
    const Tile& tile = s.tiles[slot];
    if (tile.end) break;
    Rows rows = start_rows(p, tile, at);
    float out[SUMS];
#pragma unroll
    for (int i = 0; i < SUMS; ++i) out[i] = 0.f;
    if (tile.high_block > tile.low_block) {
      attend(out, rows, p, s, tile, at, count, tiles++);
    }
    if (!turn_here) barrier_wait(s.full_turn(), 0);
    turn_here = true;
    float share[2];
    finish_rows(out, rows, p, tile, at, share);
    turn_back(out, p, s);
    store(out, p, s, tile, at, share);
    release(s.empty_item(slot), at);
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) attention_prefill(const __grid_constant__ Params p) {
  extern __shared__ __align__(1024) unsigned char memory[];
  const Shared s{shared_address(memory), reinterpret_cast<Tile*>(memory + OFFSET_ITEMS)};
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; ++i) {
      barrier_init(s.full_k(i), 1);
      barrier_init(s.full_v(i), 1);
      barrier_init(s.empty_k(i), 4 * CONSUMERS * ARRIVALS);
      barrier_init(s.empty_v(i), 4 * CONSUMERS * ARRIVALS);
    }
    barrier_init(s.full_turn(), 1);
    for (int i = 0; i < 2; ++i) {
      barrier_init(s.full_q(i), 1);
      barrier_init(s.empty_q(i), 4 * CONSUMERS * ARRIVALS);
      barrier_init(s.full_item(i), 1);
      barrier_init(s.empty_item(i), 4 * CONSUMERS * ARRIVALS);
    }
    barrier_init_fence();
  }
  __syncthreads();
  if (threadIdx.x < 128) {
    registers_decrease<CONSUMERS == 2 ? 24 : 32>();  // together no more than the CTA starts with
    if (threadIdx.x == 0) produce(p, s);
  } else {
    registers_increase<CONSUMERS == 2 ? 240 : 160>();
    consume(p, s);
  }
}
