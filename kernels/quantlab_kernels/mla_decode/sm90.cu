// Absorbed attention over packed latents, transposed: scores are C q^T [tokens, rows], outputs C^T p [channels, rows],
// rows being heads times queries, so that tokens and channels fill the 64 rows of warpgroup MMA whatever the heads.
//
// One thread brings chunks of 64 tokens by 128 bytes through the copy engine into one ring. Teams of warpgroups take
// tiles of 64 tokens in turns, each with sums of its own, and meet at the end: while one team takes exponentials another
// multiplies. The warpgroups of a team share the channels of a tile, in both products; partial scores are exchanged.
//
// 16-bit latents are operands in shared memory of both products, rows along K in the first and along M in the second.
// Codes are read twice and become float16 in registers, each time as the fragment that the product wants: the contraction
// of the first and the rows of the second run over channels in any order, so a thread takes what lies side by side. In
// the first product an integer code is 1024 + code, whose 1024 is taken from the score; in the second it is exact.
//
// The scale of a token multiplies its scores and goes into the exponent of its weight; 256 stands for the largest.
//
// Compiled once per configuration, with these macros:
//   L       latent channels, 256 or 512 (position channels are 64)
//   FORMAT  0 16 bits, 1 E4M3, 2 INT8, 3 INT4;   KEPT  what stays in 16 bits, QUERY  and result: 0 float32, 1 bfloat16,
//           2 float16
//   N       rows of a tile;   SHARE  warpgroups of a team, 1 or 2;   TEAMS;   RING  chunks
//   BOX     tokens of a copy;   PAGED;   SHARED  bytes that the launch provides
#include "sm90.cuh"
#include "attention.cuh"
#include "wgmma.cuh"

using i64 = long long;
struct Params {
  TensorMap latent, rope;
  const char* q_latent;
  const char* q_rope;
  const float* scale;
  const int* length;
  const int* start;
  const int* table;
  float* part;
  float* sums;
  char* out;
  float* lse;
  i64 ql_batch, ql_token, ql_head, qr_batch, qr_token, qr_head;  // in elements
  i64 scale_row;                                                 // floats from a sequence, or page, to the next
  int heads, sq, rows, tiles, splits, capacity, table_row, latent_row, rope_row, batches;
  float factor;  // of scores, for powers of two
};

constexpr int TILE = 64, CHUNK = TILE * 128, ROPE = 64;
constexpr int LATENT_CHUNKS = L * (FORMAT == 0 ? 16 : FORMAT == 3 ? 4 : 8) / 1024, CHUNKS = LATENT_CHUNKS + 1;
constexpr int MINE = LATENT_CHUNKS / SHARE;                          // chunks of a warpgroup
constexpr int CHUNK_BLOCKS = FORMAT == 0 ? 1 : FORMAT == 3 ? 4 : 2;  // blocks of 64 channels in a chunk
constexpr int BLOCKS = MINE * CHUNK_BLOCKS;
constexpr int GROUPS = N / 8 / SHARE;  // of 8 columns, whose softmax a warpgroup computes
constexpr int TEAM = 128 * SHARE, CONSUMERS = TEAM * TEAMS, THREADS = CONSUMERS + 128;
constexpr int REGISTERS = SHARE * TEAMS == 3 ? 160 : 240;  // of a consumer; the producers leave theirs
constexpr float LOG2E = 1.4426950408889634f;
constexpr float WEIGHT = 256.0f, LOG2_WEIGHT = 8.0f;
#define INFINITE __int_as_float(0x7f800000)

constexpr int Q_CHUNK = N * 128;  // 64 channels of all rows
constexpr int OFFSET_P = (L + ROPE) / 64 * Q_CHUNK;
constexpr int OFFSET_RING = OFFSET_P + TEAMS * N * 128;
constexpr int OFFSET_PARTS = OFFSET_RING + RING * CHUNK;  // of scores, on their way to the other warpgroup
constexpr int PARTS = SHARE == 2 ? 2 * TILE * (N / 2) * 4 : 0;
constexpr int OFFSET_TOP = OFFSET_PARTS + TEAMS * PARTS;     // [TEAMS][SHARE][4 warps][8 GROUPS]
constexpr int OFFSET_RESCALE = OFFSET_TOP + TEAMS * N * 16;  // [TEAMS][N], as are the next two
constexpr int OFFSET_LARGEST = OFFSET_RESCALE + TEAMS * N * 4;
constexpr int OFFSET_TOTAL = OFFSET_LARGEST + TEAMS * N * 4;
constexpr int OFFSET_FACTOR = OFFSET_TOTAL + TEAMS * N * 4;  // [N], as are the next two
constexpr int OFFSET_BASE = OFFSET_FACTOR + N * 4;
constexpr int OFFSET_PLACE = OFFSET_BASE + N * 4;
constexpr int OFFSET_BARRIERS = OFFSET_PLACE + N * 4;
static_assert(OFFSET_BARRIERS + 16 * RING <= SHARED, "the host allocates what is laid out here");
static_assert((TEAMS - 1) * BLOCKS * (N / 2) * TEAM * 4 <= RING * CHUNK, "sums of teams meet in the ring");
static_assert(RING >= CHUNKS * TEAMS, "every team holds a tile");

template <class T>
DEVICE T read(u32 from);
template <>
DEVICE float read<float>(u32 from) {
  float r;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(r) : "r"(from) : "memory");
  return r;
}
template <>
DEVICE u32 read<u32>(u32 from) {
  u32 r;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(r) : "r"(from) : "memory");
  return r;
}
template <>
DEVICE float2 read<float2>(u32 from) {
  float2 r;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(r.x), "=f"(r.y) : "r"(from) : "memory");
  return r;
}
template <>
DEVICE float4 read<float4>(u32 from) {
  float4 r;
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(r.x), "=f"(r.y), "=f"(r.z), "=f"(r.w) : "r"(from) : "memory");
  return r;
}
template <>
DEVICE uint4 read<uint4>(u32 from) {
  uint4 r;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(r.x), "=r"(r.y), "=r"(r.z), "=r"(r.w) : "r"(from) : "memory");
  return r;
}
DEVICE void write(u32 to, float x) { asm volatile("st.shared.f32 [%0], %1;" ::"r"(to), "f"(x) : "memory"); }
DEVICE void write(u32 to, float a, float b, float c, float d) {
  asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(to), "f"(a), "f"(b), "f"(c), "f"(d) : "memory");
}
DEVICE void write(u32 to, u16 x) { asm volatile("st.shared.b16 [%0], %1;" ::"r"(to), "h"(x) : "memory"); }
DEVICE void write_zeros(u32 to) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};" ::"r"(to), "r"(0) : "memory");
}

template <int KIND>
DEVICE float load_float(const char* base, i64 index) {
  if (KIND == 0) return reinterpret_cast<const float*>(base)[index];
  const u16 bits = reinterpret_cast<const u16*>(base)[index];
  return KIND == 1 ? BFloat16::unpack(bits) : Float16::unpack(bits);
}
template <int KIND>
DEVICE u32 pack(float low, float high) {
  return KIND == 1 ? BFloat16::pack(low, high) : Float16::pack(low, high);
}
// Writes x to shared memory in 16 bits, and returns what it has become.
template <int KIND>
DEVICE float write_half(u32 to, float x) {
  const u16 bits = static_cast<u16>(pack<KIND>(x, 0.0f));
  write(to, bits);
  return KIND == 1 ? BFloat16::unpack(bits) : Float16::unpack(bits);
}

// ---- codes ----

DEVICE u32 fp8_upper_pair(u32 pair) {
  u32 r;
  asm("{.reg .b16 a, b; mov.b32 {a, b}, %1; cvt.rn.f16x2.e4m3x2 %0, b;}" : "=r"(r) : "r"(pair));
  return r;
}

// Scores: thread t of a row holds bytes 32 t to 32 t + 31 of a chunk's 128, and makes its k-steps of 16 of them in order.
constexpr int STEPS = 4 * CHUNK_BLOCKS;  // of a chunk
constexpr bool HALVES = FORMAT == 3;     // of channels: a byte holds channels j and j + L / 2

// k-step and element (of 16) in which a channel is contracted.
DEVICE void scores_place(int channel, int& step, int& element) {
  if (FORMAT == 0) {
    step = channel / 16, element = channel % 16;
    return;
  }
  const int byte = HALVES ? channel % (L / 2) : channel;
  const int chunk = byte / 128, t = byte / 32 % 4, word = byte / 4 % 8, in = byte % 4;
  if (HALVES) {  // a byte's low nibble is in the first half of a step, its high one in the second
    step = chunk * STEPS + 2 * word + in % 2;
    element = 8 * (channel / (L / 2)) + 2 * t + in / 2;
  } else {
    step = chunk * STEPS + word;
    element = 8 * (in / 2) + 2 * t + in % 2;
  }
}
// The operand of a code is (unit code + base); queries are divided by the unit.
DEVICE float scores_unit(int channel) { return !HALVES ? 1.0f : channel < L / 2 ? 0.5f : 8.0f; }
DEVICE float scores_base(int channel) {
  return FORMAT == 2 ? 1152.0f : HALVES ? 1024.0f + 15.0f * scores_unit(channel) : 0.0f;
}
// Registers of row half `r` in k-step `step` of a chunk.
DEVICE void scores_operand(u32 (&a)[4], const u32 (&words)[8], int r, int step) {
  if constexpr (FORMAT == 3) {
    const u32 w = words[step / 2] >> (8 * (step % 2));
    a[r] = spread(w, 0x000F000Fu, 0x64006400u);
    a[2 + r] = spread(w, 0x00F000F0u, 0x64006400u);
  } else if constexpr (FORMAT == 2) {
    const u32 w = words[step] ^ 0x80808080u;
    a[r] = __byte_perm(w, 0x64646464u, 0x4140);
    a[2 + r] = __byte_perm(w, 0x64646464u, 0x4342);
  } else {
    a[r] = fp8_pair(words[step]);
    a[2 + r] = fp8_upper_pair(words[step]);
  }
}

// Outputs: thread g holds bytes 32 warp + 4 g to + 3 of a chunk; code i of these four is row g + 8 (i % 2) of block i / 2.
constexpr int CODES = 2 * CHUNK_BLOCKS;
DEVICE int output_channel(int chunk, int warp, int g, int i) {
  if (FORMAT == 0) return 64 * chunk + 16 * warp + g + 8 * i;
  const int byte = 128 * chunk + 32 * warp + 4 * g;
  return HALVES ? byte + i / 2 + i % 2 * (L / 2) : byte + i;
}
// Codes 4 part to + 3 of a word of two tokens: register i holds code i of both.
DEVICE void output_operand(u32 (&r)[4], u32 a, u32 b, int part) {
  if constexpr (FORMAT == 3) {
    const u32 w = __byte_perm(a, b, part ? 0x7632 : 0x5410);
    r[0] = minus(spread(w << 1, 0x001E001Eu, 0x64006400u), 0x640F640Fu);
    r[1] = times_plus(spread(w, 0x00F000F0u, 0x64006400u), 0x30003000u, 0xD878D878u);
    r[2] = minus(spread(w >> 7, 0x001E001Eu, 0x64006400u), 0x640F640Fu);
    r[3] = times_plus(spread(w >> 8, 0x00F000F0u, 0x64006400u), 0x30003000u, 0xD878D878u);
  } else if constexpr (FORMAT == 2) {
    const u32 x = a ^ 0x80808080u, y = b ^ 0x80808080u;
    const u32 low = __byte_perm(x, y, 0x5140), high = __byte_perm(x, y, 0x7362);
    r[0] = minus(__byte_perm(low, 0x64646464u, 0x4140), 0x64806480u);
    r[1] = minus(__byte_perm(low, 0x64646464u, 0x4342), 0x64806480u);
    r[2] = minus(__byte_perm(high, 0x64646464u, 0x4140), 0x64806480u);
    r[3] = minus(__byte_perm(high, 0x64646464u, 0x4342), 0x64806480u);
  } else if constexpr (FORMAT == 1) {
    const u32 low = __byte_perm(a, b, 0x5140), high = __byte_perm(a, b, 0x7362);
    r[0] = fp8_pair(low);
    r[1] = fp8_upper_pair(low);
    r[2] = fp8_pair(high);
    r[3] = fp8_upper_pair(high);
  }
}

// ---- what a CTA does ----

struct Work {
  int batch, first_row, split, low, length, begin, end, count;  // of its tiles
  DEVICE Work(const Params& p) {
    int index = blockIdx.x;
    first_row = index % p.tiles * N;
    index /= p.tiles;
    split = index % p.splits;
    batch = index / p.splits;
    length = p.length[batch];
    if (!PAGED) length = min(length, p.capacity);
    low = p.start == nullptr ? 0 : max(p.start[batch], 0);
    const int base = low / TILE * TILE;
    const int share = (max(length - base, 0) + p.splits * TILE - 1) / (p.splits * TILE) * TILE;
    begin = base + split * share;
    end = min(begin + share, length);
    count = max(end - begin + TILE - 1, 0) / TILE;
  }
};

// A place in the ring, and the parity of what its barriers complete next.
struct Place {
  int slot;
  u32 parity;
  DEVICE void advance(int chunks) {
    slot += chunks;
    if (slot >= RING) slot -= RING, parity ^= 1;
  }
};

struct Shared {
  u32 base;
  DEVICE u32 chunk(const Place& at) const { return base + OFFSET_RING + at.slot * CHUNK; }
  DEVICE u32 full(const Place& at) const { return base + OFFSET_BARRIERS + 16 * at.slot; }
  DEVICE u32 empty(const Place& at) const { return full(at) + 8; }
};

// ---- producer: one thread ----

DEVICE void produce(const Params& p, const Work& work, const Shared& s) {
  const u64 policy = p.tiles == 1 ? kEvictFirst : kEvictNormal;
  Place at = {0, 0};
  for (int tile = 0; tile < work.count; tile++) {
    const int position = work.begin + tile * TILE;
    int from[TILE / BOX], rows = 0;  // slots of the cache
    bool needed[TILE / BOX];
#pragma unroll
    for (int i = 0; i < TILE / BOX; i++) {
      const int first = position + i * BOX;
      needed[i] = first < work.end && first + BOX > work.low;
      rows += needed[i] ? BOX : 0;
      from[i] = first;
      if (PAGED && needed[i]) from[i] = p.table[static_cast<i64>(work.batch) * p.table_row + first / p.capacity];
    }
#pragma unroll
    for (int c = 0; c < CHUNKS; c++) {
      barrier_wait(s.empty(at), at.parity ^ 1);
      barrier_arrive_expect(s.full(at), rows * 128);
      const TensorMap* map = c == 0 ? &p.rope : &p.latent;
      const int row = c == 0 ? p.rope_row : p.latent_row;
#pragma unroll
      for (int i = 0; i < TILE / BOX; i++) {
        if (!needed[i]) continue;
        const int y = PAGED ? from[i] * row + (position + i * BOX) % p.capacity : work.batch * row + from[i];
        const int x = c == 0 ? 0 : (c - 1) * (FORMAT == 0 ? 64 : 128);
        tma_load(s.chunk(at) + i * BOX * 128, map, s.full(at), x, y, policy);
      }
      at.advance(1);
    }
  }
}

// ---- queries ----

// Where channel k of 64 of row n lies.
DEVICE u32 swizzled(int n, int k) { return n * 128 + ((k / 8 ^ n % 8) * 16) + k % 8 * 2; }

// Rows of queries as columns of both halves of the scores, the largest of a row near 128 by a power of two.
DEVICE void load_queries(const Params& p, const Work& work, u32 base, int thread) {
  const int lane = thread % 32;
  for (int n = thread / 32; n < N; n += CONSUMERS / 32) {
    const int row = work.first_row + n, head = row % p.heads, query = row / p.heads;
    const i64 latent_at = work.batch * p.ql_batch + query * p.ql_token + head * p.ql_head + lane;
    const i64 rope_at = work.batch * p.qr_batch + query * p.qr_token + head * p.qr_head + lane;
    float x[L / 32], turned[ROPE / 32], most = 0.0f;
#pragma unroll
    for (int i = 0; i < L / 32; i++) x[i] = row < p.rows ? load_float<QUERY>(p.q_latent, latent_at + 32 * i) : 0.0f;
#pragma unroll
    for (int i = 0; i < 2; i++) turned[i] = row < p.rows ? load_float<QUERY>(p.q_rope, rope_at + 32 * i) : 0.0f;
#pragma unroll
    for (int i = 0; i < L / 32; i++) most = fmaxf(most, fabsf(x[i]));
    most = fmaxf(most, fmaxf(fabsf(turned[0]), fabsf(turned[1])));
#pragma unroll
    for (int i = 1; i < 32; i *= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, i));
    const u32 exponent = max(__float_as_uint(most) >> 23, 27u);  // 2^(6 - e) times 2^e..2^(e+1)
    const float raised = __uint_as_float((260 - exponent) << 23);
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < L / 32; i++) {
      const int channel = lane + 32 * i;
      int step, element;
      scores_place(channel, step, element);
      const u32 to = base + step / 4 * Q_CHUNK + swizzled(n, step % 4 * 16 + element);
      const float kept = write_half<FORMAT == 0 ? KEPT : 2>(to, x[i] * raised / scores_unit(channel));
      sum += kept * scores_base(channel);
    }
#pragma unroll
    for (int i = 0; i < 2; i++)
      write_half<KEPT>(base + L / 64 * Q_CHUNK + swizzled(n, lane + 32 * i), turned[i] * raised);
#pragma unroll
    for (int i = 1; i < 32; i *= 2) sum += __shfl_xor_sync(~0u, sum, i);
    if (lane == 0) {
      write(base + OFFSET_FACTOR + 4 * n, p.factor / raised);
      write(base + OFFSET_BASE + 4 * n, sum);
      write(base + OFFSET_PLACE + 4 * n, static_cast<float>(work.length - p.sq + min(query, p.sq - 1)));
    }
  }
}

// ---- consumers ----

struct Thread {
  int team, part, index, warp, lane, g, t;  // part: of the team's channels;  index, warp: of the warpgroup
  DEVICE Thread() {
    const int group = uniform(threadIdx.x / 128);
    team = group / SHARE, part = group % SHARE;
    index = threadIdx.x % 128;
    warp = uniform(threadIdx.x / 32) % 4;
    lane = threadIdx.x % 32;
    g = lane / 4, t = lane % 4;
  }
};

struct Sums {
  float out[BLOCKS][N / 2];
  float largest[2 * GROUPS], total[2 * GROUPS];  // total: of this thread's tokens
};

template <int n>
DEVICE void pin(u32 (&registers)[n][4]) {
#pragma unroll
  for (int i = 0; i < n; ++i)
    asm volatile("" : "+r"(registers[i][0]), "+r"(registers[i][1]), "+r"(registers[i][2]), "+r"(registers[i][3])::"memory");
}
DEVICE void group_sync(const Thread& me) { named_barrier_sync(1 + me.team * SHARE + me.part, 128); }
DEVICE void team_sync(const Thread& me) {
  named_barrier_sync(SHARE == 1 ? 1 + me.team : 1 + TEAMS * SHARE + me.team, TEAM);
}
DEVICE void release(const Thread& me, u32 barrier, u32 count) {
  __syncwarp();
  if (me.lane == 0)
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}

// Rows of this warpgroup's latents that hold nothing become zeros: NaN times a weight of 0 would be NaN.
DEVICE void clear_hidden(const Work& work, const Shared& s, const Thread& me, Place at, int position) {
  at.advance(1 + me.part * MINE);
  for (int c = 0; c < MINE; c++) {
    barrier_wait(s.full(at), at.parity);
    const int row = me.index / 2, token = position + row;
    if (token < work.low || token >= work.length)
      for (int i = 0; i < 4; i++) write_zeros(s.chunk(at) + row * 128 + me.index % 2 * 64 + i * 16);
    at.advance(1);
  }
  async_proxy_fence();
  group_sync(me);
}

// Scores of the position, and the inverse scales of tokens make them a start for those of latents.
DEVICE void score_positions(float (&x)[N / 2], const Shared& s, const Thread& me, Place at, const float (&inverse)[2]) {
  barrier_wait(s.full(at), at.parity);
  const u32 a = descriptor_low(s.chunk(at)), b = descriptor_low(s.base + L / 64 * Q_CHUNK);
  pin(x);
  wgmma_fence();
#pragma unroll
  for (int i = 0; i < 4 / SHARE; i++) {
    const int step = 2 * (me.part * (4 / SHARE) + i);
    wgmma_kept(x, descriptor(a + step), descriptor(b + step), i > 0);
  }
  wgmma_commit();
  if (FORMAT == 0) return;
  wgmma_wait<0>();
  pin(x);
#pragma unroll
  for (int j = 0; j < N / 8; j++) {
    const float2 base = FORMAT == 1 ? float2{0.0f, 0.0f} : read<float2>(s.base + OFFSET_BASE + 4 * (8 * j + 2 * me.t));
    const float first = me.part == 0 ? base.x : 0.0f, second = me.part == 0 ? base.y : 0.0f;
    x[4 * j] = x[4 * j] * inverse[0] - first;
    x[4 * j + 1] = x[4 * j + 1] * inverse[0] - second;
    x[4 * j + 2] = x[4 * j + 2] * inverse[1] - first;
    x[4 * j + 3] = x[4 * j + 3] * inverse[1] - second;
  }
  release(me, s.empty(at), 1);
}

// Adds the product with this warpgroup's channels: 16-bit operands in shared memory.
#if FORMAT == 0
DEVICE void score_latents(float (&x)[N / 2], const Shared& s, const Thread& me, Place at) {
  const Place rope = at;
  at.advance(1 + me.part * MINE);
#pragma unroll
  for (int c = 0; c < MINE; c++) {
    barrier_wait(s.full(at), at.parity);
    const u32 a = descriptor_low(s.chunk(at)), b = descriptor_low(s.base + (me.part * MINE + c) * Q_CHUNK);
#pragma unroll
    for (int i = 0; i < 4; i++) wgmma_kept(x, descriptor(a + 2 * i), descriptor(b + 2 * i), 1);
    wgmma_commit();
    at.advance(1);
  }
  wgmma_wait<0>();
  pin(x);
  release(me, s.empty(rope), 1);
}
#else
// The same with codes, which become fragments, a few k-steps at a time.
DEVICE void score_latents(float (&x)[N / 2], const Shared& s, const Thread& me, Place at) {
  constexpr int BATCH = N > 32 ? 2 : 4;
  u32 fragments[2][BATCH][4];
  at.advance(1 + me.part * MINE);
  const int row = 16 * me.warp + me.g;
#pragma unroll
  for (int c = 0; c < MINE; c++) {
    barrier_wait(s.full(at), at.parity);
    const u32 from = s.chunk(at) + row * 128;
    u32 words[2][8];
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const uint4 w = read<uint4>(from + i / 2 * 1024 + ((2 * me.t + i % 2) ^ me.g) * 16);
      words[i / 2][i % 2 * 4] = w.x, words[i / 2][i % 2 * 4 + 1] = w.y;
      words[i / 2][i % 2 * 4 + 2] = w.z, words[i / 2][i % 2 * 4 + 3] = w.w;
    }
    const u32 b = descriptor_low(s.base + (me.part * MINE + c) * CHUNK_BLOCKS * Q_CHUNK);
#pragma unroll
    for (int step = 0; step < STEPS; step += BATCH) {
      auto& a = fragments[step / BATCH % 2];
      wgmma_wait<1>();
      pin(a);
#pragma unroll
      for (int i = 0; i < BATCH; i++) {
        scores_operand(a[i], words[0], 0, step + i);
        scores_operand(a[i], words[1], 1, step + i);
      }
      pin(a);
      pin(x);
      wgmma_fence();
#pragma unroll
      for (int i = 0; i < BATCH; i++)
        wgmma_codes(x, a[i], descriptor(b + (step + i) / 4 * (Q_CHUNK / 16) + 2 * ((step + i) % 4)), 1);
      wgmma_commit();
    }
    at.advance(1);
  }
  wgmma_wait<0>();
  pin(x);
}
#endif

// Half of the columns of both warpgroups' parts of the scores, added.
DEVICE void exchange(float (&mine)[4 * GROUPS], const float (&x)[N / 2], const Shared& s, const Thread& me) {
  if constexpr (SHARE == 1) {
#pragma unroll
    for (int i = 0; i < 4 * GROUPS; i++) mine[i] = x[i];
  } else {
    const u32 parts = s.base + OFFSET_PARTS + me.team * PARTS + me.index * 16;
    const int second = 4 * GROUPS;
    const bool low = me.part == 0;
#pragma unroll
    for (int j = 0; j < GROUPS; j++) {
      float give[4];
#pragma unroll
      for (int i = 0; i < 4; i++) {
        give[i] = low ? x[second + 4 * j + i] : x[4 * j + i];
        mine[4 * j + i] = low ? x[4 * j + i] : x[second + 4 * j + i];
      }
      write(parts + (me.part * GROUPS + j) * 2048, give[0], give[1], give[2], give[3]);
    }
    team_sync(me);
#pragma unroll
    for (int j = 0; j < GROUPS; j++) {
      const float4 got = read<float4>(parts + ((1 - me.part) * GROUPS + j) * 2048);
      mine[4 * j] += got.x, mine[4 * j + 1] += got.y, mine[4 * j + 2] += got.z, mine[4 * j + 3] += got.w;
    }
  }
}

// The largest of each column over all tokens of the tile.
DEVICE void column_largest(float (&top)[2 * GROUPS], const float (&x)[4 * GROUPS], const Shared& s, const Thread& me) {
  const u32 to = s.base + OFFSET_TOP + (me.team * SHARE + me.part) * 4 * (8 * GROUPS) * 4;
#pragma unroll
  for (int j = 0; j < 2 * GROUPS; j++) {
    float m = fmaxf(x[j / 2 * 4 + j % 2], x[j / 2 * 4 + j % 2 + 2]);
#pragma unroll
    for (int i = 4; i < 32; i *= 2) m = fmaxf(m, __shfl_xor_sync(~0u, m, i));
    if (me.g == 0) write(to + (me.warp * 8 * GROUPS + j / 2 * 8 + 2 * me.t + j % 2) * 4, m);
  }
  group_sync(me);
#pragma unroll
  for (int j = 0; j < GROUPS; j++) {
    float2 m = {-INFINITE, -INFINITE};
#pragma unroll
    for (int w = 0; w < 4; w++) {
      const float2 other = read<float2>(to + (w * 8 * GROUPS + 8 * j + 2 * me.t) * 4);
      m.x = fmaxf(m.x, other.x), m.y = fmaxf(m.y, other.y);
    }
    top[2 * j] = m.x, top[2 * j + 1] = m.y;
  }
}

// Column (of the tile's N) of this thread's softmax.
DEVICE int column_of(const Thread& me, int j) { return 8 * (me.part * GROUPS + j / 2) + 2 * me.t + j % 2; }

// Powers of two of scores go to shared memory as the second product's operand [rows, tokens]; outputs are rescaled.
DEVICE void softmax(Sums& sums, float (&x)[4 * GROUPS], const Shared& s, const Thread& me, const float (&scale)[2],
                    const float (&inverse)[2]) {
  float top[2 * GROUPS], rescale[2 * GROUPS];
  column_largest(top, x, s, me);
#pragma unroll
  for (int j = 0; j < 2 * GROUPS; j++) {
    const float grown = fmaxf(sums.largest[j], top[j]), reference = grown == -INFINITE ? 0.0f : grown;
    rescale[j] = exp2_(sums.largest[j] - reference);
    sums.largest[j] = grown;
    float sum = 0.0f;
#pragma unroll
    for (int r = 0; r < 2; r++) {
      float& weight = x[j / 2 * 4 + j % 2 + 2 * r];
      weight = exp2_(weight - (reference - LOG2_WEIGHT));
      sum += FORMAT == 0 ? weight : weight * inverse[r];
    }
    sums.total[j] = sums.total[j] * rescale[j] + sum;
    if (SHARE == 2 && me.g == 0 && me.warp == 0)
      write(s.base + OFFSET_RESCALE + (me.team * N + column_of(me, j)) * 4, rescale[j]);
  }
  constexpr int KIND = FORMAT == 0 ? KEPT : 2;
  const u32 to = s.base + OFFSET_P + me.team * N * 128;
#pragma unroll
  for (int j = 0; j < GROUPS; j++) {
    const int n = 8 * (me.part * GROUPS + j) + me.lane % 8, block = 2 * me.warp + me.lane / 8 % 2;
    asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(to + n * 128 + (block ^ n % 8) * 16),
                 "r"(pack<KIND>(x[4 * j], x[4 * j + 1])), "r"(pack<KIND>(x[4 * j + 2], x[4 * j + 3])) : "memory");
  }
  async_proxy_fence();
  team_sync(me);
  bool changed = false;
#pragma unroll
  for (int j = 0; j < N / 8; j++) {
    float2 by = {rescale[SHARE == 1 ? 2 * j : 0], rescale[SHARE == 1 ? 2 * j + 1 : 0]};
    if (SHARE == 2) by = read<float2>(s.base + OFFSET_RESCALE + (me.team * N + 8 * j + 2 * me.t) * 4);
    changed = by.x != 1.0f || by.y != 1.0f;
    if (!__any_sync(~0u, changed)) continue;
#pragma unroll
    for (int block = 0; block < BLOCKS; block++) {
      float(&out)[N / 2] = sums.out[block];
      out[4 * j] *= by.x, out[4 * j + 1] *= by.y, out[4 * j + 2] *= by.x, out[4 * j + 3] *= by.y;
    }
  }
}

DEVICE void pin(Sums& sums) {
#pragma unroll
  for (int block = 0; block < BLOCKS; block++) pin(sums.out[block]);
}

#if FORMAT == 0
DEVICE void add_outputs(Sums& sums, const Shared& s, const Thread& me, Place at) {
  const u32 b = descriptor_low(s.base + OFFSET_P + me.team * N * 128);
  at.advance(1 + me.part * MINE);
  Place before = at;
  pin(sums);
  wgmma_fence();
#pragma unroll
  for (int c = 0; c < MINE; c++) {
    const u32 a = descriptor_low(s.chunk(at));
#pragma unroll
    for (int i = 0; i < 4; i++) wgmma_turned(sums.out[c], descriptor(a + 128 * i), descriptor(b + 2 * i), 1);
    wgmma_commit();
    at.advance(1);
    if (c == 0) continue;
    wgmma_wait<1>();
    release(me, s.empty(before), SHARE);
    before.advance(1);
  }
  wgmma_wait<0>();
  pin(sums);
  release(me, s.empty(before), SHARE);
}
#else
DEVICE void add_outputs(Sums& sums, const Shared& s, const Thread& me, Place at) {
  const u32 b = descriptor_low(s.base + OFFSET_P + me.team * N * 128);
  constexpr int AHEAD = N > 32 ? 1 : 4;  // k-steps whose codes are read at once
  at.advance(1 + me.part * MINE);
  constexpr int BATCH = N > 32 ? 2 : CHUNK_BLOCKS;  // blocks at once
  u32 fragments[2][BATCH][4];
  const int piece = 2 * me.warp + me.g / 4;
  const u32 even = 2 * me.t * 128 + (piece ^ (2 * me.t)) * 16 + me.g % 4 * 4;
  const u32 odd = (2 * me.t + 1) * 128 + (piece ^ (2 * me.t + 1)) * 16 + me.g % 4 * 4;
#pragma unroll
  for (int c = 0; c < MINE; c++) {
    const u32 from = s.chunk(at);
    u32 words[AHEAD][4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
      if (i % AHEAD == 0) {
#pragma unroll
        for (int k = 0; k < AHEAD; k++) {
          const u32 tokens = from + (i + k) * 2048;
          words[k][0] = read<u32>(tokens + even), words[k][1] = read<u32>(tokens + odd);
          words[k][2] = read<u32>(tokens + even + 1024), words[k][3] = read<u32>(tokens + odd + 1024);
        }
      }
      if (i == 4 - AHEAD) release(me, s.empty(at), SHARE);
#pragma unroll
      for (int m = 0; m < CHUNK_BLOCKS; m += BATCH) {
        auto& a = fragments[(i * CHUNK_BLOCKS + m) / BATCH % 2];
        wgmma_wait<1>();
        pin(a);
#pragma unroll
        for (int pair = 0; pair < BATCH / 2; pair++) {
          u32 low[4], high[4];
          output_operand(low, words[i % AHEAD][0], words[i % AHEAD][1], m / 2 + pair);
          output_operand(high, words[i % AHEAD][2], words[i % AHEAD][3], m / 2 + pair);
#pragma unroll
          for (int k = 0; k < 2; k++) {
            a[2 * pair + k][0] = low[2 * k], a[2 * pair + k][1] = low[2 * k + 1];
            a[2 * pair + k][2] = high[2 * k], a[2 * pair + k][3] = high[2 * k + 1];
          }
        }
        pin(a);
#pragma unroll
        for (int k = 0; k < BATCH; k++) pin(sums.out[c * CHUNK_BLOCKS + m + k]);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < BATCH; k++)
          wgmma_codes(sums.out[c * CHUNK_BLOCKS + m + k], a[k], descriptor(b + 2 * i), 1);
        wgmma_commit();
      }
    }
    at.advance(1);
  }
  wgmma_wait<0>();
  pin(sums);
}
#endif

// Scales of this thread's two tokens of a tile; 1 where there is none.
DEVICE void load_scales(float (&scale)[2], const Params& p, const Work& work, const Thread& me, int position) {
  if (FORMAT == 0) return;
#pragma unroll
  for (int r = 0; r < 2; r++) {
    const int token = position + 16 * me.warp + me.g + 8 * r;
    scale[r] = 1.0f;
    if (token < work.low || token >= work.end) continue;
    i64 at = work.batch * p.scale_row + token;
    if (PAGED) {
      const int page = p.table[static_cast<i64>(work.batch) * p.table_row + token / p.capacity];
      at = page * p.scale_row + token % p.capacity;
    }
    scale[r] = p.scale[at];
  }
}

DEVICE void attend_tile(Sums& sums, const Params& p, const Work& work, const Shared& s, const Thread& me, Place at,
                        int position, const float (&scale)[2]) {
  const bool masked = position < work.low || position + TILE > work.length - p.sq + 1;
  if (masked) clear_hidden(work, s, me, at, position);
  float inverse[2], shift[2];
#pragma unroll
  for (int r = 0; r < 2; r++) {
    inverse[r] = FORMAT == 0 ? 1.0f : reciprocal(scale[r]);
    shift[r] = FORMAT == 0 ? 0.0f : log2_(scale[r]);
  }
  float all[N / 2], x[4 * GROUPS];
  score_positions(all, s, me, at, inverse);
  score_latents(all, s, me, at);
  exchange(x, all, s, me);
#pragma unroll
  for (int j = 0; j < 2 * GROUPS; j++) {
    const float factor = read<float>(s.base + OFFSET_FACTOR + 4 * column_of(me, j));
#pragma unroll
    for (int r = 0; r < 2; r++) {
      float& score = x[j / 2 * 4 + j % 2 + 2 * r];
      score = FORMAT == 0 ? score * factor : fmaf(score, scale[r] * factor, shift[r]);
    }
  }
  if (masked) {
#pragma unroll
    for (int j = 0; j < 2 * GROUPS; j++) {
      const int last = static_cast<int>(read<float>(s.base + OFFSET_PLACE + 4 * column_of(me, j)));
#pragma unroll
      for (int r = 0; r < 2; r++) {
        const int token = position + 16 * me.warp + me.g + 8 * r;
        if (token < work.low || token > last) x[j / 2 * 4 + j % 2 + 2 * r] = -INFINITE;
      }
    }
  }
  softmax(sums, x, s, me, scale, inverse);
  add_outputs(sums, s, me, at);
}

// ---- results ----

// Totals over all tokens, and the largest of each column, to shared memory.
DEVICE void publish(Sums& sums, const Shared& s, const Thread& me) {
  const u32 to = s.base + OFFSET_TOP + (me.team * SHARE + me.part) * 4 * (8 * GROUPS) * 4;
  group_sync(me);
#pragma unroll
  for (int j = 0; j < 2 * GROUPS; j++) {
    float total = sums.total[j];
#pragma unroll
    for (int i = 4; i < 32; i *= 2) total += __shfl_xor_sync(~0u, total, i);
    if (me.g == 0) write(to + (me.warp * 8 * GROUPS + j / 2 * 8 + 2 * me.t + j % 2) * 4, total);
  }
  group_sync(me);
  if (me.warp != 0 || me.g != 0) return;
#pragma unroll
  for (int j = 0; j < 2 * GROUPS; j++) {
    float total = 0.0f;
#pragma unroll
    for (int w = 0; w < 4; w++) total += read<float>(to + (w * 8 * GROUPS + j / 2 * 8 + 2 * me.t + j % 2) * 4);
    const int at = 4 * (me.team * N + column_of(me, j));
    write(s.base + OFFSET_LARGEST + at, sums.largest[j]);
    write(s.base + OFFSET_TOTAL + at, total * (1.0f / WEIGHT));
  }
}

template <int KIND>
DEVICE void store_float(char* base, i64 index, float x) {
  if (KIND == 0) reinterpret_cast<float*>(base)[index] = x;
  if (KIND != 0) reinterpret_cast<u16*>(base)[index] = static_cast<u16>(pack<KIND>(x, 0.0f));
}
// Four channels side by side.
template <int KIND>
DEVICE void store_four(char* base, i64 index, const float (&x)[4]) {
  if (KIND == 0) *reinterpret_cast<float4*>(base + 4 * index) = {x[0], x[1], x[2], x[3]};
  if (KIND != 0) *reinterpret_cast<uint2*>(base + 2 * index) = {pack<KIND>(x[0], x[1]), pack<KIND>(x[2], x[3])};
}

// A column's outputs of this thread.
template <int KIND>
DEVICE void store_column(char* to, i64 row, const Sums& sums, const Thread& me, int j, int e, float by) {
#pragma unroll
  for (int c = 0; c < MINE; c++) {
    float x[CODES];
#pragma unroll
    for (int i = 0; i < CODES; i++) x[i] = sums.out[c * CHUNK_BLOCKS + i / 2][4 * j + e + 2 * (i % 2)] * by;
    const int chunk = me.part * MINE + c;
    if constexpr (FORMAT == 0) {
#pragma unroll
      for (int i = 0; i < 2; i++) store_float<KIND>(to, row + output_channel(chunk, me.warp, me.g, i), x[i]);
    } else {
#pragma unroll
      for (int half = 0; half < CODES / 4; half++) {  // of INT4: codes 0, 2, 4, 6 lie side by side
        const int by_two = CODES / 4;
        const float four[4] = {x[half], x[by_two + half], x[2 * by_two + half], x[3 * by_two + half]};
        store_four<KIND>(to, row + output_channel(chunk, me.warp, me.g, half), four);
      }
    }
  }
}

DEVICE void store(const Params& p, const Work& work, const Shared& s, const Sums& sums, const Thread& me,
                  const float (&top)[N / 4], const float (&whole)[N / 4]) {
#pragma unroll
  for (int j = 0; j < N / 4; j++) {
    const int row = work.first_row + j / 2 * 8 + 2 * me.t + j % 2;
    if (row >= p.rows) continue;
    const bool some = whole[j] > 0.0f, teller = me.part == 0 && me.warp == 0 && me.g == 0;
    if (p.splits == 1) {
      const int head = row % p.heads, query = row / p.heads;
      const i64 at = static_cast<i64>(work.batch) * p.rows + row;
      store_column<QUERY>(p.out, at * L, sums, me, j / 2, j % 2, some ? 1.0f / (WEIGHT * whole[j]) : 0.0f);
      if (teller)
        p.lse[(static_cast<i64>(work.batch) * p.heads + head) * p.sq + query] =
            some ? (top[j] + log2_(whole[j])) / LOG2E : -INFINITE;
    } else {
      const i64 at = (static_cast<i64>(work.split) * p.batches + work.batch) * p.rows + row;
      store_column<0>(reinterpret_cast<char*>(p.part), at * L, sums, me, j / 2, j % 2, 1.0f / WEIGHT);
      if (teller) p.sums[2 * at] = top[j], p.sums[2 * at + 1] = whole[j];
    }
  }
}

// Sums of all teams, relative to the largest of any, become those of the first, which stores them.
DEVICE void finish(Sums& sums, const Params& p, const Work& work, const Shared& s, const Thread& me) {
  publish(sums, s, me);
  named_barrier_sync(15, CONSUMERS);
  float top[N / 4], whole[N / 4];
#pragma unroll
  for (int j = 0; j < N / 4; j++) {
    const u32 at = s.base + 4 * (j / 2 * 8 + 2 * me.t + j % 2);
    top[j] = -INFINITE, whole[j] = 0.0f;
#pragma unroll
    for (int team = 0; team < TEAMS; team++) top[j] = fmaxf(top[j], read<float>(at + OFFSET_LARGEST + team * N * 4));
    const float reference = top[j] == -INFINITE ? 0.0f : top[j];
    float mine = 1.0f;
#pragma unroll
    for (int team = 0; team < TEAMS; team++) {
      const float share = exp2_(read<float>(at + OFFSET_LARGEST + team * N * 4) - reference);
      whole[j] += share * read<float>(at + OFFSET_TOTAL + team * N * 4);
      if (team == me.team) mine = share;
    }
    if (TEAMS == 1) continue;
#pragma unroll
    for (int block = 0; block < BLOCKS; block++)
      sums.out[block][j / 2 * 4 + j % 2] *= mine, sums.out[block][j / 2 * 4 + j % 2 + 2] *= mine;
  }
  if (TEAMS > 1) {
    constexpr int ROW = TEAM * 4, WHOLE = BLOCKS * (N / 2) * ROW;
    const u32 at = s.base + OFFSET_RING + (me.part * 128 + me.index) * 4;
#pragma unroll
    for (int i = 0; i < BLOCKS * (N / 2); i++)
      if (me.team > 0) write(at + (me.team - 1) * WHOLE + i * ROW, sums.out[i / (N / 2)][i % (N / 2)]);
    named_barrier_sync(15, CONSUMERS);
    if (me.team > 0) return;
#pragma unroll
    for (int team = 1; team < TEAMS; team++)
#pragma unroll
      for (int i = 0; i < BLOCKS * (N / 2); i++)
        sums.out[i / (N / 2)][i % (N / 2)] += read<float>(at + (team - 1) * WHOLE + i * ROW);
  }
  store(p, work, s, sums, me, top, whole);
}

DEVICE void consume(const Params& p, const Work& work, const Shared& s) {
  const Thread me;
  Sums sums;
#pragma unroll
  for (int block = 0; block < BLOCKS; block++)
#pragma unroll
    for (int i = 0; i < N / 2; i++) sums.out[block][i] = 0.0f;
#pragma unroll
  for (int j = 0; j < 2 * GROUPS; j++) sums.largest[j] = -INFINITE, sums.total[j] = 0.0f;
  float next[2] = {1.0f, 1.0f};
  load_scales(next, p, work, me, work.begin + me.team * TILE);
  load_queries(p, work, s.base, threadIdx.x);
  async_proxy_fence();
  named_barrier_sync(15, CONSUMERS);
  Place at = {0, 0};
  at.advance(me.team * CHUNKS);
#pragma unroll 1
  for (int tile = me.team; tile < work.count; tile += TEAMS) {
    const float scale[2] = {next[0], next[1]};
    const int position = work.begin + tile * TILE;
    load_scales(next, p, work, me, position + TEAMS * TILE);
    attend_tile(sums, p, work, s, me, at, position, scale);
    at.advance(TEAMS * CHUNKS);
  }
  finish(sums, p, work, s, me);
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) mla_decode(const __grid_constant__ Params p) {
  extern __shared__ __align__(1024) unsigned char memory[];
  const Shared s = {shared_address(memory)};
  if (threadIdx.x == 0) {
    for (int slot = 0; slot < RING; slot++) {
      barrier_init(s.base + OFFSET_BARRIERS + 16 * slot, 1);
      barrier_init(s.base + OFFSET_BARRIERS + 16 * slot + 8, 4 * SHARE);
    }
    barrier_init_fence();
    prefetch_tensor_map(&p.latent);
    prefetch_tensor_map(&p.rope);
  }
  __syncthreads();
  wait_for_previous_kernel();
  let_next_kernel_start();
  const Work work(p);
  if (uniform(threadIdx.x / 128) < SHARE * TEAMS) {
    if (SHARE * TEAMS > 1) registers_increase<REGISTERS>();
    consume(p, work, s);
  } else {
    if (SHARE * TEAMS > 1) registers_decrease<24>();
    if (threadIdx.x == CONSUMERS) produce(p, work, s);
  }
}

// One CTA for 128 channels of a row: adds the parts of all splits, every thread those of its own splits first.
constexpr int MERGERS = 4, COLUMNS = 128, MOST_SPLITS = 128;
extern "C" __global__ void __launch_bounds__(MERGERS* COLUMNS) merge(const __grid_constant__ Params p) {
  __shared__ float shares[MOST_SPLITS];
  __shared__ float both[2];
  __shared__ float partial[MERGERS][COLUMNS];
  wait_for_previous_kernel();
  let_next_kernel_start();
  const i64 pairs = static_cast<i64>(p.batches) * p.rows, at = blockIdx.x / (L / COLUMNS);
  const int column = blockIdx.x % (L / COLUMNS) * COLUMNS + threadIdx.x % COLUMNS, mine = threadIdx.x / COLUMNS;
  float values[MOST_SPLITS / MERGERS];  // on their way while the shares are computed
#pragma unroll
  for (int i = 0; i < MOST_SPLITS / MERGERS; i++) {
    const int split = mine + i * MERGERS;
    values[i] = split < p.splits ? p.part[(split * pairs + at) * L + column] : 0.0f;
  }
  if (threadIdx.x < 32) weigh_parts<MOST_SPLITS>(p.sums, pairs, at, p.splits, shares, both);
  __syncthreads();
  float result = 0.0f;
#pragma unroll
  for (int i = 0; i < MOST_SPLITS / MERGERS; i++) result += shares[mine + i * MERGERS] * values[i];
  partial[mine][threadIdx.x % COLUMNS] = result;
  __syncthreads();
  if (mine != 0) return;
#pragma unroll
  for (int i = 1; i < MERGERS; i++) result += partial[i][threadIdx.x];
  const int row = at % p.rows, head = row % p.heads, query = row / p.heads;
  const i64 batch = at / p.rows;
  const bool some = both[1] > 0.0f;
  if (column == 0) p.lse[(batch * p.heads + head) * p.sq + query] = some ? (both[0] + log2_(both[1])) / LOG2E : -INFINITE;
  store_float<QUERY>(p.out, at * L + column, some ? result / both[1] : 0.0f);
}
