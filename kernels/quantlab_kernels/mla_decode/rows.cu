// Absorbed attention over packed latents for 64 rows (heads times queries) a tile, which lie on the M of warpgroup MMA.
//
// Of three warpgroups one computes scores and hands weights through shared memory to two that add half of the channels
// each: while they multiply weights of a tile with its latents, the first is at scores and exponentials of the next.
// Whoever is the last to read a part of a tile has the copy engine bring the next one to its place. How 16-bit latents
// are multiplied says rows_floats.cuh; how E4M3 and INT4 are, rows_codes.cuh.
//
// References of exponentials are raised when a score exceeds them by more than LAZY, which is seldom.
//
// Macros: L, FORMAT (0 16 bits, 1 E4M3, 3 INT4), KEPT, QUERY, PAGED, BOX, SHARED as in sm90.cu;   HALVES  of tiles, by
//   channels, in the ring;   RAWS  of packed codes;   ROPES  position parts
#include "sm90.cuh"
#include "attention.cuh"
#include "wgmma.cuh"
#include "work.cuh"

constexpr int THREADS = 384;
constexpr int HALF_CHUNKS = L * (FORMAT == 0 ? 2 : 1) / 256, HALF = HALF_CHUNKS * CHUNK;  // of channels of a tile
constexpr int CHUNKS = 2 * HALF_CHUNKS;
constexpr bool PACKED = FORMAT == 3;
constexpr int FETCHED_CHUNKS = PACKED ? HALF_CHUNKS / 2 : HALF_CHUNKS, PLACES = PACKED ? RAWS : HALVES;
constexpr int AHEAD = PACKED ? 2 : 0;  // tiles between a half's fetching place and its use
constexpr int SCORE_REGISTERS = FORMAT == 0 ? 152 : 104, OUTPUT_REGISTERS = FORMAT == 0 ? 176 : 200;
constexpr float LOG2_WEIGHT = FORMAT == 0 ? 8.0f : 7.0f, LAZY = FORMAT == 0 ? 6.0f : 1.75f;
constexpr float WEIGHT = FORMAT == 0 ? 256.0f : 128.0f;  // of a token at the reference
constexpr int P_STEP = FORMAT == 0 ? CHUNK : 64;         // 8-bit weights take half of a row of 128 bytes
constexpr int KEPT_CHUNKS = FORMAT != 0 ? 0 : CHUNKS < 4 ? CHUNKS : 4;  // of queries, in registers
constexpr int QUERY_CHUNKS = FORMAT == 0 ? CHUNKS - KEPT_CHUNKS : 2 * CHUNKS + 1;  // in shared memory

constexpr int OFFSET_ROPE = HALVES * HALF;
constexpr int OFFSET_RAW = OFFSET_ROPE + ROPES * CHUNK;
constexpr int OFFSET_P = OFFSET_RAW + (PACKED ? RAWS * CHUNK : 0);
constexpr int OFFSET_QUERIES = OFFSET_P + (FORMAT == 0 ? 2 : 1) * CHUNK;
constexpr int OFFSET_RESCALE = OFFSET_QUERIES + QUERY_CHUNKS * CHUNK;  // [2][64]
constexpr int OFFSET_TOTAL = OFFSET_RESCALE + 512;                     // [64], as is the next
constexpr int OFFSET_FACTOR = OFFSET_TOTAL + 256;
constexpr int OFFSET_SCALES = OFFSET_FACTOR + 256;  // [2][3][64] scales of tokens, their inverses and logarithms
constexpr int OFFSET_BARRIERS = OFFSET_SCALES + (FORMAT == 0 ? 0 : 6 * 256);
constexpr int LATE = HALVES - KEPT_CHUNKS / HALF_CHUNKS;  // first half that comes where queries were staged
constexpr int BARRIERS = HALVES + ROPES + 4 + (PACKED ? RAWS : 0);
static_assert(OFFSET_BARRIERS + 8 * BARRIERS <= SHARED, "the host allocates what is laid out here");
static_assert(!PACKED || (L == 512 && HALVES == 6 && RAWS % 2 == 0), "a warpgroup unpacks to where it read last");

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
  DEVICE u32 fetched_full(int slot) const { return PACKED ? barrier(HALVES + ROPES + 4 + slot) : half_full(slot); }
  DEVICE u32 rope_full(int slot) const { return barrier(HALVES + slot); }
  DEVICE u32 weights_full(int slot) const { return barrier(HALVES + ROPES + slot); }
  DEVICE u32 weights_empty(int slot) const { return barrier(HALVES + ROPES + 2 + slot); }

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

DEVICE void fetch_half(const Params& p, const Work& work, const Shared& s, int number) {
  const Boxes boxes(p, work, number / 2, p.latent_row);
  const Turn at(number, PLACES);
  const u32 full = s.fetched_full(at.slot);
  barrier_arrive_expect(full, FETCHED_CHUNKS * boxes.bytes);
#pragma unroll
  for (int c = 0; c < FETCHED_CHUNKS; c++)
    boxes.load(p, &p.latent, (number % 2 * FETCHED_CHUNKS + c) * (FORMAT == 0 ? 64 : 128),
               s.fetched(at.slot) + c * CHUNK, full);
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
    fetch_half(p, work, s, number);
}

// ---- consumers ----

// Byte `column` of row n where rows of 128 bytes are swizzled.
DEVICE u32 swizzled(int n, int column) { return n * 128 + ((column / 16 ^ n % 8) * 16) + column % 16; }

DEVICE uint4 load_piece(const char* from) { return *reinterpret_cast<const uint4*>(from); }
DEVICE void write(u32 to, uint4 x) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w) : "memory");
}

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

struct Softmax {
  float reference[2], total[2];  // of rows 16 warp + g and 8 below;  total: of this thread's tokens
};

// Raises the references of rows whose scores exceed them by much; `by` is by what earlier sums are multiplied.
DEVICE void raise_references(Softmax& softmax, float (&by)[2], const float (&x)[32]) {
  float top[4];  // of rows and even, odd columns
#pragma unroll
  for (int i = 0; i < 4; i++) {
    top[i] = x[i];
#pragma unroll
    for (int j = 1; j < 8; j++) top[i] = fmaxf(top[i], x[4 * j + i]);
  }
  float most[2] = {fmaxf(top[0], top[1]), fmaxf(top[2], top[3])};
#pragma unroll
  for (int step = 1; step < 4; step *= 2) {
#pragma unroll
    for (int r = 0; r < 2; r++) most[r] = fmaxf(most[r], __shfl_xor_sync(~0u, most[r], step));
  }
#pragma unroll
  for (int r = 0; r < 2; r++) {
    const bool raised = most[r] > softmax.reference[r] + LAZY;
    by[r] = raised ? exp2_(softmax.reference[r] - most[r]) : 1.0f;  // 0 for the first
    softmax.reference[r] = raised ? most[r] : softmax.reference[r];
    softmax.total[r] *= by[r];
  }
}

constexpr int INVERSES = 256, LOGARITHMS = 512;  // bytes from scales to what is made of them

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

#if FORMAT == 0
#include "rows_floats.cuh"
#else
#include "rows_codes.cuh"
#endif

// From scores in powers of two to weights, which the other warpgroups read.
DEVICE void weigh_tile(Softmax& softmax, float (&x)[32], const Work& work, const Shared& s, const Thread& me,
                       const int (&last)[2], int tile, u32 scales) {
  const int position = work.begin + tile * TILE;
  if (position < work.low || position + TILE > last[0] + 1 || position + TILE > last[1] + 1) {
#pragma unroll
    for (int i = 0; i < 32; i++) {
      const int token = position + i / 4 * 8 + 2 * me.t + i % 2;
      if (token < work.low || token > last[i / 2 % 2]) x[i] = -INFINITE;
    }
  }
  float by[2], zero[2];
  raise_references(softmax, by, x);
#pragma unroll
  for (int r = 0; r < 2; r++) zero[r] = softmax.reference[r] == -INFINITE ? 0.0f : softmax.reference[r] - LOG2_WEIGHT;
#pragma unroll
  for (int i = 0; i < 32; i++) x[i] = exp2_(x[i] - zero[i / 2 % 2]);
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
  Queries queries;
  queries.load(p, work, s, me);
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
#pragma unroll 1
  for (int tile = 0; tile < work.count; tile++) {
    const u32 at = scales.publish(p, work, s, me, tile);
    if (me.index == 0 && tile > 0 && tile - 1 + ROPES < work.count) fetch_rope(p, work, s, tile - 1 + ROPES);
    float x[32];
    compute_scores(x, queries, s, me, factor, tile, at);
    weigh_tile(softmax, x, work, s, me, last, tile, at);
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

DEVICE void output(const Params& p, const Work& work, const Shared& s, const Thread& me) {
  Outputs outputs;
  outputs.clear();
#if FORMAT == 3
  unpack_first(p, work, s, me);
#endif
#pragma unroll 1
  for (int tile = 0; tile < work.count; tile++) {
    const int number = 2 * tile + me.group - 1, next = number + 2 * AHEAD + PLACES;
    const Turn at(number, HALVES), weights(tile, 2);
    const int position = work.begin + tile * TILE;
    const u32 half = s.half(at.slot);
#if FORMAT == 3
    if (tile + AHEAD < work.count) unpack_half(s, me, number + 2 * AHEAD);
#endif
    barrier_wait(s.half_full(at.slot), at.parity);
    barrier_wait(s.weights_full(weights.slot), weights.parity);
    if (!PACKED && (position < work.low || position + TILE > work.length)) clear_hidden(work, me, half, position);
    outputs.rescale(s.base + OFFSET_RESCALE + weights.slot * 256, me);
    outputs.add(s.weights(weights.slot), half, me);
    announce(me, s.weights_empty(weights.slot));
    group_sync(me);
    if (me.index == 0 && next < 2 * work.count) fetch_half(p, work, s, next);
  }
  named_barrier_sync(15, THREADS);
  if (p.splits > 1)
    outputs.store<0>(reinterpret_cast<char*>(p.part), p, work, s, me,
                     (static_cast<i64>(work.split) * p.batches + work.batch) * p.rows);
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
    registers_decrease<SCORE_REGISTERS>();
    score(p, work, s, me);
  } else {
    registers_increase<OUTPUT_REGISTERS>();
    output(p, work, s, me);
  }
}

#include "merge.cuh"
