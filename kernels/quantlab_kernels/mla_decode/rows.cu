// Absorbed attention over latents in codes for many rows (heads times queries) a tile, N of them.
//
// Scorers compute scores, tokens on the M of the MMA, and hand weights through shared memory to two warpgroups that add
// the products with half of the channels each. E4M3 has one scorer, beside outputs that need sums of a tile of their
// own; INT4 has two, which take tiles in turns. Whoever is the last to read a part of a tile has the copy engine bring
// the next one to its place. How codes are multiplied says rows_codes.cuh, and rows_softmax.cuh, how scores become
// weights.
//
// Macros: L, FORMAT (1 E4M3, 3 INT4), KEPT, QUERY, PAGED, BOX, SHARED as in sm90.cu;   SCORERS, CLUSTER (1) as in
//   tiles.cuh;   N  rows of a tile: up to 64, a multiple of 8, of INT4 of 16;   HALVES  of tiles, by channels, in the
//   ring;   ROPES  position parts
#include "sm90.cuh"
#include "attention.cuh"
#include "wgmma.cuh"
#include "work.cuh"

// Together no more than there are at launch, 168 or, of 512 threads, 128 each: who asks for more waits for ever.
constexpr int SCORE_REGISTERS = SCORERS == 2 ? 88 : 136, OUTPUT_REGISTERS = SCORERS == 2 ? 168 : 184;
static_assert(SCORERS * SCORE_REGISTERS + 2 * OUTPUT_REGISTERS <= (SCORERS == 2 ? 4 * 128 : 3 * 168), "see above");
constexpr int BYTES = FORMAT == 1 ? L : L / 2;                        // of a token's latent
constexpr int HALF_CHUNKS = BYTES / 256, HALF = HALF_CHUNKS * CHUNK;  // of channels of a tile
constexpr int CHUNKS = 2 * HALF_CHUNKS;
using Index = u32;
#include "tiles.cuh"
constexpr int SLOTS = 2, SLOT = FORMAT == 1 ? 64 : CHUNK;  // of weights: E4M3 side by side, or float16
constexpr int QUERY_CHUNKS = 2 * CHUNKS + 1;               // of N rows; the last is the position
constexpr int QUERY_CHUNK = N * 128;

constexpr int OFFSET_ROPE = HALVES * HALF;
constexpr int OFFSET_P = OFFSET_ROPE + ROPES * CHUNK;
constexpr int OFFSET_QUERIES = OFFSET_P + (FORMAT == 1 ? CHUNK : SLOTS * SLOT);
constexpr int OFFSET_ROWS = OFFSET_QUERIES + QUERY_CHUNKS * QUERY_CHUNK;  // [64] of (zero, factor): rows_softmax.cuh
constexpr int OFFSET_LAST = OFFSET_ROWS + 512;                           // [64] last token that a row sees; at the end,
constexpr int OFFSET_TOTAL = OFFSET_LAST;                                // [64] what sums are multiplied by
constexpr int OFFSET_PARTIAL = OFFSET_LAST + 256;                        // [4][64] of warps
constexpr int OFFSET_UNITS = OFFSET_PARTIAL + 1024;                      // [64] of INT4 scores
constexpr int OFFSET_WEIGHTS = OFFSET_UNITS + (FORMAT == 3 ? 256 : 0);   // [2][64] sums of INT4's weights
// By which sums of rows are multiplied in each of four tiles, and whether any is. Side by side for INT4, apart for E4M3:
// the other way the compiler's code takes 3 % more time, in either.
constexpr int RESCALE = FORMAT == 3 ? 256 + 16 : 256, RAISED = FORMAT == 3 ? RESCALE : 4;
constexpr int OFFSET_RESCALE = OFFSET_WEIGHTS + (FORMAT == 3 ? 512 : 0);  // [4] of [64]
constexpr int OFFSET_RAISED = OFFSET_RESCALE + (FORMAT == 3 ? 256 : 4 * RESCALE);
constexpr int OFFSET_BARRIERS = OFFSET_RESCALE + 4 * RESCALE + 16;
static_assert(OFFSET_BARRIERS + 8 * (HALVES + ROPES + 2 * SLOTS + 5) <= SHARED,
              "the host allocates what is laid out here");

constexpr int ROW_BYTES = 2 * L;  // of a query
static_assert(N * ROW_BYTES <= (HALVES - 2) * HALF && ROPES > 1, "queries lie behind the first tile");

struct Shared {
  u32 base;
  DEVICE u32 half(int slot) const { return base + slot * HALF; }
  DEVICE u32 rope(int slot) const { return base + OFFSET_ROPE + slot * CHUNK; }
  DEVICE u32 raw_latent(int n) const { return half(2) + n * ROW_BYTES; }
  DEVICE u32 raw_rope(int n) const { return rope(1) + n * 128; }
  DEVICE u32 weights(int slot) const { return base + OFFSET_P + slot * SLOT; }
  DEVICE u32 rescale(int tile) const { return base + OFFSET_RESCALE + tile % 4 * RESCALE; }
  DEVICE u32 raised(int tile) const { return base + OFFSET_RAISED + tile % 4 * RAISED; }
  DEVICE u32 half_full(int slot) const { return barrier(slot); }
  DEVICE u32 rope_full(int slot) const { return barrier(HALVES + slot); }
  DEVICE u32 weights_full(int slot) const { return barrier(HALVES + ROPES + slot); }
  DEVICE u32 weights_empty(int slot) const { return barrier(HALVES + ROPES + SLOTS + slot); }
  DEVICE u32 totals_full() const { return barrier(HALVES + ROPES + 2 * SLOTS); }
  DEVICE u32 queries_full() const { return barrier(HALVES + ROPES + 2 * SLOTS + 1); }
  DEVICE u32 total_full() const { return barrier(HALVES + ROPES + 2 * SLOTS + 2); }  // of the second scorer
  DEVICE u32 voted(int scorer) const { return barrier(HALVES + ROPES + 2 * SLOTS + 3 + scorer); }

 private:
  DEVICE u32 barrier(int i) const { return base + OFFSET_BARRIERS + 8 * i; }
};

DEVICE void initialize_barriers(const Shared& s) {
  for (int i = 0; i < HALVES; i++) barrier_init(s.half_full(i), 1);
  for (int i = 0; i < ROPES; i++) barrier_init(s.rope_full(i), 1);
  for (int i = 0; i < SLOTS; i++) {
    barrier_init(s.weights_full(i), 4);
    barrier_init(s.weights_empty(i), 8);
  }
  barrier_init(s.totals_full(), FORMAT == 1 ? 128 : 128 + 256);
  barrier_init(s.queries_full(), N);
  barrier_init(s.total_full(), 128);
  for (int i = 0; i < 2; i++) barrier_init(s.voted(i), 128);
  barrier_init_fence();
}

// ---- fetching: one thread ----

DEVICE void fetch_half(const Params& p, const Work& work, const Shared& s, int number) {
  const Boxes boxes(p, work, number / 2, p.latent_row);
  const Turn at(number, HALVES);
  const u32 full = s.half_full(at.slot);
  barrier_arrive_expect(full, HALF_CHUNKS * boxes.bytes);
#pragma unroll
  for (int c = 0; c < HALF_CHUNKS; c++)
    boxes.load<false>(p, &p.latent, (number % 2 * HALF_CHUNKS + c) * 128, s.half(at.slot) + c * CHUNK, full);
}

DEVICE void fetch_rope(const Params& p, const Work& work, const Shared& s, int tile) {
  const Turn at(tile, ROPES);
  const Boxes boxes(p, work, tile, p.rope_row);
  const u32 full = s.rope_full(at.slot);
  barrier_arrive_expect(full, boxes.bytes);
  boxes.load<false>(p, &p.rope, 0, s.rope(at.slot), full);
}

// Halves from `first` to before `last`, of those that there are.
DEVICE void fetch_halves(const Params& p, const Work& work, const Shared& s, int first, int last) {
#pragma unroll 1
  for (int number = first; number < min(last, 2 * work.count); number++)
    fetch_half(p, work, s, number);
}

// ---- consumers ----

DEVICE void write(u32 to, u32 x) { asm volatile("st.shared.b32 [%0], %1;" ::"r"(to), "r"(x) : "memory"); }
DEVICE void write(u32 to, uint2 x) {
  asm volatile("st.shared.v2.b32 [%0], {%1, %2};" ::"r"(to), "r"(x.x), "r"(x.y) : "memory");
}
DEVICE void write(u32 to, uint4 x) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w) : "memory");
}

// Whether it holds for any thread of the warpgroup; all of them meet.
DEVICE bool group_any(const Thread& me, bool holds) {
  u32 any;
  asm volatile(
      "{\n.reg .pred p, q;\nsetp.ne.u32 p, %1, 0;\nbar.red.or.pred q, %2, 128, p;\nselp.u32 %0, 1, 0, q;\n}"
      : "=r"(any) : "r"(static_cast<u32>(holds)), "r"(1 + me.group) : "memory");
  return any != 0;
}

DEVICE void announce(const Thread& me, u32 barrier) {
  __syncwarp();
  if (me.lane == 0) barrier_arrive(barrier);
}

DEVICE void write_row(u32 base, int n, int last, float factor) {
  write(base + OFFSET_ROWS + 8 * n, 0.0f);
  write(base + OFFSET_ROWS + 8 * n + 4, factor);
  write(base + OFFSET_LAST + 4 * n, static_cast<u32>(last));
}

#include "codes.cuh"
#include "rows_softmax.cuh"
#include "rows_codes.cuh"

DEVICE void hand_over(const Weights& weights, const Shared& s, const Thread& me, int tile) {
  const Turn at(tile, SLOTS);
  barrier_wait(s.weights_empty(at.slot), at.parity ^ 1);
  weights.store(s, at.slot, me);
  async_proxy_fence();
  announce(me, s.weights_full(at.slot));
}

#if SCORERS == 1 && N > 32
// Weights are handed over once the next tile's products have been issued, so that outputs run beside exponentials more
// than beside MMA. After the last tile it multiplies that again, for nothing: a branch would make the compiler wait for
// every MMA.
DEVICE void score_tiles(Softmax& softmax, const Params& p, const Work& work, const Shared& s, const Thread& me) {
  Tokens tokens(p, work, me);
  Scores scores;
  float x[N / 2];
  if (work.count > 0) {
    tokens.advance();
    tokens.prefetch(p, work, me, 1);
    scores.multiply(s, me, 0);
    scores.take(x, tokens, s, me, 0);
    scores.wait_for_positions(x);
  }
#pragma unroll 1
  for (int tile = 0; tile < work.count; tile++) {
    const int next = min(tile + 1, work.count - 1);
    Weights weights;
    softmax.raise(x, tokens, work, s, me, p.sq, tile);
    weights.make(softmax, x, tokens);
    scores.multiply(s, me, next);
    hand_over(weights, s, me, tile);
    tokens.advance();
    tokens.prefetch(p, work, me, tile + 2);
    scores.take(x, tokens, s, me, next);
    scores.wait_for_positions(x);
  }
}
#else
DEVICE void score_tiles(Softmax& softmax, const Params& p, const Work& work, const Shared& s, const Thread& me) {
  Tokens tokens(p, work, me);
  Scores scores;
#pragma unroll 1
  for (int tile = me.group; tile < work.count; tile += SCORERS) {
    float x[N / 2];
    Weights weights;
    tokens.advance();
    tokens.prefetch(p, work, me, tile + SCORERS);
    scores.multiply(s, me, tile);
    scores.take(x, tokens, s, me, tile);
    scores.wait_for_positions(x);
    softmax.raise(x, tokens, work, s, me, p.sq, tile);
    weights.make(softmax, x, tokens);
    hand_over(weights, s, me, tile);
  }
}
#endif

DEVICE void score(const Params& p, const Work& work, const Shared& s, const Thread& me) {
  Softmax softmax;
  score_tiles(softmax, p, work, s, me);
  softmax.finish(p, work, s, me);
  if (me.group == 0) barrier_arrive(s.totals_full());
}

// ---- outputs ----

DEVICE void output(const Params& p, const Work& work, const Shared& s, const Thread& me) {
  Outputs outputs;
  outputs.clear();
  if (me.index == 0 && me.half() == 0) {
    fetch_halves(p, work, s, 2, HALVES);
#pragma unroll 1
    for (int tile = 1; tile < min(ROPES, work.count); tile++) fetch_rope(p, work, s, tile);
  }
#pragma unroll 1
  for (int tile = 0; tile < work.count; tile++) {
    const int number = 2 * tile + me.half(), next = number + HALVES;
    const Turn at(number, HALVES), weights(tile, SLOTS);
    const int position = work.begin + tile * TILE;
    const u32 half = s.half(at.slot);
    barrier_wait(s.half_full(at.slot), at.parity);
    barrier_wait(s.weights_full(weights.slot), weights.parity);
    if (FORMAT != 3 && (position < work.low || position + TILE > work.length)) clear_hidden(work, me, half, position);
    if (uniform(read<u32>(s.raised(tile)))) outputs.rescale(s.rescale(tile), me);
    outputs.add(s.weights(weights.slot), half, me);
    announce(me, s.weights_empty(weights.slot));
    group_sync(me);
    if (me.index == 0 && next < 2 * work.count) fetch_half(p, work, s, next);
    if (me.index == 32 && me.half() == 0 && tile + ROPES < work.count) fetch_rope(p, work, s, tile + ROPES);
  }
  outputs.finish(s, me);
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
  Work work;
  work.place(p);
  __syncthreads();
  wait_for_previous_kernel();
  let_next_kernel_start();
  fetch_queries(p, work, s);
  work.measure(p);
  const Thread me;
  if (threadIdx.x == 0) {
    fetch_halves(p, work, s, 0, 2);  // the rest behind queries, which would wait for it
    if (work.count > 0) fetch_rope(p, work, s, 0);
  }
  stage_queries(p, work, s);
  async_proxy_fence();
  __syncthreads();
  if (me.group < SCORERS) {
    registers_decrease<SCORE_REGISTERS>();
    score(p, work, s, me);
  } else {
    registers_increase<OUTPUT_REGISTERS>();
    output(p, work, s, me);
  }
}

#define AVERAGES 1
#include "merge.cuh"
