// Attention of a few queries over a packed KV cache, a share of a sequence's tokens in each CTA; `merge` adds shares.
//
// The transposed products are computed: 16 tokens are the M side of the first MMA (scores^T = K q^T), 16 channels that
// of the second (out^T = V^T p^T), 8 query rows are the N side of both, which is what a group of 4 to 8 heads fills.
//
// Each warp walks over tiles of 16 tokens with a ring of its own in shared memory: a tile's keys are one piece of
// memory and so are its values, so the bulk copy engine fetches them whole. (Copies of 16 bytes by each thread, of the
// rows that it needs itself, ask the L2 for single sectors: 2.1 TB/s, half of this.) Warps meet at the end only.
// The contraction runs over channels in any order, and so do channels of the second product's result: each thread
// reads a contiguous piece of a row, and that is its fragment. Codes become float16 by bit operations: a code in the
// low bits of 1024 is 1024 + code. In the first product that 1024 stays and is taken from the score, times the sum of
// the query (exact to 2^-14 of a code); in the second, whose sums are long, it is subtracted from the operand.
//
// Scales of values go into the weights. Weights are float16 and 2^10 at what was the largest ``p * s_v`` of their row:
// down to 2^-24 of that they keep all their bits.
//
// Tokens that are kept in 16 bits beside the codes are a few tiles more for the first share, read straight from memory.
//
// Compiled once per configuration, with these macros:
//   D      head dim: 64, 128, 256;   NT  rows of the tile / 8
//   KEY, VALUE   0 E4M3, 1 INT8, 2 INT4;   QUERY  and result: 0 float32, 1 bfloat16, 2 float16
//   PAGED, RING, SOFTCAP, NEAR   0 or 1
//   WARPS, STAGES, CTAS   of a CTA, of a warp's ring, resident on a multiprocessor;   TILES  of a stage
#include "sm90.cuh"

using i64 = long long;
struct Params {
  const char* q;
  const char* k;
  const char* v;
  const char* k_scale;
  const char* v_scale;
  const float* mean;
  const float* channel;
  const int* length;
  const int* start;
  const int* table;
  const char* sinks;
  const char* k_near;
  const char* v_near;
  float* part;
  float* sums;
  char* out;
  float* lse;
  i64 q_batch, q_head, q_token;          // in elements
  i64 k_row, k_head, v_row, v_head;      // in bytes, as are the next; slots follow each other
  i64 ks_row, ks_head, vs_row, vs_head;
  i64 mean_batch, channel_batch;         // in elements, as are the next
  i64 kn_row, kn_head, kn_slot, vn_row, vn_head, vn_slot;
  int batches, heads, group, sq, rows, tiles, splits, capacity, table_row, window, sinks_kind, first, newest, near_kind;
  float scale, softcap;
};

constexpr int ROWS = 8 * NT;
constexpr int TILE = 16, STEP = TILE * TILES;  // tokens of an MMA, of a stage of a warp's ring
constexpr int THREADS = 32 * WARPS;
constexpr int K_ROW = D / (KEY == 2 ? 2 : 1), V_ROW = D / (VALUE == 2 ? 2 : 1);  // bytes of a token
constexpr int K_BYTES = K_ROW / 4, V_BYTES = V_ROW / 8;                          // of it, in one thread
constexpr int K_PIECE = K_BYTES < 16 ? K_BYTES : 16;
constexpr int V_PIECE = V_BYTES < 16 ? V_BYTES : 16;
constexpr int K_TILE = TILE * K_ROW, V_TILE = TILE * V_ROW;
constexpr int STAGE = TILES * (K_TILE + V_TILE + 8 * TILE);  // and a scale of each row
constexpr int MERGED = ROWS * (D + 2) * 4;         // a warp's sums, which take the place of its ring
constexpr int RING_BYTES = STAGES * STAGE > MERGED ? STAGES * STAGE : MERGED;
constexpr int CHAINS = NT == 1 ? 2 : 1;  // of dependent MMAs that make a score
constexpr float LOG2E = 1.4426950408889634f;
#define INFINITE __int_as_float(0x7f800000)
constexpr float WEIGHT = 1024.0f, LIMIT = 32768.0f;  // of a weight, in float16
constexpr float LOWEST = -1e30f;  // a reference before any score

DEVICE float as_float(u32 bits) { return __uint_as_float(bits); }
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
DEVICE u32 half2_of(float low, float high) {
  u32 r;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
DEVICE float low_half(u32 pair) {
  float r;
  asm("{.reg .f16 a, b; mov.b32 {a, b}, %1; cvt.f32.f16 %0, a;}" : "=f"(r) : "r"(pair));
  return r;
}
DEVICE float high_half(u32 pair) { return low_half(pair >> 16); }

DEVICE float load_float(const char* base, i64 index, int kind) {
  if (kind == 0) return reinterpret_cast<const float*>(base)[index];
  const u32 bits = reinterpret_cast<const u16*>(base)[index];
  return kind == 1 ? as_float(bits << 16) : low_half(bits);
}
DEVICE void store_float(char* base, i64 index, float x) {
  if (QUERY == 0) {
    reinterpret_cast<float*>(base)[index] = x;
  } else if (QUERY == 1) {
    u16 r;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(r) : "f"(x));
    reinterpret_cast<u16*>(base)[index] = r;
  } else {
    u16 r;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(r) : "f"(x));
    reinterpret_cast<u16*>(base)[index] = r;
  }
}

// What is not copied is filled with zeros; a constant `valid` costs nothing.
DEVICE void copy4(u32 to, const char* from, bool valid) {
  const int size = valid ? 4 : 0;
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from), "r"(size) : "memory");
}
DEVICE void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING>
DEVICE void copies_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}
DEVICE void prefetch(const void* from) { asm volatile("prefetch.global.L2 [%0];" ::"l"(from)); }
DEVICE uint2 load8(const char* from) { return *reinterpret_cast<const uint2*>(from); }
template <int BYTES>
DEVICE void read(u32* words, u32 from) {
  if constexpr (BYTES == 16)
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3]) : "r"(from) : "memory");
  else if constexpr (BYTES == 8)
    asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];" : "=r"(words[0]), "=r"(words[1]) : "r"(from) : "memory");
  else
    asm volatile("ld.shared.b32 %0, [%1];" : "=r"(words[0]) : "r"(from) : "memory");
}

DEVICE void mma(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
DEVICE u32 transposed(u32 a) {
  u32 r;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(r) : "r"(a));
  return r;
}
// Keeps a value in its register: the compiler would rather compute addresses anew in every step.
DEVICE void pin(const char*& pointer) { asm volatile("" : "+l"(pointer)); }
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

// ---- keys: where code `index` of a thread's piece lies in a row, and what value stands for it ----

constexpr int K_CODES = D / 4;      // of a token in a thread: D / 16 k-steps of 4
constexpr int K_STEPS = D / 16;
// Of register `half` of k-step `step`, element `e`.
DEVICE int key_channel(int t, int step, int half, int e) {
  if (KEY == 2) {
    const int nibble = 2 * (step & 1) + half + 4 * e;
    return t * K_BYTES + 4 * (step >> 1) + (nibble >> 1) + (nibble & 1) * (D / 2);
  }
  return t * K_BYTES + 4 * step + 2 * half + e;
}
// The operand of a code is ``unit * code + base``.
DEVICE float key_unit(int half) { return KEY == 2 && half == 1 ? 16.0f : 1.0f; }
constexpr float KEY_BASE = KEY == 2 ? 1024.0f : KEY == 1 ? 1152.0f : 0.0f;
// Both registers of k-step `step` of a token.
DEVICE void key_operand(u32 (&r)[2], const u32* words, int step) {
  if constexpr (KEY == 2) {
    const u32 w = words[step >> 1] >> (8 * (step & 1));
    r[0] = spread(w, 0x000F000Fu, 0x64006400u);
    r[1] = spread(w, 0x00F000F0u, 0x64006400u);
  } else if constexpr (KEY == 1) {
    const u32 w = words[step] ^ 0x80808080u;
    r[0] = __byte_perm(w, 0x64646464u, 0x4140);
    r[1] = __byte_perm(w, 0x64646464u, 0x4342);
  } else {
    r[0] = fp8_pair(words[step]);
    r[1] = fp8_pair(words[step] >> 16);
  }
}

// ---- values ----

constexpr int V_WORDS = V_BYTES / 4;
constexpr int V_CODES = VALUE == 2 ? 8 : 4;  // of a word
DEVICE int value_channel(int g, int index) {
  if (VALUE == 2) {
    const int nibble = index & 7;
    return g * V_BYTES + (index >> 3) * 4 + (nibble >> 1) + (nibble & 1) * (D / 2);
  }
  return g * V_BYTES + index;
}
// A word of two tokens: register i holds code i of both.
DEVICE void value_operand(u32 (&r)[V_CODES], u32 a, u32 b) {
  if constexpr (VALUE == 2) {
#pragma unroll
    for (int part = 0; part < 2; part++) {
      const u32 w = __byte_perm(a, b, part ? 0x7632 : 0x5410), high = w >> 8;
      r[4 * part] = minus(spread(w, 0x000F000Fu, 0x64006400u), 0x64006400u);
      r[4 * part + 1] = times_plus(spread(w, 0x00F000F0u, 0x64006400u), 0x2C002C00u, 0xD400D400u);
      r[4 * part + 2] = minus(spread(high, 0x000F000Fu, 0x64006400u), 0x64006400u);
      r[4 * part + 3] = times_plus(spread(high, 0x00F000F0u, 0x64006400u), 0x2C002C00u, 0xD400D400u);
    }
  } else if constexpr (VALUE == 1) {
    const u32 x = a ^ 0x80808080u, y = b ^ 0x80808080u;
    const u32 low = __byte_perm(x, y, 0x5140), high = __byte_perm(x, y, 0x7362);
    r[0] = minus(__byte_perm(low, 0x64646464u, 0x4140), 0x64806480u);
    r[1] = minus(__byte_perm(low, 0x64646464u, 0x4342), 0x64806480u);
    r[2] = minus(__byte_perm(high, 0x64646464u, 0x4140), 0x64806480u);
    r[3] = minus(__byte_perm(high, 0x64646464u, 0x4342), 0x64806480u);
  } else {
    const u32 low = __byte_perm(a, b, 0x5140), high = __byte_perm(a, b, 0x7362);
    r[0] = fp8_pair(low);
    r[1] = fp8_pair(low >> 16);
    r[2] = fp8_pair(high);
    r[3] = fp8_pair(high >> 16);
  }
}

// ---- the result of a row ----

// out is the sum of weighted values relative to 2^largest, total that of weights.
DEVICE void finish(const Params& p, int batch, int head, int row, int column, float out, float largest, float total) {
  const bool some = total > 0.0f;
  const int head_q = head * p.group + row % p.group, query = row / p.group;
  const float lse = some ? (largest + log2_(total)) / LOG2E : -INFINITE;
  float share = some ? 1.0f / total : 0.0f;
  if (p.sinks != nullptr && some)
    share /= 1.0f + exp2_((load_float(p.sinks, head_q, p.sinks_kind) - lse) * LOG2E);
  if (column == 0) p.lse[(static_cast<i64>(batch) * p.heads * p.group + head_q) * p.sq + query] = lse;
  const i64 at = ((static_cast<i64>(batch) * p.sq + query) * p.heads * p.group + head_q) * D + column;
  store_float(p.out, at, some ? out * share : 0.0f);
}

struct Place {
  int batch, head, first_row, split;
  int length, low, begin, end;  // codes from low on are read; begin, a multiple of the tile, to end is this CTA's share
};

DEVICE Place place_of(const Params& p) {
  Place here;
  int index = blockIdx.x;
  here.split = index % p.splits;
  index /= p.splits;
  here.first_row = index % p.tiles * ROWS;
  index /= p.tiles;
  here.head = index % p.heads;
  here.batch = index / p.heads;
  int length = p.length[here.batch];
  if (!RING && !PAGED) length = min(length, p.capacity);
  int low = p.start == nullptr ? 0 : max(p.start[here.batch], 0);
  low += p.first;
  if (p.window >= 0) low = max(low, length - p.sq + 1 - p.window);
  if (RING) low = max(low, length - p.capacity);
  const int high = length - p.newest;
  here.length = length;
  here.low = low;
  const int base = low / STEP * STEP;
  const int share = (max(high - base, 0) + p.splits * STEP - 1) / (p.splits * STEP) * STEP;
  here.begin = base + here.split * share;
  here.end = min(here.begin + share, high);
  return here;
}

// ---- copies of tiles ----

DEVICE u32 scale_place(int token) { return token % 8 * 8 + token / 8 % 2 * 4; }  // of tokens g and g + 8 side by side

// A warp's ring. Of a dense cache the pointers move on by a constant, else they are those of a head's first tile.
struct Copies {
  const char* k;
  const char* v;
  const char* scale;  // of this lane's token: of a key in the lower half of the warp, of a value in the upper
  u32 ring, full, to, barrier, scale_to;
  int next, lane;

  DEVICE Copies(const Params& p, const Place& here, u32 shared, int warp, int lane_) : lane(lane_) {
    ring = to = shared + warp * RING_BYTES;
    full = barrier = shared + WARPS * RING_BYTES + warp * STAGES * 8;
    next = here.begin + warp * STEP;
    k = p.k + here.head * p.k_head;
    v = p.v + here.head * p.v_head;
    scale = (lane < 16 ? p.k_scale + here.head * p.ks_head : p.v_scale + here.head * p.vs_head) + lane % 16 * 4;
    scale_to = TILES * (K_TILE + V_TILE) + scale_place(lane) + lane / 16 * 64;
    if (!PAGED && !RING) move(p, k, v, scale, here.batch, next);
    pin(k), pin(v), pin(scale);
    if (lane == 0) {
      for (int i = 0; i < STAGES; i++) barrier_init(full + 8 * i, 1);
      barrier_init_fence();
    }
    __syncwarp();
  }

  DEVICE void move(const Params& p, const char*& k_, const char*& v_, const char*& scale_, i64 row, i64 slot) const {
    k_ += row * p.k_row + slot * K_ROW;
    v_ += row * p.v_row + slot * V_ROW;
    scale_ += row * (lane < 16 ? p.ks_row : p.vs_row) + slot * 4;
  }

  // Starts to copy the warp's next tile.
  DEVICE void issue(const Params& p, const Place& here) {
    const char *from_k = k, *from_v = v, *from_scale = scale;
    if (PAGED) {
      const int page = p.table[static_cast<i64>(here.batch) * p.table_row + next / p.capacity];
      move(p, from_k, from_v, from_scale, page, next % p.capacity);
    } else if (RING) {
      move(p, from_k, from_v, from_scale, here.batch, next % p.capacity);
    } else {
      k += WARPS * STEP * K_ROW, v += WARPS * STEP * V_ROW, scale += WARPS * STEP * 4;
    }
    const int count = min(here.end - next, STEP);
    if (lane == 0) {
      const u64 policy = p.tiles == 1 ? kEvictFirst : kEvictNormal;
      barrier_arrive_expect(barrier, count * (K_ROW + V_ROW));
      bulk_load(to, from_k, count * K_ROW, barrier, policy);
      bulk_load(to + TILES * K_TILE, from_v, count * V_ROW, barrier, policy);
    }
#pragma unroll
    for (int tile = 0; tile < TILES; tile++)
      copy4(to + scale_to + 8 * TILE * tile, from_scale + 4 * TILE * tile, lane % 16 + TILE * tile < count);
    next += WARPS * STEP;
    const bool last = to == ring + (STAGES - 1) * STAGE;
    to = last ? ring : to + STAGE;
    barrier = last ? full : barrier + 8;
  }
};

// ---- one tile ----

// Of the query rows 2 t and 2 t + 1 of each eight, over this warp's tokens: relative to 2^reference, which is raised to
// the largest ``p * s_v`` when a weight would otherwise be above LIMIT. So most tiles need not agree on a maximum.
struct Sums {
  float out[NT][D / 16][4];  // channels of this thread, see `value_channel`; times WEIGHT
  float reference[NT][2], total[NT][2], zeros[NT][2];
};

// Second operands of the first product: row g of each eight, the channels of this thread; float16 with the largest of a
// row between 64 and 128. A score in units of log2 is ``(product * factor - bias) * k_scale + k_zero * sum + moved``,
// where moved is the part that the mean of the keys makes.
struct Queries {
  u32 pairs[NT][K_STEPS][2];
  float factor[NT][2], moved[NT][2], bias[NT][2], sum[NT][2];  // of rows 2 t and 2 t + 1
};

// Channels of a thread's part of 16-bit keys.
DEVICE int near_channel(int t, int step, int half, int e) { return 16 * step + 4 * t + 2 * half + e; }

template <bool CODES>
DEVICE void load_queries(Queries& q, const Params& p, const Place& here, int g, int t) {
#pragma unroll
  for (int nt = 0; nt < NT; nt++) {
    const int row = here.first_row + 8 * nt + g;
    const bool inside = row < p.rows;
    const int head = here.head * p.group + row % p.group;
    const i64 at = here.batch * p.q_batch + head * p.q_head + row / p.group * p.q_token;
    const float* mean = p.mean == nullptr ? nullptr : p.mean + here.batch * p.mean_batch + here.head * D;
    const float* channel = p.channel == nullptr ? nullptr : p.channel + here.batch * p.channel_batch + here.head * D;
    float values[K_CODES], largest = 1e-30f, moved = 0.0f;
#pragma unroll
    for (int i = 0; i < K_CODES; i++) {
      const int c = CODES ? key_channel(t, i / 4, i / 2 % 2, i % 2) : near_channel(t, i / 4, i / 2 % 2, i % 2);
      values[i] = inside ? load_float(p.q, at + c, QUERY) : 0.0f;
      if (CODES && mean != nullptr) moved += values[i] * mean[c];
      if (CODES && channel != nullptr) values[i] *= channel[c];
      largest = fmaxf(largest, fabsf(values[i]));
    }
#pragma unroll
    for (int step = 1; step < 4; step *= 2) {
      largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, step));
      moved += __shfl_xor_sync(~0u, moved, step);
    }
    const int exponent = 6 - (static_cast<int>(__float_as_uint(largest) >> 23) - 127);
    const float up = as_float(static_cast<u32>(127 + min(exponent, 120)) << 23);
    float sum = 0.0f, based = 0.0f;
#pragma unroll
    for (int i = 0; i < K_CODES; i += 2) {
      const float unit = CODES ? key_unit(i / 2 % 2) : 1.0f;
      const u32 pair = half2_of(values[i] * up / unit, values[i + 1] * up / unit);
      q.pairs[nt][i / 4][i / 2 % 2] = pair;
      based += low_half(pair) + high_half(pair);
      sum += (low_half(pair) + high_half(pair)) * unit;
    }
#pragma unroll
    for (int step = 1; step < 4; step *= 2) {
      sum += __shfl_xor_sync(~0u, sum, step);
      based += __shfl_xor_sync(~0u, based, step);
    }
#pragma unroll
    for (int e = 0; e < 2; e++) {
      const int from = 4 * (2 * t + e);  // a lane that has that row
      const float factor = p.scale * LOG2E / __shfl_sync(~0u, up, from);
      q.factor[nt][e] = factor;
      q.moved[nt][e] = __shfl_sync(~0u, moved, from) * p.scale * LOG2E;
      q.bias[nt][e] = __shfl_sync(~0u, based, from) * (CODES ? KEY_BASE : 0.0f) * factor;
      q.sum[nt][e] = __shfl_sync(~0u, sum, from) * factor;
    }
  }
}

// Scales of the tokens g and g + 8 of a tile; that of values times WEIGHT.
struct Scales {
  float k[2], k_zero[2], v[2], v_zero[2];
};

DEVICE void cap(float (&x)[4], float softcap) {
  const float most = softcap * LOG2E;
#pragma unroll
  for (int e = 0; e < 4; e++) x[e] = most - 2.0f * most / (1.0f + exp2_(x[e] * (2.0f / softcap)));
}

// Scores of tokens, at the positions `at`, that rows 2 t and 2 t + 1 do not see become -inf.
DEVICE void hide(float (&x)[4], const Params& p, const Place& here, int nt, int t, const int (&at)[2], int low,
                 int end) {
#pragma unroll
  for (int e = 0; e < 4; e++) {
    const int place = here.length - p.sq + (here.first_row + 8 * nt + 2 * t + e % 2) / p.group, token = at[e / 2];
    const bool seen = token >= low && token < end && token <= place && (p.window < 0 || token > place - p.window);
    if (!seen) x[e] = -INFINITE;
  }
}

DEVICE void raise(Sums& sums, int nt, const float (&x)[4], const Scales& scales) {
#pragma unroll
  for (int row = 0; row < 2; row++) {
    float top = fmaxf(x[row] + log2_(scales.v[0]), x[2 + row] + log2_(scales.v[1])) - log2_(WEIGHT);
#pragma unroll
    for (int step = 4; step < 32; step *= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, step));
    top = fmaxf(top, sums.reference[nt][row]);
    const float rescale = exp2_(sums.reference[nt][row] - top);
    sums.reference[nt][row] = top;
    sums.total[nt][row] *= rescale;
    sums.zeros[nt][row] *= rescale;
#pragma unroll
    for (int i = 0; i < D / 8; i++) sums.out[nt][i / 2][i % 2 * 2 + row] *= rescale;
  }
}

// Scores of the tokens g and g + 8 to weights in the layout of the second product's operand.
// x  rows 2 t, 2 t + 1 of the first token, then of the second, in units of log2
DEVICE void weigh(u32 (&weights)[2], Sums& sums, int nt, const float (&x)[4], const Scales& scales) {
  float share[4], weight[4];
  auto compute = [&]() {
#pragma unroll
    for (int e = 0; e < 4; e++) {
      share[e] = exp2_(x[e] - sums.reference[nt][e % 2]);
      weight[e] = share[e] * scales.v[e / 2];
    }
  };
  compute();
  if (__any_sync(~0u, fmaxf(fmaxf(weight[0], weight[1]), fmaxf(weight[2], weight[3])) > LIMIT)) {
    raise(sums, nt, x, scales);
    compute();
  }
#pragma unroll
  for (int row = 0; row < 2; row++) {
    sums.total[nt][row] += share[row] + share[2 + row];
    if (VALUE == 2) sums.zeros[nt][row] += share[row] * scales.v_zero[0] + share[2 + row] * scales.v_zero[1];
  }
  weights[0] = transposed(half2_of(weight[0], weight[1]));
  weights[1] = transposed(half2_of(weight[2], weight[3]));
}

DEVICE Scales read_scales(u32 from, int g) {
  u32 k[2], v[2];
  read<8>(k, from + 8 * g);
  read<8>(v, from + 64 + 8 * g);
  Scales scales;
#pragma unroll
  for (int j = 0; j < 2; j++) {
    scales.k[j] = KEY == 2 ? low_half(k[j]) : as_float(k[j]);
    scales.k_zero[j] = KEY == 2 ? high_half(k[j]) : 0.0f;
    scales.v[j] = (VALUE == 2 ? low_half(v[j]) : as_float(v[j])) * WEIGHT;
    scales.v_zero[j] = VALUE == 2 ? high_half(v[j]) : 0.0f;
  }
  return scales;
}

// The tile of codes that begins with token `first`; `keys`, `values` and `scales_at` in shared memory.
DEVICE void attend_codes(Sums& sums, const Queries& q, const Params& p, const Place& here, u32 keys, u32 values,
                         u32 scales_at, int first, int g, int t) {
  u32 words[2][K_BYTES / 4];
#pragma unroll
  for (int token = 0; token < 2; token++)
#pragma unroll
    for (int piece = 0; piece < K_BYTES / K_PIECE; piece++)
      read<K_PIECE>(&words[token][piece * K_PIECE / 4],
                    keys + (g + 8 * token) * K_ROW + t * K_BYTES + piece * K_PIECE);
  float scores[NT][CHAINS][4];
#pragma unroll
  for (int nt = 0; nt < NT; nt++)
#pragma unroll
    for (int e = 0; e < 4 * CHAINS; e++) scores[nt][e / 4][e % 4] = 0.0f;
#pragma unroll
  for (int step = 0; step < K_STEPS; step++) {
    u32 a[2], b[2];
    key_operand(a, words[0], step);
    key_operand(b, words[1], step);
#pragma unroll
    for (int nt = 0; nt < NT; nt++)
      mma(scores[nt][step % CHAINS], a[0], b[0], a[1], b[1], q.pairs[nt][step][0], q.pairs[nt][step][1]);
  }

  Scales scales = read_scales(scales_at, g);
  const bool some = first < here.low || first + TILE > here.end || first + TILE - 1 > here.length - p.sq ||
                    (p.window >= 0 && first <= here.length - 1 - p.window);
  const int at[2] = {first + g, first + g + 8};
  if (some) {  // what nobody sees may be NaN
#pragma unroll
    for (int j = 0; j < 2; j++)
      if (at[j] < here.low || at[j] >= here.end) scales.v[j] = scales.v_zero[j] = 0.0f;
  }
  u32 weights[NT][2];
#pragma unroll
  for (int nt = 0; nt < NT; nt++) {
    float x[4];
#pragma unroll
    for (int e = 0; e < 4; e++) {
      const int token = e / 2, row = e % 2;
      float product = scores[nt][0][e];
      if (CHAINS == 2) product += scores[nt][CHAINS - 1][e];
      const float zero = KEY == 2 ? scales.k_zero[token] * q.sum[nt][row] + q.moved[nt][row] : q.moved[nt][row];
      x[e] = (product * q.factor[nt][row] - q.bias[nt][row]) * scales.k[token] + zero;
    }
    if (SOFTCAP) cap(x, p.softcap);
    if (some) hide(x, p, here, nt, t, at, here.low, here.end);
    weigh(weights[nt], sums, nt, x, scales);
  }

  u32 value_words[4][V_WORDS];  // of the tokens 2 t, 2 t + 1, 2 t + 8, 2 t + 9
#pragma unroll
  for (int token = 0; token < 4; token++)
#pragma unroll
    for (int piece = 0; piece < V_BYTES / V_PIECE; piece++)
      read<V_PIECE>(&value_words[token][piece * V_PIECE / 4],
                    values + (2 * t + token % 2 + token / 2 * 8) * V_ROW + g * V_BYTES + piece * V_PIECE);
  if (VALUE == 0 && some) {
#pragma unroll
    for (int token = 0; token < 4; token++) {
      const int place = first + 2 * t + token % 2 + token / 2 * 8;
#pragma unroll
      for (int word = 0; word < V_WORDS; word++)
        if (place < here.low || place >= here.end) value_words[token][word] = 0;
    }
  }
#pragma unroll
  for (int word = 0; word < V_WORDS; word++) {
    u32 a[V_CODES], b[V_CODES];
    value_operand(a, value_words[0][word], value_words[1][word]);
    value_operand(b, value_words[2][word], value_words[3][word]);
#pragma unroll
    for (int j = 0; j < V_CODES; j += 2)
#pragma unroll
      for (int nt = 0; nt < NT; nt++)
        mma(sums.out[nt][(word * V_CODES + j) / 2], a[j], a[j + 1], b[j], b[j + 1], weights[nt][0], weights[nt][1]);
  }
}

// ---- tokens in 16 bits ----

// Four numbers in a row as two pairs of float16; zeros unless `valid`.
DEVICE uint2 near_values(const char* base, i64 index, int kind, bool valid) {
  uint2 bits = {0, 0};
  if (valid) bits = load8(base + 2 * index);
  if (kind == 2) return bits;
  return {half2_of(as_float(bits.x << 16), as_float(bits.x & 0xFFFF0000u)),
          half2_of(as_float(bits.y << 16), as_float(bits.y & 0xFFFF0000u))};
}

// Position of the token in a near slot, or -1 for none.
DEVICE int near_position(const Params& p, int start, int length, int slot) {
  if (slot < p.first) return start + slot < length ? start + slot : -1;
  const int late = slot - p.first;
  if (late >= p.newest || late >= length) return -1;
  const int position = late + p.newest * ((length - 1 - late) / p.newest);
  return position >= start + p.first ? position : -1;
}

// The tile of near slots from `first` on.
DEVICE void attend_near(Sums& sums, const Queries& q, const Params& p, const Place& here, int start, int first, int g,
                        int t) {
  const i64 k_at = here.batch * p.kn_row + here.head * p.kn_head, v_at = here.batch * p.vn_row + here.head * p.vn_head;
  int at[2];
#pragma unroll
  for (int j = 0; j < 2; j++) at[j] = near_position(p, start, here.length, first + g + 8 * j);
  bool valid[4];
#pragma unroll
  for (int j = 0; j < 4; j++) {
    const i64 slot = first + 2 * t + j % 2 + j / 2 * 8;
    valid[j] = near_position(p, start, here.length, slot) >= 0;
    if (valid[j]) prefetch(p.v_near + 2 * (v_at + slot * p.vn_slot + value_channel(g, 0)));
  }
  float scores[NT][4];
#pragma unroll
  for (int i = 0; i < 4 * NT; i++) scores[i / 4][i % 4] = 0.0f;
#pragma unroll
  for (int step = 0; step < K_STEPS; step++) {
    uint2 pairs[2];
#pragma unroll
    for (int j = 0; j < 2; j++) {
      const i64 index = k_at + (first + g + 8 * j) * p.kn_slot + near_channel(t, step, 0, 0);
      pairs[j] = near_values(p.k_near, index, p.near_kind, at[j] >= 0);
    }
#pragma unroll
    for (int nt = 0; nt < NT; nt++)
      mma(scores[nt], pairs[0].x, pairs[1].x, pairs[0].y, pairs[1].y, q.pairs[nt][step][0], q.pairs[nt][step][1]);
  }
  const Scales scales = {{1.0f, 1.0f}, {0.0f, 0.0f}, {WEIGHT, WEIGHT}, {0.0f, 0.0f}};
  u32 weights[NT][2];
#pragma unroll
  for (int nt = 0; nt < NT; nt++) {
    float x[4];
#pragma unroll
    for (int e = 0; e < 4; e++) x[e] = scores[nt][e] * q.factor[nt][e % 2];
    if (SOFTCAP) cap(x, p.softcap);
    hide(x, p, here, nt, t, at, 0, here.length);
    weigh(weights[nt], sums, nt, x, scales);
  }
  constexpr int PARTS = VALUE == 2 ? 2 : 1;  // runs of four channels that a word's codes make
#pragma unroll
  for (int word = 0; word < V_WORDS; word++) {
    u32 operands[2][V_CODES];  // of tokens 2 t, 2 t + 1 and of 2 t + 8, 2 t + 9: register i holds code i of both
#pragma unroll
    for (int pair = 0; pair < 2; pair++)
#pragma unroll
      for (int part = 0; part < PARTS; part++) {
        uint2 both[2];
#pragma unroll
        for (int j = 0; j < 2; j++) {
          const i64 slot = first + 2 * t + j + 8 * pair;
          const i64 index = v_at + slot * p.vn_slot + value_channel(g, word * V_CODES + part);
          both[j] = near_values(p.v_near, index, p.near_kind, valid[2 * pair + j]);
        }
        operands[pair][part] = __byte_perm(both[0].x, both[1].x, 0x5410);
        operands[pair][PARTS + part] = __byte_perm(both[0].x, both[1].x, 0x7632);
        operands[pair][2 * PARTS + part] = __byte_perm(both[0].y, both[1].y, 0x5410);
        operands[pair][3 * PARTS + part] = __byte_perm(both[0].y, both[1].y, 0x7632);
      }
#pragma unroll
    for (int j = 0; j < V_CODES; j += 2)
#pragma unroll
      for (int nt = 0; nt < NT; nt++)
        mma(sums.out[nt][(word * V_CODES + j) / 2], operands[0][j], operands[0][j + 1], operands[1][j],
            operands[1][j + 1], weights[nt][0], weights[nt][1]);
  }
}

// ---- the kernel ----

// The warps' sums, added in their order, to the result or to this share's.
DEVICE void merge_warps(const Params& p, const Place& here, Sums& sums, float* all, int warp, int g, int t) {
  float* tops = all + WARPS * ROWS * D;  // [WARPS][ROWS][2] after [WARPS][ROWS][D]
#pragma unroll
  for (int nt = 0; nt < NT; nt++) {
#pragma unroll
    for (int row = 0; row < 2; row++) {
      float total = sums.total[nt][row], zeros = sums.zeros[nt][row];
#pragma unroll
      for (int step = 4; step < 32; step *= 2) {
        total += __shfl_xor_sync(~0u, total, step);
        zeros += __shfl_xor_sync(~0u, zeros, step);
      }
      const int at = warp * ROWS + 8 * nt + 2 * t + row;
      if (g == 0) tops[2 * at] = total > 0.0f ? sums.reference[nt][row] : -INFINITE, tops[2 * at + 1] = total;
#pragma unroll
      for (int i = 0; i < D / 8; i++)
        all[at * D + value_channel(g, i)] = sums.out[nt][i / 2][i % 2 * 2 + row] * (1.0f / WEIGHT) + zeros;
    }
  }
  __syncthreads();
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
  const int valid = min(p.rows - here.first_row, ROWS);
  for (int index = threadIdx.x; index < valid * D; index += THREADS) {
    const int row = index / D, column = index % D;
    float top = -INFINITE, result = 0.0f, whole = 0.0f;
#pragma unroll
    for (int w = 0; w < WARPS; w++) top = fmaxf(top, tops[2 * (w * ROWS + row)]);
    const float reference = top == -INFINITE ? 0.0f : top;
#pragma unroll
    for (int w = 0; w < WARPS; w++) {
      const float share = exp2_(tops[2 * (w * ROWS + row)] - reference);
      whole += share * tops[2 * (w * ROWS + row) + 1];
      result += share * all[(w * ROWS + row) * D + column];
    }
    if (p.splits == 1) {
      finish(p, here.batch, here.head, here.first_row + row, column, result, reference, whole);
    } else {
      const i64 at = ((static_cast<i64>(here.split) * p.batches + here.batch) * p.heads + here.head) * p.rows +
                     here.first_row + row;
      if (column == 0) p.sums[2 * at] = top, p.sums[2 * at + 1] = whole;
      p.part[at * D + column] = result;
    }
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, CTAS) attention_decode(const __grid_constant__ Params p) {
  extern __shared__ __align__(128) unsigned char shared[];
  asm volatile("griddepcontrol.wait;" ::: "memory");
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const Place here = place_of(p);
  const int steps = (max(here.end - here.begin, 0) + STEP - 1) / STEP;  // of the CTA
  const int mine = (steps - warp + WARPS - 1) / WARPS;                  // of this warp: warp, warp + WARPS, ...
  Copies copies(p, here, shared_address(shared), warp, lane);
#pragma unroll
  for (int i = 0; i < STAGES - 1; i++) {
    if (i < mine) copies.issue(p, here);
    copies_commit();
  }

  Sums sums;
#pragma unroll
  for (int nt = 0; nt < NT; nt++) {
#pragma unroll
    for (int i = 0; i < D / 4; i++) sums.out[nt][i / 4][i % 4] = 0.0f;
#pragma unroll
    for (int e = 0; e < 2; e++) sums.reference[nt][e] = LOWEST, sums.total[nt][e] = sums.zeros[nt][e] = 0.0f;
  }
  Queries q;
  if (NEAR && here.split == 0) {  // while the first tiles are on their way
    load_queries<false>(q, p, here, g, t);
    const int start = p.start == nullptr ? 0 : max(p.start[here.batch], 0);
    for (int slot = warp * TILE; slot < p.first + p.newest; slot += WARPS * TILE)
      attend_near(sums, q, p, here, start, slot, g, t);
  }
  load_queries<true>(q, p, here, g, t);
  u32 from = copies.ring, barrier = copies.full, parity = 0;
  int first = here.begin + warp * STEP;
  for (int i = 0; i < mine; i++) {
    barrier_wait(barrier, parity);
    copies_wait<STAGES - 2>();
    __syncwarp();  // all have copied this tile, and read the one whose place the next copy takes
    if (i + STAGES - 1 < mine) copies.issue(p, here);
    copies_commit();
#pragma unroll 1
    for (int tile = 0; tile < TILES; tile++)
      if (tile == 0 || first + TILE * tile < here.end)
        attend_codes(sums, q, p, here, from + tile * K_TILE, from + TILES * K_TILE + tile * V_TILE,
                     from + TILES * (K_TILE + V_TILE) + 8 * TILE * tile, first + TILE * tile, g, t);
    first += WARPS * STEP;
    const bool last = from == copies.ring + (STAGES - 1) * STAGE;
    from = last ? copies.ring : from + STAGE;
    barrier = last ? copies.full : barrier + 8;
    parity ^= last;
  }
  copies_wait<0>();
  __syncthreads();
  merge_warps(p, here, sums, reinterpret_cast<float*>(shared), warp, g, t);
}

// One CTA of MERGERS * D threads for each row: adds the shares of all splits, every thread those of its own splits first.
constexpr int MERGERS = 4, MOST_SPLITS = 128;
extern "C" __global__ void __launch_bounds__(MERGERS * D) merge(const __grid_constant__ Params p) {
  __shared__ float shares[MOST_SPLITS];
  __shared__ float both[2];
  __shared__ float partial[MERGERS][D];
  asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
  const i64 pairs = static_cast<i64>(p.batches) * p.heads * p.rows, at = blockIdx.x;
  const int column = threadIdx.x % D, mine = threadIdx.x / D;
  float values[MOST_SPLITS / MERGERS];  // on their way while the shares are computed
#pragma unroll
  for (int i = 0; i < MOST_SPLITS / MERGERS; i++) {
    const int split = mine + i * MERGERS;
    values[i] = split < p.splits ? p.part[(split * pairs + at) * D + column] : 0.0f;
  }
  if (threadIdx.x < 32) {
    float tops[MOST_SPLITS / 32], totals[MOST_SPLITS / 32], top = -INFINITE, whole = 0.0f;
#pragma unroll
    for (int j = 0; j < MOST_SPLITS / 32; j++) {
      const int split = threadIdx.x + 32 * j;
      tops[j] = split < p.splits ? p.sums[2 * (split * pairs + at)] : -INFINITE;
      totals[j] = split < p.splits ? p.sums[2 * (split * pairs + at) + 1] : 0.0f;
      top = fmaxf(top, tops[j]);
    }
#pragma unroll
    for (int step = 1; step < 32; step *= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, step));
    const float reference = top == -INFINITE ? 0.0f : top;
#pragma unroll
    for (int j = 0; j < MOST_SPLITS / 32; j++) {
      const float share = exp2_(tops[j] - reference);
      whole += share * totals[j];
      shares[threadIdx.x + 32 * j] = share;
    }
#pragma unroll
    for (int step = 1; step < 32; step *= 2) whole += __shfl_xor_sync(~0u, whole, step);
    if (threadIdx.x == 0) both[0] = reference, both[1] = whole;
  }
  __syncthreads();
  float result = 0.0f;
#pragma unroll
  for (int i = 0; i < MOST_SPLITS / MERGERS; i++) result += shares[mine + i * MERGERS] * values[i];
  partial[mine][column] = result;
  __syncthreads();
  if (mine != 0) return;
#pragma unroll
  for (int i = 1; i < MERGERS; i++) result += partial[i][column];
  const int row = at % p.rows, pair = at / p.rows;
  finish(p, pair / p.heads, pair % p.heads, row, column, result, both[0], both[1]);
}
