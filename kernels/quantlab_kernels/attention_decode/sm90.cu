// Attention of a few queries over a packed KV cache, a share of a sequence's tokens in each CTA; `merge` adds shares.
//
// The transposed products are computed: 16 tokens are the M side of the first MMA (scores^T = K q^T), 16 channels that of
// the second (out^T = V^T p^T), 8 query rows are the N side of both, which is what a group of 4 to 8 heads fills.
//
// No thread reads what another one copied. The contraction runs over channels in any order, and so do tokens in the
// second product: each thread is given a contiguous piece of the rows that its fragments need, copies it into its own
// place in shared memory (16 bytes a copy, several stages ahead, no barrier but the thread's own), and reads it back as
// registers. There they become float16 by bit operations: a code in the low bits of 1024 is 1024 + code. In the first
// product that 1024 stays and is taken from the score, times the sum of the query (exact to 2^-14 of a code); in the
// second, whose sums are long, it is subtracted from the operand.
//
// Scales of values go into the weights. Weights are float16, relative to the largest ``p * s_v`` of their row so far,
// times 2^14: weights down to 2^-28 of that keep all their bits.
//
// Compiled once per configuration, with these macros:
//   D      head dim: 64, 128, 256;   NT  rows of the tile / 8
//   KEY, VALUE   0 E4M3, 1 INT8, 2 INT4;   QUERY  and result: 0 float32, 1 bfloat16, 2 float16
//   PAGED, RING, SOFTCAP   0 or 1;   WARPS, STAGES, CTAS   of a CTA, of a thread's ring, resident on a multiprocessor
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;
using i64 = long long;
#define DEVICE __device__ __forceinline__

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
  float* part;
  float* sums;
  char* out;
  float* lse;
  i64 q_batch, q_head, q_token;          // in elements
  i64 k_row, k_head, v_row, v_head;      // in bytes, as are the next; slots follow each other
  i64 ks_row, ks_head, vs_row, vs_head;
  i64 mean_batch, channel_batch;         // in elements
  int batches, heads, group, sq, rows, tiles, splits, capacity, table_row, window, sinks_kind;
  float scale, softcap;
};

constexpr int ROWS = 8 * NT;
constexpr int TILE = 16;  // tokens of a step of a warp
constexpr int THREADS = 32 * WARPS;
constexpr int K_ROW = D / (KEY == 2 ? 2 : 1), V_ROW = D / (VALUE == 2 ? 2 : 1);  // bytes of a token
constexpr int K_BYTES = K_ROW / 4, V_BYTES = V_ROW / 8;                          // of it, in one thread
constexpr int K_PIECE = K_BYTES < 16 ? K_BYTES : 16;
constexpr int V_PIECE = V_BYTES < 16 ? V_BYTES : 16;
constexpr int K_STAGE = 2 * K_BYTES * 32;
constexpr int V_STAGE = 4 * V_BYTES * 32;
constexpr int STAGE = K_STAGE + V_STAGE + 4 * 4 * 32;  // and four scales
constexpr int CHAINS = NT == 1 ? 2 : 1;  // of dependent MMAs that make a score
constexpr float LOG2E = 1.4426950408889634f;
#define INFINITE __int_as_float(0x7f800000)
constexpr float WEIGHT = 16384.0f;

DEVICE float as_float(u32 bits) { return __uint_as_float(bits); }
DEVICE float exp2_(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
DEVICE float log2_(float x) {
  float y;
  asm("lg2.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
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

template <int BYTES>
DEVICE void copy(u32 to, const char* from, bool valid) {
  const int size = valid ? BYTES : 0;  // what is not copied is filled with zeros; a constant `valid` costs nothing
  if constexpr (BYTES == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(size) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(to), "l"(from), "n"(BYTES), "r"(size) : "memory");
}
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
DEVICE void pin(u32& address) { asm volatile("" : "+r"(address)); }
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
  int length, low, begin, end;  // tokens low .. are seen; begin, a multiple of the tile, to end is this CTA's share
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
  if (p.window >= 0) low = max(low, length - p.sq + 1 - p.window);
  if (RING) low = max(low, length - p.capacity);
  here.length = length;
  here.low = low;
  const int base = low / TILE * TILE;
  const int share = (max(length - base, 0) + p.splits * TILE - 1) / (p.splits * TILE) * TILE;
  here.begin = base + here.split * share;
  here.end = min(here.begin + share, length);
  return here;
}

// Where the pieces of a thread begin in a tile of 16 tokens.
struct Tile {
  const char* k;
  const char* v;
  const char* k_scale;
  const char* v_scale;
};

DEVICE Tile moved(const Params& p, const Tile& from, i64 row, i64 slot) {
  return {from.k + row * p.k_row + slot * K_ROW, from.v + row * p.v_row + slot * V_ROW,
          from.k_scale + row * p.ks_row + slot * 4, from.v_scale + row * p.vs_row + slot * 4};
}

// Keys of tokens g and g + 8, values of tokens 2 t, 2 t + 1, 2 t + 8, 2 t + 9, scales of g and g + 8, as far as the
// first `count` of the tile.
template <bool WHOLE>
DEVICE void copy_tile(const Tile& tile, u32 to, int count, int lane) {
  const int g = lane / 4, t = lane % 4;
#pragma unroll
  for (int token = 0; token < 2; token++)
#pragma unroll
    for (int piece = 0; piece < K_BYTES / K_PIECE; piece++)
      copy<K_PIECE>(to + ((token * (K_BYTES / K_PIECE) + piece) * 32 + lane) * K_PIECE,
                    tile.k + 8 * token * K_ROW + piece * K_PIECE, WHOLE || g + 8 * token < count);
#pragma unroll
  for (int token = 0; token < 4; token++) {
    const int at = token % 2 + token / 2 * 8;
#pragma unroll
    for (int piece = 0; piece < V_BYTES / V_PIECE; piece++)
      copy<V_PIECE>(to + K_STAGE + ((token * (V_BYTES / V_PIECE) + piece) * 32 + lane) * V_PIECE,
                    tile.v + at * V_ROW + piece * V_PIECE, WHOLE || 2 * t + at < count);
  }
  const u32 scales = to + K_STAGE + V_STAGE + lane * 4;
#pragma unroll
  for (int token = 0; token < 2; token++) {
    copy<4>(scales + 128 * token, tile.k_scale + 32 * token, WHOLE || g + 8 * token < count);
    copy<4>(scales + 256 + 128 * token, tile.v_scale + 32 * token, WHOLE || g + 8 * token < count);
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, CTAS) attention_decode(const __grid_constant__ Params p) {
  extern __shared__ __align__(128) unsigned char shared[];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const Place here = place_of(p);
  u32 ring = static_cast<u32>(__cvta_generic_to_shared(shared)) + warp * STAGES * STAGE;
  const int count = max(here.end - here.begin, 0);
  const int steps = (count + TILE - 1) / TILE;                  // of the CTA
  const int mine = (steps - warp + WARPS - 1) / WARPS;          // of this warp: warp, warp + WARPS, ...

  // The pieces of the next tile to copy: of a dense cache they move on by a constant, else they are a head's first.
  int next = here.begin + warp * TILE;
  Tile tile = {p.k + here.head * p.k_head + g * K_ROW + t * K_BYTES,
               p.v + here.head * p.v_head + 2 * t * V_ROW + g * V_BYTES,
               p.k_scale + here.head * p.ks_head + 4 * g, p.v_scale + here.head * p.vs_head + 4 * g};
  if (!PAGED && !RING) tile = moved(p, tile, here.batch, next);
  u32 to = ring;
  pin(tile.k), pin(tile.v), pin(tile.k_scale), pin(tile.v_scale), pin(ring);
  auto issue = [&]() {
    Tile from = tile;
    if (PAGED) {
      const int page = p.table[static_cast<i64>(here.batch) * p.table_row + next / p.capacity];
      from = moved(p, tile, page, next % p.capacity);
    } else if (RING) {
      from = moved(p, tile, here.batch, next % p.capacity);
    } else {
      tile.k += WARPS * TILE * K_ROW, tile.v += WARPS * TILE * V_ROW;
      tile.k_scale += WARPS * TILE * 4, tile.v_scale += WARPS * TILE * 4;
    }
    if (next + TILE <= here.end)
      copy_tile<true>(from, to, 0, lane);
    else
      copy_tile<false>(from, to, here.end - next, lane);
    next += WARPS * TILE;
    to = to == ring + (STAGES - 1) * STAGE ? ring : to + STAGE;
  };
#pragma unroll
  for (int i = 0; i < STAGES - 1; i++) {
    if (i < mine) issue();
    asm volatile("cp.async.commit_group;" ::: "memory");
  }

  // Queries, as the second operand of the first product: row g of each eight, the channels of this thread's keys.
  // float16 with the largest of a row between 64 and 128; a channel's unit is divided out.
  u32 q[NT][K_STEPS][2];
  float factor[NT][2], shift[NT][2], bias[NT][2], q_sum[NT][2];  // of rows 2 t and 2 t + 1
  const float to_power = p.scale * LOG2E;
#pragma unroll
  for (int nt = 0; nt < NT; nt++) {
    const int row = here.first_row + 8 * nt + g;
    const bool inside = row < p.rows;
    const i64 at = here.batch * p.q_batch + (here.head * p.group + row % p.group) * p.q_head + row / p.group * p.q_token;
    const float* mean = p.mean == nullptr ? nullptr : p.mean + here.batch * p.mean_batch + here.head * D;
    const float* channel = p.channel == nullptr ? nullptr : p.channel + here.batch * p.channel_batch + here.head * D;
    float values[K_CODES], largest = 1e-30f, moved = 0.0f;
#pragma unroll
    for (int i = 0; i < K_CODES; i++) {
      const int c = key_channel(t, i / 4, i / 2 % 2, i % 2);
      values[i] = inside ? load_float(p.q, at + c, QUERY) : 0.0f;
      if (mean != nullptr) moved += values[i] * mean[c];
      if (channel != nullptr) values[i] *= channel[c];
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
      const float unit = key_unit(i / 2 % 2);
      const u32 pair = half2_of(values[i] * up / unit, values[i + 1] * up / unit);
      q[nt][i / 4][i / 2 % 2] = pair;
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
      factor[nt][e] = to_power / __shfl_sync(~0u, up, from);
      shift[nt][e] = __shfl_sync(~0u, moved, from) * to_power;
      bias[nt][e] = __shfl_sync(~0u, based, from) * KEY_BASE;
      q_sum[nt][e] = __shfl_sync(~0u, sum, from);
    }
  }

  float out[NT][D / 16][4], largest[NT][2], total[NT][2], zeros[NT][2];
#pragma unroll
  for (int nt = 0; nt < NT; nt++) {
#pragma unroll
    for (int i = 0; i < D / 16; i++)
#pragma unroll
      for (int e = 0; e < 4; e++) out[nt][i][e] = 0.0f;
#pragma unroll
    for (int e = 0; e < 2; e++) largest[nt][e] = -INFINITE, total[nt][e] = zeros[nt][e] = 0.0f;
  }

  u32 from = ring;
  int first = here.begin + warp * TILE;
  for (int i = 0; i < mine; i++) {
    if (i + STAGES - 1 < mine) issue();
    asm volatile("cp.async.commit_group;\ncp.async.wait_group %0;" ::"n"(STAGES - 1) : "memory");

    u32 words[2][K_BYTES / 4];
#pragma unroll
    for (int token = 0; token < 2; token++)
#pragma unroll
      for (int piece = 0; piece < K_BYTES / K_PIECE; piece++)
        read<K_PIECE>(&words[token][piece * K_PIECE / 4],
                      from + ((token * (K_BYTES / K_PIECE) + piece) * 32 + lane) * K_PIECE);
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
        mma(scores[nt][step % CHAINS], a[0], b[0], a[1], b[1], q[nt][step][0], q[nt][step][1]);
    }

    u32 scale_bits[4];
#pragma unroll
    for (int j = 0; j < 4; j++) read<4>(&scale_bits[j], from + K_STAGE + V_STAGE + 128 * j + lane * 4);
    float k_scale[2], k_zero[2], v_scale[2], v_zero[2], v_log[2];
#pragma unroll
    for (int j = 0; j < 2; j++) {
      k_scale[j] = KEY == 2 ? low_half(scale_bits[j]) : as_float(scale_bits[j]);
      k_zero[j] = KEY == 2 ? high_half(scale_bits[j]) : 0.0f;
      v_scale[j] = VALUE == 2 ? low_half(scale_bits[2 + j]) : as_float(scale_bits[2 + j]);
      v_zero[j] = VALUE == 2 ? high_half(scale_bits[2 + j]) : 0.0f;
      v_log[j] = log2_(v_scale[j]);
    }
    const bool whole = first >= here.low && first + TILE <= here.end && first + TILE - 1 <= here.length - p.sq &&
                       (p.window < 0 || first > here.length - 1 - p.window);
    u32 weights[NT][2];
#pragma unroll
    for (int nt = 0; nt < NT; nt++) {
      float x[4];  // tokens g, g + 8; of each, rows 2 t, 2 t + 1
#pragma unroll
      for (int e = 0; e < 4; e++) {
        const int token = e / 2, row = e % 2;
        float product = scores[nt][0][e];
        if (CHAINS == 2) product += scores[nt][CHAINS - 1][e];
        float score = (product - bias[nt][row]) * k_scale[token];
        if (KEY == 2) score += k_zero[token] * q_sum[nt][row];
        x[e] = score * factor[nt][row] + shift[nt][row];
        if (SOFTCAP) {
          const float cap = p.softcap * LOG2E;
          x[e] = cap - 2.0f * cap / (1.0f + exp2_(x[e] * (2.0f / p.softcap)));
        }
      }
      if (!whole) {
#pragma unroll
        for (int e = 0; e < 4; e++) {
          const int at = first + g + 8 * (e / 2);
          const int place = here.length - p.sq + (here.first_row + 8 * nt + 2 * t + e % 2) / p.group;
          const bool seen = at >= here.low && at < here.end && at <= place && (p.window < 0 || at > place - p.window);
          if (!seen) x[e] = -INFINITE;
        }
      }
      float rescale[2];
      bool grown = false;
#pragma unroll
      for (int row = 0; row < 2; row++) {
        float top = fmaxf(x[row] + v_log[0], x[2 + row] + v_log[1]);
#pragma unroll
        for (int step = 4; step < 32; step *= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, step));
        grown = grown || top > largest[nt][row];
        top = fmaxf(top, largest[nt][row]);
        const float reference = top == -INFINITE ? 0.0f : top;
        rescale[row] = exp2_(largest[nt][row] - reference);
        largest[nt][row] = top;
        const float a = exp2_(x[row] - reference), b = exp2_(x[2 + row] - reference);
        total[nt][row] = total[nt][row] * rescale[row] + a + b;
        if (VALUE == 2) zeros[nt][row] = zeros[nt][row] * rescale[row] + a * v_zero[0] + b * v_zero[1];
        x[row] = a * v_scale[0] * WEIGHT;
        x[2 + row] = b * v_scale[1] * WEIGHT;
      }
      if (__any_sync(~0u, grown)) {
#pragma unroll
        for (int j = 0; j < D / 16; j++)
#pragma unroll
          for (int e = 0; e < 4; e++) out[nt][j][e] *= rescale[e % 2];
      }
      weights[nt][0] = transposed(half2_of(x[0], x[1]));
      weights[nt][1] = transposed(half2_of(x[2], x[3]));
    }

    u32 value_words[4][V_WORDS];
#pragma unroll
    for (int token = 0; token < 4; token++)
#pragma unroll
      for (int piece = 0; piece < V_BYTES / V_PIECE; piece++)
        read<V_PIECE>(&value_words[token][piece * V_PIECE / 4],
                      from + K_STAGE + ((token * (V_BYTES / V_PIECE) + piece) * 32 + lane) * V_PIECE);
#pragma unroll
    for (int word = 0; word < V_WORDS; word++) {
      u32 a[V_CODES], b[V_CODES];
      value_operand(a, value_words[0][word], value_words[1][word]);
      value_operand(b, value_words[2][word], value_words[3][word]);
#pragma unroll
      for (int j = 0; j < V_CODES; j += 2)
#pragma unroll
        for (int nt = 0; nt < NT; nt++)
          mma(out[nt][(word * V_CODES + j) / 2], a[j], a[j + 1], b[j], b[j + 1], weights[nt][0], weights[nt][1]);
    }
    first += WARPS * TILE;
    from = from == ring + (STAGES - 1) * STAGE ? ring : from + STAGE;
  }

  // The warps' sums, added in their order.
  asm volatile("cp.async.wait_all;" ::: "memory");
  __syncthreads();
  float* sums = reinterpret_cast<float*>(shared);   // [WARPS][ROWS][D]
  float* tops = sums + WARPS * ROWS * D;            // [WARPS][ROWS][2]
#pragma unroll
  for (int nt = 0; nt < NT; nt++) {
#pragma unroll
    for (int row = 0; row < 2; row++) {
#pragma unroll
      for (int step = 4; step < 32; step *= 2) {
        total[nt][row] += __shfl_xor_sync(~0u, total[nt][row], step);
        zeros[nt][row] += __shfl_xor_sync(~0u, zeros[nt][row], step);
      }
      const int at = warp * ROWS + 8 * nt + 2 * t + row;
      if (g == 0) tops[2 * at] = largest[nt][row], tops[2 * at + 1] = total[nt][row];
#pragma unroll
      for (int i = 0; i < D / 8; i++)
        sums[at * D + value_channel(g, i)] = out[nt][i / 2][i % 2 * 2 + row] * (1.0f / WEIGHT) + zeros[nt][row];
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
      result += share * sums[(w * ROWS + row) * D + column];
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

// One CTA of D threads for each row: adds the shares of all splits in their order.
extern "C" __global__ void __launch_bounds__(D) merge(const __grid_constant__ Params p) {
  __shared__ float shares[128];
  __shared__ float both[2];
  asm volatile("griddepcontrol.wait;" ::: "memory");
  const i64 pairs = static_cast<i64>(p.batches) * p.heads * p.rows, at = blockIdx.x;
  if (threadIdx.x < 32) {
    float tops[4], top = -INFINITE, whole = 0.0f;
#pragma unroll
    for (int j = 0; j < 4; j++) {
      const int split = threadIdx.x + 32 * j;
      tops[j] = split < p.splits ? p.sums[2 * (split * pairs + at)] : -INFINITE;
      top = fmaxf(top, tops[j]);
    }
#pragma unroll
    for (int step = 1; step < 32; step *= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, step));
    const float reference = top == -INFINITE ? 0.0f : top;
#pragma unroll
    for (int j = 0; j < 4; j++) {
      const int split = threadIdx.x + 32 * j;
      const float share = exp2_(tops[j] - reference);
      if (split < p.splits) whole += share * p.sums[2 * (split * pairs + at) + 1];
      shares[split] = share;
    }
#pragma unroll
    for (int step = 1; step < 32; step *= 2) whole += __shfl_xor_sync(~0u, whole, step);
    if (threadIdx.x == 0) both[0] = reference, both[1] = whole;
  }
  __syncthreads();
  float result = 0.0f;
#pragma unroll 8
  for (int split = 0; split < p.splits; split++)
    result += shares[split] * p.part[(split * pairs + at) * D + threadIdx.x];
  const int row = at % p.rows, pair = at / p.rows;
  finish(p, pair / p.heads, pair % p.heads, row, threadIdx.x, result, both[0], both[1]);
}
