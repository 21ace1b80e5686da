// Attention of a few queries over a packed KV cache, a share of a sequence's tokens in each CTA. Few shares are the CTAs of
// a cluster, which adds them up itself; of more, `merge` is the sum.
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
// Tokens that are kept in 16 bits beside the codes are a few tiles more, dealt out to warps, read straight from memory.
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
  int batches, heads, group, sq, rows, tiles, splits, capacity, table_row, window, sinks_kind, first, newest, near_kind,
      mergers, clustered;
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
constexpr int SUMS_ROW = D + 4;                       // floats; so that a warp writes to all banks at once
constexpr int MERGED = ROWS * (SUMS_ROW + 2) * 4;     // a warp's sums, which take the place of its ring
constexpr int RING_BYTES = STAGES * STAGE > MERGED ? STAGES * STAGE : MERGED;
constexpr int QUERY_BYTES = QUERY == 0 ? 4 : 2;
constexpr int QUERIES = (WARPS * (RING_BYTES + 8 * STAGES) + 15) / 16 * 16;  // where queries, mean and channels wait
constexpr int JOINT = QUERIES + ROWS * D * QUERY_BYTES + 8 * D;              // where sums from the cluster arrive
constexpr int CHAINS = NT == 1 ? 2 : 1;  // of dependent MMAs that make a score
constexpr float LOG2E = 1.4426950408889634f;
#define INFINITE __int_as_float(0x7f800000)
constexpr float WEIGHT = 1024.0f, LIMIT = 32768.0f;  // of a weight, in float16
constexpr float LOWEST = -1e30f;  // a reference before any score

#include "attention.cuh"
#include "operands.cuh"

struct Place {
  int batch, head, first_row, split;
  int start, length;
  int low, begin, end;  // codes from low on are read; begin, a multiple of the tile, to end is this CTA's share

  DEVICE explicit Place(const Params& p) {
    const int pair = blockIdx.x / p.splits, of_batch = pair / p.tiles;
    split = blockIdx.x - pair * p.splits;
    first_row = (pair - of_batch * p.tiles) * ROWS;
    batch = of_batch / p.heads;
    head = of_batch - batch * p.heads;
  }
  DEVICE void bound(const Params& p, int length_, int start_) {
    length = RING || PAGED ? length_ : min(length_, p.capacity);
    start = max(start_, 0);
    low = start + p.first;
    if (p.window >= 0) low = max(low, length - p.sq + 1 - p.window);
    if (RING) low = max(low, length - p.capacity);
    const int high = length - p.newest, base = low / STEP * STEP;
    const int share = (max(high - base, 0) + p.splits * STEP - 1) / (p.splits * STEP) * STEP;
    begin = base + split * share;
    end = min(begin + share, high);
  }
};

// ---- copies of tiles ----

DEVICE u32 scale_place(int token) { return token % 8 * 8 + token / 8 % 2 * 4; }  // of tokens g and g + 8 side by side

// A warp's ring. Of a dense cache the pointers move on by a constant, else they are those of a head's first tile.
struct Copies {
  const char* k;
  const char* v;
  const char* scale;  // of this lane's token: of a key in the lower half of the warp, of a value in the upper
  u32 ring, full, to, barrier, scale_to;
  int next, lane;

  // All that is known before anything may be read.
  DEVICE Copies(const Params& p, const Place& here, u32 shared, int warp, int lane_) : lane(lane_) {
    ring = to = shared + warp * RING_BYTES;
    full = barrier = shared + WARPS * RING_BYTES + warp * STAGES * 8;
    next = warp * STEP;
    k = p.k + here.head * p.k_head;
    v = p.v + here.head * p.v_head;
    scale = (lane < 16 ? p.k_scale + here.head * p.ks_head : p.v_scale + here.head * p.vs_head) + lane % 16 * 4;
    scale_to = TILES * (K_TILE + V_TILE) + scale_place(lane) + lane / 16 * 64;
    if (!PAGED && !RING) move(p, k, v, scale, here.batch, next);
    if (lane == 0) {
      for (int i = 0; i < STAGES; i++) barrier_init(full + 8 * i, 1);
      barrier_init_fence();
    }
    __syncwarp();
  }

  DEVICE void begin(const Place& here) {
    next += here.begin;
    if (!PAGED && !RING) {
      k += static_cast<i64>(here.begin) * K_ROW, v += static_cast<i64>(here.begin) * V_ROW;
      scale += static_cast<i64>(here.begin) * 4;
    }
    pin(k), pin(v), pin(scale);
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

#include "tiles.cuh"
#include "sums.cuh"

// ---- the kernel ----

extern "C" __global__ void __launch_bounds__(THREADS, CTAS) attention_decode(const __grid_constant__ Params p) {
  extern __shared__ __align__(128) unsigned char shared[];
  __shared__ __align__(8) u64 arrived_barrier;
  const u32 arrived = shared_address(&arrived_barrier), ring = shared_address(shared);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  Place here(p);
  Copies copies(p, here, ring, warp, lane);
  if (p.clustered) {
    if (threadIdx.x == 0) {
      barrier_init(arrived, 1), barrier_init_fence();
      barrier_arrive_expect(arrived, own_quads(p, here) * p.splits * (4 * QUAD));
    }
    cluster_sync_relaxed();
  }
  wait_for_previous_kernel();

  const int length = p.length[here.batch], start = p.start == nullptr ? 0 : p.start[here.batch];
  fetch_queries(p, here, ring + QUERIES);
  copies_commit();
  // Near slots are dealt out to all shares, and in each to the warps with the fewest codes.
  const int near_slots = p.first + p.newest, near_slot = (here.split + p.splits * (WARPS - 1 - warp)) * TILE;
  if (NEAR && near_slot < near_slots) Near(p, here, g).prefetch_tile(near_slot, g, t);
  here.bound(p, length, start);
  const int steps = (max(here.end - here.begin, 0) + STEP - 1) / STEP;  // of the CTA
  const int mine = (steps - warp + WARPS - 1) / WARPS;                  // of this warp: warp, warp + WARPS, ...
  copies.begin(here);
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
  copies_wait<STAGES - 1>();
  __syncthreads();  // queries are there
  Queries q;
  if (NEAR && near_slot < near_slots) {  // while the first tiles are on their way
    const Near near(p, here, g);
    make_queries<false>(q, p, ring + QUERIES, g, t);
    for (int slot = near_slot; slot < near_slots; slot += p.splits * WARPS * TILE)
      attend_near(sums, q, p, here, near, slot, g, t);
  }
  make_queries<true>(q, p, ring + QUERIES, g, t);
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
  float* all = reinterpret_cast<float*>(shared);
  store_sums(sums, all, warp, g, t);
  __syncthreads();
  let_next_kernel_start();
  const u32 joint = ring + JOINT;
  merge_warps(p, here, all, joint, arrived);
  if (p.clustered) add_cluster(p, here, reinterpret_cast<const float*>(shared + JOINT), arrived);
}
