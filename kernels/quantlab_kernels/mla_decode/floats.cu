// Absorbed attention over 16-bit latents for 64 rows (heads times queries) a tile.
//
// One warpgroup, the scorer, holds the queries in registers, which leaves room for three tiles of latents in shared
// memory, and hands weights to two warpgroups that add the products with half of the channels each. It does so when the
// next tile's scores have been issued: matrix units work off scores and outputs in turns, and weights are made under
// outputs. Where two CTAs have rows of the same sequence, each brings half of a tile's latents to both: what a tile
// takes from the L2 is as much of the GPU's power as what is done with it.
//
// Macros: L, KEPT, QUERY, PAGED, BOX, SHARED as in sm90.cu;   SCORERS (1), CLUSTER as in tiles.cuh;
//   HALVES, ROPES as in rows.cu
#include "sm90.cuh"
#include "attention.cuh"
#include "wgmma.cuh"
#include "work.cuh"

constexpr int HALF_CHUNKS = L / 128, HALF = HALF_CHUNKS * CHUNK;  // of channels of a tile
using Index = int;
#include "tiles.cuh"

constexpr int SCORE_REGISTERS = 184, OUTPUT_REGISTERS = 160;  // together what there is at launch
constexpr int TILES = HALVES / 2;                             // in the ring
constexpr int STEPS = 8 * HALF_CHUNKS;                        // of 16 channels of scores, positions not counted
constexpr int EARLY = 3 * STEPS / 4;  // that are issued before the last tile's weights are stored

constexpr int OFFSET_ROPE = HALVES * HALF;
constexpr int OFFSET_P = OFFSET_ROPE + ROPES * CHUNK;
constexpr int OFFSET_POSITIONS = OFFSET_P + CHUNK;      // of queries
constexpr int OFFSET_LAST = OFFSET_POSITIONS + CHUNK;   // queries' last 16 channels: [2][8] of 8 rows by 16 bytes
constexpr int OFFSET_TOTAL = OFFSET_LAST + 2048;        // [64] what sums are multiplied by
constexpr int OFFSET_RESCALE = OFFSET_TOTAL + 256;      // [2][64]
constexpr int OFFSET_RAISED = OFFSET_RESCALE + 512;     // [2][4] of warps
constexpr int OFFSET_BARRIERS = OFFSET_RAISED + 32;
constexpr int BARRIERS = HALVES + ROPES + 2 * TILES + 3;
static_assert(OFFSET_BARRIERS + 8 * BARRIERS <= SHARED, "the host allocates what is laid out here");

struct Shared {
  u32 base;
  DEVICE u32 half(int slot) const { return base + slot * HALF; }
  DEVICE u32 rope(int slot) const { return base + OFFSET_ROPE + slot * CHUNK; }
  DEVICE u32 weights() const { return base + OFFSET_P; }
  DEVICE u32 queries() const { return half(HALVES - 2); }  // on their way to registers, where the third tile will lie
  DEVICE u32 positions() const { return base + OFFSET_POSITIONS; }
  DEVICE u32 last() const { return base + OFFSET_LAST; }
  DEVICE u32 total(int row) const { return base + OFFSET_TOTAL + row * 4; }
  DEVICE u32 rescale(int tile, int row) const { return base + OFFSET_RESCALE + tile % 2 * 256 + row * 4; }
  DEVICE u32 raised(int tile, int warp) const { return base + OFFSET_RAISED + tile % 2 * 16 + warp * 4; }
  DEVICE u32 half_full(int slot) const { return barrier(slot); }
  DEVICE u32 rope_full(int slot) const { return barrier(HALVES + slot); }
  DEVICE u32 added(int slot) const { return barrier(HALVES + ROPES + slot); }
  DEVICE u32 left(int slot) const { return barrier(HALVES + ROPES + TILES + slot); }  // by the other CTA
  DEVICE u32 queries_used() const { return barrier(BARRIERS - 3); }
  DEVICE u32 weights_full() const { return barrier(BARRIERS - 2); }
  DEVICE u32 totals_full() const { return barrier(BARRIERS - 1); }

 private:
  DEVICE u32 barrier(int i) const { return base + OFFSET_BARRIERS + 8 * i; }
};

DEVICE void initialize_barriers(const Shared& s) {
  for (int i = 0; i < HALVES; i++) barrier_init(s.half_full(i), 1);
  for (int i = 0; i < ROPES; i++) barrier_init(s.rope_full(i), 1);
  for (int i = 0; i < TILES; i++) barrier_init(s.added(i), 256), barrier_init(s.left(i), 1);
  barrier_init(s.queries_used(), 128);
  barrier_init(s.weights_full(), 128);
  barrier_init(s.totals_full(), 128);
  barrier_init_fence();
}

DEVICE void wait_added(const Shared& s, int tile) { barrier_wait(s.added(tile % TILES), tile / TILES & 1); }

// ---- fetching: one thread of each warpgroup that adds ----

// Half a tile, whose place this CTA has left. Of a pair of CTAs each brings the half of its rank to both, once the
// other one has left the place as well; before the third tile it was the queries'.
DEVICE void fetch_half(const Params& p, const Work& work, const Shared& s, int tile, int half) {
  if (tile >= work.count) return;
  const Boxes boxes(p, work, tile, p.latent_row);
  const int slot = 2 * (tile % TILES) + half;
  const u32 full = s.half_full(slot), left = s.left(tile % TILES);
  barrier_arrive_expect(full, HALF_CHUNKS * boxes.bytes);
  if (CLUSTER == 2 && cluster_rank() != half) {
    if (tile >= 2) barrier_arrive_cluster(left, half);
    return;
  }
  if (CLUSTER == 2 && tile >= 2) barrier_wait(left, (tile + 1) / TILES & 1 ^ 1);
#pragma unroll
  for (int c = 0; c < HALF_CHUNKS; c++)
    boxes.load<CLUSTER == 2>(p, &p.latent, (half * HALF_CHUNKS + c) * 64, s.half(slot) + c * CHUNK, full);
}

DEVICE void fetch_rope(const Params& p, const Work& work, const Shared& s, int tile) {
  if (tile >= work.count) return;
  const Boxes boxes(p, work, tile, p.rope_row);
  const u32 full = s.rope_full(tile % ROPES);
  barrier_arrive_expect(full, boxes.bytes);
  boxes.load<false>(p, &p.rope, 0, s.rope(tile % ROPES), full);
}

DEVICE void copy_piece(u32 to, const char* from, bool there) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(there ? 16 : 0) : "memory");
}

// Queries as they are, in chunks as latents have them. All warps but the first take rows in turns, with little code: what
// runs once waits for its instructions.
constexpr int STAGERS = THREADS / 32 - 1;
DEVICE void stage_queries(const Params& p, const Work& work, const Shared& s) {
  const int lane = threadIdx.x % 32;
#pragma unroll 1
  for (int n = threadIdx.x / 32 - 1; n < 64; n += STAGERS) {
    const Row row(p, work, n);
    const u32 to = swizzled(n, lane % 8 * 16), latent = s.queries() + lane / 8 * CHUNK + to;
    const char* from = row.there ? row.latent + 16 * lane : p.q_latent;
#pragma unroll
    for (int i = 0; i < L / 256; i++) copy_piece(latent + i * (4 * CHUNK), from + 512 * i, row.there);
    if (lane < 8) copy_piece(s.positions() + to, row.there ? row.rope + 16 * lane : p.q_rope, row.there);
  }
  asm volatile("cp.async.wait_all;" ::: "memory");
}

// ---- scores ----

struct Scores {
  float x[32];
  u32 queries[STEPS - 1][4];  // for those of the last step there are no registers
  DEVICE Scores(const Shared& s, const Thread& me) {
    const auto from = [&](int i) {
      return s.queries() + i / 4 * CHUNK + swizzled(16 * me.warp + me.lane % 16, i % 4 * 32 + me.lane / 16 * 16);
    };
    u32 last[4];
#pragma unroll
    for (int i = 0; i < STEPS - 1; i++) load_matrix_x4(queries[i], from(i));
    load_matrix_x4(last, from(STEPS - 1));
#pragma unroll
    for (int i = 0; i < 4; i++)
      write(s.last() + i / 2 * 1024 + me.warp * 256 + i % 2 * 128 + 4 * me.lane, __uint_as_float(last[i]));
    async_proxy_fence();
    group_sync(me);
  }
  // Products of some steps of a tile, positions last.
  template <int first, int last>
  DEVICE void multiply(const Shared& s, int tile) {
    constexpr int HALF_STEPS = STEPS / 2;
    const Turn at(tile, TILES), rope_at(tile, ROPES);
    pin(x);
    wgmma_fence();
#pragma unroll
    for (int step = first; step < last; step++) {
      if (step % HALF_STEPS == 0)
        barrier_wait(step < STEPS ? s.half_full(2 * at.slot + step / HALF_STEPS) : s.rope_full(rope_at.slot),
                     step < STEPS ? at.parity : rope_at.parity);
      const int half = step / HALF_STEPS, i = step % HALF_STEPS;
      const u32 from = descriptor_low(step < STEPS ? s.half(2 * at.slot + half) : s.rope(rope_at.slot));
      const u64 tokens = descriptor(from + i / 4 * (CHUNK / 16) + 2 * (i % 4));
      if (step < STEPS - 1)
        wgmma_scores(x, queries[step < STEPS - 1 ? step : 0], tokens, step > 0);
      else if (step == STEPS - 1)
        wgmma_rest(x, plain_descriptor(s.last()), tokens, 1);
      else
        wgmma_rest(x, descriptor(descriptor_low(s.positions()) + 2 * i), tokens, 1);
    }
    wgmma_commit();
  }
  DEVICE void wait() {
    wgmma_wait<0>();
    pin(x);
  }
};

constexpr float LOG2_WEIGHT = 8.0f, WEIGHT = 256.0f;  // of a token at the reference
constexpr float HIGHEST = LOG2_WEIGHT + 6.0f;

// Rows g and g + 8 of a warp, in powers of two. The weight of a token is 2^(score - zero), zero lying LOG2_WEIGHT below
// the row's reference, which is raised when a score exceeds it by more than 6. That is seldom, so that a tile mostly
// costs one vote of its warp.
struct Rows {
  float zero[2] = {0.0f, 0.0f}, total[2] = {0.0f, 0.0f};  // total: of this thread's tokens
  // From scores [8 j + 2 t + {0, 1} tokens, g and g + 8] to exponents of weights.
  DEVICE void raise(float (&x)[32], const Params& p, const Work& work, const Shared& s, const Thread& me, int tile) {
    const int position = work.begin + tile * TILE;
    float top[2] = {-INFINITE, -INFINITE};
#pragma unroll
    for (int i = 0; i < 32; i++) x[i] = fmaf(x[i], p.factor, -zero[i / 2 % 2]);
    if (position < work.low || position + TILE > work.length - p.sq + 1) hide(x, p, work, me, position);
#pragma unroll
    for (int i = 0; i < 32; i++) top[i / 2 % 2] = fmaxf(top[i / 2 % 2], x[i]);
    const bool raised = __any_sync(~0u, fmaxf(top[0], top[1]) > HIGHEST || tile == 0);
    if (raised) move_zeros(x, top, s, me, tile);
    if (me.lane == 0) write(s.raised(tile, me.warp), __uint_as_float(raised));
  }
  DEVICE void make(u32 (&pairs)[16], float (&x)[32]) {
#pragma unroll
    for (int i = 0; i < 32; i++) x[i] = exp2_(x[i]);
#pragma unroll
    for (int i = 0; i < 16; i++) {
      total[i % 2] += x[2 * i] + x[2 * i + 1];
      pairs[i] = pack<KEPT>(x[2 * i], x[2 * i + 1]);
    }
  }
  // For the other warpgroups and whoever merges.
  DEVICE void publish(const Params& p, const Work& work, const Shared& s, const Thread& me) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
      total[r] += __shfl_xor_sync(~0u, total[r], 1);
      total[r] += __shfl_xor_sync(~0u, total[r], 2);
      const int n = 16 * me.warp + me.g + 8 * r, row = work.first_row + n;
      const float sum = total[r] * (1.0f / WEIGHT), reference = zero[r] + LOG2_WEIGHT;
      const bool some = sum > 0.0f;
      if (me.t != 0) continue;
      write(s.total(n), some ? 1.0f / (WEIGHT * sum) : 0.0f);
      if (row >= p.rows) continue;
      if (p.splits > 1) {
        const i64 at = (static_cast<i64>(work.split) * p.batches + work.batch) * p.rows + row;
        p.sums[2 * at] = some ? reference : -INFINITE, p.sums[2 * at + 1] = sum;
      } else {
        p.lse[lse_of(p, work.batch, row)] = some ? (reference + log2_(sum)) / LOG2E : -INFINITE;
      }
    }
  }

 private:
  DEVICE void hide(float (&x)[32], const Params& p, const Work& work, const Thread& me, int position) const {
    int last[2];
#pragma unroll
    for (int r = 0; r < 2; r++) last[r] = Row(p, work, 16 * me.warp + me.g + 8 * r).last;
#pragma unroll
    for (int i = 0; i < 32; i++) {
      const int token = position + i / 4 * 8 + 2 * me.t + i % 2;
      x[i] = (token < work.low) | (token > last[i / 2 % 2]) ? -INFINITE : x[i];
    }
  }
  // Of rows with a score that is too high, and of all in the first tile.
  DEVICE void move_zeros(float (&x)[32], float (&top)[2], const Shared& s, const Thread& me, int tile) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
      top[r] = fmaxf(top[r], __shfl_xor_sync(~0u, top[r], 1));
      top[r] = fmaxf(top[r], __shfl_xor_sync(~0u, top[r], 2));
      const float up = top[r] > (tile == 0 ? -INFINITE : HIGHEST) ? top[r] - LOG2_WEIGHT : 0.0f;
      const float by = tile == 0 ? 1.0f : exp2_(-up);
      zero[r] += up;
      total[r] *= by;
      if (me.t == 0) write(s.rescale(tile, 16 * me.warp + me.g + 8 * r), by);
#pragma unroll
      for (int i = 0; i < 16; i++) x[i / 2 * 4 + 2 * r + i % 2] -= up;
    }
  }
};

// Weights for the other warpgroups, rows on M.
DEVICE void store_weights(const u32 (&pairs)[16], const Shared& s, const Thread& me) {
#pragma unroll
  for (int j = 0; j < 8; j += 2)
    store_matrix_x4(s.weights() + swizzled(16 * me.warp + me.lane % 16, 16 * (j + me.lane / 16)), pairs[2 * j],
                    pairs[2 * j + 1], pairs[2 * j + 2], pairs[2 * j + 3]);
}

DEVICE void score(const Params& p, const Work& work, const Shared& s, const Thread& me) {
  Rows rows;
  Scores scores(s, me);
  if (work.count > 0) scores.multiply<0, STEPS + 4>(s, 0);
  scores.wait();
  barrier_arrive(s.queries_used());
#pragma unroll 1
  for (int tile = 0; tile < work.count; tile++) {
    const bool more = tile + 1 < work.count;
    u32 pairs[16];
    scores.wait();
    rows.raise(scores.x, p, work, s, me, tile);
    rows.make(pairs, scores.x);
    if (more) scores.multiply<0, EARLY>(s, tile + 1);
    if (tile > 0) wait_added(s, tile - 1);
    store_weights(pairs, s, me);
    async_proxy_fence();
    if (more) scores.multiply<EARLY, STEPS + 4>(s, tile + 1);
    barrier_arrive(s.weights_full());
  }
  rows.publish(p, work, s, me);
  barrier_arrive(s.totals_full());
}

// ---- outputs ----

struct Outputs {
  float sum[L / 4];
  DEVICE Outputs() {
#pragma unroll
    for (int i = 0; i < L / 4; i++) sum[i] = 0.0f;
  }
  DEVICE void rescale(u32 from) {
    const float a = read<float>(from), b = read<float>(from + 32);
#pragma unroll
    for (int i = 0; i < L / 4; i++) sum[i] *= i / 2 % 2 ? b : a;
  }
  DEVICE void add(u32 weights, u32 half) {
    const u32 a = descriptor_low(weights), b = (CHUNK / 16) << 16 | (half & 0x3FFFF) >> 4;  // chunks of 64 channels
    pin(sum);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < 4; i++) wgmma_outputs(sum, descriptor(a + 2 * i), descriptor(b + 128 * i), 1);
    wgmma_commit();
  }
  DEVICE void wait() {
    wgmma_wait<0>();
    pin(sum);
  }
  // Averages of rows from the `first`th on, through the ring, which nobody reads any more: whole lines then.
  DEVICE void store(char* to, const Params& p, const Work& work, const Shared& s, const Thread& me, i64 first) const {
    constexpr int PIECES = L / 16, LINE = L;  // of 16 bytes of a row's half, and bytes of them
    const u32 from = s.half(me.half()) + 16 * me.warp * LINE, total = s.total(16 * me.warp + me.g);
    const float by[2] = {read<float>(total), read<float>(total + 32)};
    const auto at = [&](int row, int piece) { return from + row * LINE + (piece ^ row % 8) * 16; };
#pragma unroll
    for (int j = 0; j < L / 16; j += 2) {
      const float* x = sum + 4 * j;
      store_matrix_x4(at(me.lane % 16, j + me.lane / 16), pack<QUERY>(x[0] * by[0], x[1] * by[0]),
                      pack<QUERY>(x[2] * by[1], x[3] * by[1]), pack<QUERY>(x[4] * by[0], x[5] * by[0]),
                      pack<QUERY>(x[6] * by[1], x[7] * by[1]));
    }
    __syncwarp();
#pragma unroll
    for (int i = me.lane; i < 16 * PIECES; i += 32) {
      const int row = i / PIECES, piece = i % PIECES, n = 16 * me.warp + row;
      if (work.first_row + n < p.rows)
        *reinterpret_cast<uint4*>(to + ((first + n) * L + me.half() * (L / 2)) * 2 + 16 * piece) =
            read<uint4>(at(row, piece));
    }
  }
};

// What is fetched before the loop; the place of the third tile is free when queries, there at first, have been used.
DEVICE void fetch_ahead(const Params& p, const Work& work, const Shared& s, int half) {
  fetch_half(p, work, s, 1, half);
  if (half == 0) fetch_rope(p, work, s, 1);
  barrier_wait(s.queries_used(), 0);
  fetch_half(p, work, s, 2, half);
}

DEVICE void output(const Params& p, const Work& work, const Shared& s, const Thread& me) {
  Outputs outputs;
  if (me.index == 0) fetch_ahead(p, work, s, me.half());
#pragma unroll 1
  for (int tile = 0; tile < work.count; tile++) {
    const int position = work.begin + tile * TILE, slot = 2 * (tile % TILES) + me.half();
    const u32 half = s.half(slot);
    barrier_wait(s.half_full(slot), tile / TILES & 1);
    barrier_wait(s.weights_full(), tile & 1);
    if (position < work.low || position + TILE > work.length) clear_hidden(work, me, half, position);
    if (uniform(read<u32>(s.raised(tile, me.warp)))) outputs.rescale(s.rescale(tile, 16 * me.warp + me.g));
    outputs.add(s.weights(), half);
    if (me.index == 32 && me.half() == 0) fetch_rope(p, work, s, tile + ROPES);
    outputs.wait();
    barrier_arrive(s.added(tile % TILES));
    group_sync(me);
    if (me.index == 0) fetch_half(p, work, s, tile + TILES, me.half());
  }
  if (work.count > 0) wait_added(s, work.count - 1);
  barrier_wait(s.totals_full(), 0);
  const i64 before = (p.splits > 1 ? static_cast<i64>(work.split) * p.batches + work.batch : work.batch) * p.rows;
  outputs.store(p.splits > 1 ? reinterpret_cast<char*>(p.part) : p.out, p, work, s, me, before + work.first_row);
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) mla_decode(const __grid_constant__ Params p) {
  extern __shared__ __align__(1024) unsigned char memory[];
  const Shared s = {shared_address(memory)};
  if (threadIdx.x == 0) {
    initialize_barriers(s);
    prefetch_tensor_map(&p.latent);
    prefetch_tensor_map(&p.rope);
  }
  if (CLUSTER == 2) cluster_sync_relaxed();
  if (CLUSTER == 1) __syncthreads();
  wait_for_previous_kernel();
  let_next_kernel_start();
  const Work work(p);
  const Thread me;
  if (threadIdx.x >= 32) {
    stage_queries(p, work, s);
  } else if (threadIdx.x == 0) {  // the rest behind queries, which would wait for it
    fetch_half(p, work, s, 0, 0);
    fetch_half(p, work, s, 0, 1);
    fetch_rope(p, work, s, 0);
  }
  async_proxy_fence();
  __syncthreads();
  if (me.group == 0) {
    registers_increase<SCORE_REGISTERS>();
    score(p, work, s, me);
  } else {
    registers_decrease<OUTPUT_REGISTERS>();
    output(p, work, s, me);
  }
}

#define AVERAGES 1
#include "merge.cuh"
