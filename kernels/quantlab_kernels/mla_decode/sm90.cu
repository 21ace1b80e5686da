// Absorbed attention over packed latents, transposed: scores are C q^T [tokens, rows], outputs C^T p [channels, rows],
// rows being heads times queries, so that tokens and channels fill the 64 rows of warpgroup MMA whatever the heads.
//
// One thread brings chunks of 64 tokens by 128 bytes through the copy engine into one ring. Teams of warpgroups take
// tiles of 64 tokens in turns, each with sums of its own, and meet at the end: while one team takes exponentials another
// multiplies. The warpgroups of a team share the channels of a tile, in both products; partial scores are exchanged.
//
// 16-bit latents are operands in shared memory of both products, rows along K in the first and along M in the second.
// In the first, E4M3 and INT8 codes are operands of 8-bit MMA where they lie, INT4 codes once their nibbles are bytes in
// registers; queries are two 8-bit numbers. How codes are multiplied with weights says outputs.cuh.
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
#include "work.cuh"

constexpr int LATENT_CHUNKS = L * (FORMAT == 0 ? 16 : FORMAT == 3 ? 4 : 8) / 1024, CHUNKS = LATENT_CHUNKS + 1;
constexpr int MINE = LATENT_CHUNKS / SHARE;                          // chunks of a warpgroup
constexpr int CHUNK_BLOCKS = FORMAT == 0 ? 1 : FORMAT == 3 ? 4 : 2;  // blocks of 64 channels in a chunk
constexpr int BLOCKS = MINE * CHUNK_BLOCKS;
constexpr int GROUPS = N / 8 / SHARE;  // of 8 columns, whose softmax a warpgroup computes
constexpr int TEAM = 128 * SHARE, CONSUMERS = TEAM * TEAMS, THREADS = CONSUMERS + 128;
#define NARROW (FORMAT == 1 || FORMAT == 3)  // weights are E4M3 numbers
constexpr bool NIBBLES = FORMAT == 3;
constexpr int REGISTERS = SHARE * TEAMS == 3 ? 160 : 240;  // of a consumer; the producers leave theirs
constexpr float WEIGHT = 256.0f, LOG2_WEIGHT = 8.0f;

constexpr int Q_CHUNK = N * 128;  // 64 channels of all rows
constexpr int OFFSET_P = (L + ROPE) / 64 * Q_CHUNK;
constexpr int OFFSET_RING = OFFSET_P + TEAMS * N * 128;
constexpr int OFFSET_PARTS = OFFSET_RING + RING * CHUNK;  // of scores, on their way to the other warpgroup
constexpr int PARTS = SHARE == 2 ? 2 * TILE * (N / 2) * 4 : 0;
constexpr int OFFSET_TOP = OFFSET_PARTS + TEAMS * PARTS;     // [TEAMS][SHARE][4 warps][8 GROUPS]
constexpr int OFFSET_RESCALE = OFFSET_TOP + TEAMS * N * 16;  // [TEAMS][N], as are the next three
constexpr int OFFSET_LARGEST = OFFSET_RESCALE + TEAMS * N * 4;
constexpr int OFFSET_TOTAL = OFFSET_LARGEST + TEAMS * N * 4;
constexpr int OFFSET_MASS = OFFSET_TOTAL + TEAMS * N * 4;
constexpr int OFFSET_FACTOR = OFFSET_MASS + TEAMS * N * 4;  // [N], as are the next two
constexpr int OFFSET_BASE = OFFSET_FACTOR + N * 4;
constexpr int OFFSET_PLACE = OFFSET_BASE + N * 4;
constexpr int OFFSET_MEETING = OFFSET_PLACE + N * 4;  // two barriers of all consumers
constexpr int OFFSET_BARRIERS = OFFSET_MEETING + 16;
static_assert(OFFSET_BARRIERS + 24 * RING <= SHARED, "the host allocates what is laid out here");
static_assert(TEAMS == 1 || TEAMS * BLOCKS * (N / 2) * TEAM * 4 <= RING * CHUNK, "sums of teams meet in the ring");
static_assert(RING >= CHUNKS * TEAMS, "every team holds a tile");

// A place in the ring, and how often the ring went round. Copies end in any order, so that a team may wait for a chunk a
// whole round ahead of one that another team still waits for in the same place: rounds arrive at two barriers in turns,
// else the older chunk's absence would look like the newer one's presence. Two rounds ahead it cannot be, since the ring
// holds a tile of every team.
struct Place {
  int slot;
  u32 round;
  DEVICE void advance(int chunks) {
    slot += chunks;
    if (slot >= RING) slot -= RING, round++;
  }
  DEVICE u32 full_parity() const { return round >> 1 & 1; }
  DEVICE u32 empty_parity() const { return round & 1; }
};

struct Shared {
  u32 base;
  DEVICE u32 chunk(const Place& at) const { return base + OFFSET_RING + at.slot * CHUNK; }
  DEVICE u32 empty(const Place& at) const { return base + OFFSET_BARRIERS + 24 * at.slot; }
  DEVICE u32 full(const Place& at) const { return empty(at) + 8 + (at.round & 1) * 8; }
};

// ---- producer: one thread ----

DEVICE void produce(const Params& p, const Shared& s) {
  Work work;
  work.place(p);
  wait_for_previous_kernel();
  work.measure(p);
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
      barrier_wait(s.empty(at), at.empty_parity() ^ 1);
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
  float largest[2 * GROUPS];
  float total[2 * GROUPS], mass[2 * GROUPS];  // of weights of this thread's tokens;  mass: times their scales
};

DEVICE void pin(u32 (&r)[4]) { asm volatile("" : "+r"(r[0]), "+r"(r[1]), "+r"(r[2]), "+r"(r[3])::"memory"); }
template <int n>
DEVICE void pin(int (&registers)[n]) {
#pragma unroll
  for (int i = 0; i < n; ++i) asm volatile("" : "+r"(registers[i])::"memory");
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

// The same once `last`, which was made of the last words of a chunk, is there: an arrival does not wait for loads on
// their way, and the next copy has overtaken some. p.sq is positive, which the compiler does not know.
DEVICE void release_read(const Params& p, const Thread& me, u32 barrier, u32 count, u32 last) {
  release(me, barrier | (last & static_cast<u32>(p.sq >> 31)), count);
}

// All teams are here, for the first (0) or second (1) time. A barrier in memory at which every thread arrives: racecheck
// takes what is read behind named barriers for races once teams have gone their own ways.
DEVICE void meet(const Shared& s, int time) {
  barrier_arrive(s.base + OFFSET_MEETING + 8 * time);
  barrier_wait(s.base + OFFSET_MEETING + 8 * time, 0);
}

#include "codes.cuh"
#include "queries.cuh"
#include "scores.cuh"
#include "outputs.cuh"

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
  score_latents(all, s, me, at, inverse);
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
  add_outputs(sums, p, s, me, at);
}

DEVICE void consume(const Params& p, const Shared& s) {
  const Thread me;
  Work work;
  work.place(p);
  Queries queries;
  queries.aim(p, work, 0);
  wait_for_previous_kernel();
  queries.load();  // under way while the length is
  work.measure(p);
  Sums sums;
#pragma unroll
  for (int block = 0; block < BLOCKS; block++)
#pragma unroll
    for (int i = 0; i < N / 2; i++) sums.out[block][i] = 0.0f;
#pragma unroll
  for (int j = 0; j < 2 * GROUPS; j++) sums.largest[j] = -INFINITE, sums.total[j] = 0.0f, sums.mass[j] = 0.0f;
  float next[2] = {1.0f, 1.0f};
  queries.store(p, work, s.base);
  load_scales(next, p, work, me, work.begin + me.team * TILE);
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
      const u32 barriers = s.base + OFFSET_BARRIERS + 24 * slot;
      barrier_init(barriers, 4 * SHARE);
      barrier_init(barriers + 8, 1);
      barrier_init(barriers + 16, 1);
    }
    barrier_init(s.base + OFFSET_MEETING, CONSUMERS);
    barrier_init(s.base + OFFSET_MEETING + 8, CONSUMERS);
    barrier_init_fence();
    prefetch_tensor_map(&p.latent);
    prefetch_tensor_map(&p.rope);
  }
  __syncthreads();
  if (uniform(threadIdx.x / 128) < SHARE * TEAMS) {
    if (SHARE * TEAMS > 1) registers_increase<REGISTERS>();
    consume(p, s);
  } else {
    if (SHARE * TEAMS > 1) registers_decrease<24>();
    if (threadIdx.x == CONSUMERS) produce(p, s);
    // Idle warps stay, for nothing: launches by the thousand were only tried so.
    barrier_wait(s.base + OFFSET_MEETING, 0);
  }
}

#define AVERAGES 0
#include "merge.cuh"
