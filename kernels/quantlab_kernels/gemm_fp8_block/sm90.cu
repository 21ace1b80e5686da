// out[M, N] = (a * a_scale) @ (b * b_scale)^T for Hopper: E4M3 operands, 1x128 scales of a, 128x128 scales of b.
//
// One producer warp brings tiles of 128 bytes along K through the copy engine into a ring of stages; a second warp of
// its warpgroup adds the scales of b; one to three math warpgroups multiply each stage with warpgroup MMA into a
// temporary accumulator and add that, scaled, to the final one in FP32 ("promotion", every 128 of K). CTAs are
// persistent: the ring runs on into the next tile while the math warps write out the last.
//
// X is the operand on the M side of the MMA and Y the one on the N side. Normally X = a and Y = b. SWAP puts the
// weights on X, so that a few tokens become the short N of the MMA and 64 rows of weights fill its M.
//
// Compiled once per configuration, with these macros:
//   MATH_GROUPS   math warpgroups, each with WAVES blocks of 64 rows of X;   BX = 64 * WAVES * MATH_GROUPS
//   BY            rows of Y in a tile, a multiple of 8 (of 16 for OUTPUT_TMA)
//   STAGES        length of the ring
//   CLUSTER_X     CTAs of a cluster along X, which share the tile of Y by multicast
//   SPLIT         CTAs of a cluster along K; their sums are added in a fixed order through distributed shared memory
//   TAIL          more than 1: the tiles of the last, incomplete wave are cut along K into at most so many parts
//   STREAM        1: the K blocks of all tiles of the same tokens are one row, cut evenly among their CTAs ("stream-K")
//   TEMPS         1, or 2 temporary accumulators: then block k is promoted under the MMA of block k + 1
//   UNROLL        1: a tile has a multiple of STAGES blocks of K, so it begins with stage 0 and the ring is unrolled
//   ROTATE        1: CTAs change places from one wave of tiles to the next
//   OUTPUT        0 float32, 1 bfloat16, 2 float16;  BIAS 0 none, else 1 + the same;  ACCUMULATE 0 or 1
//   OUTPUT_TMA    1: 16-bit tiles leave through PIECES buffers per group and the copy engine; 0: through a float32 tile
//   SHARED        bytes of dynamic shared memory that the launch provides
//   SWAP, GROUP   GROUP: tiles of X (GROUPED: of tokens) that are walked together for the sake of the L2 cache
//   ROW           0, or 1: a scale per row of a and one per row of b instead, which multiply the finished sums
//   GROUPED       0, or 1: rows of a are sorted by expert and b holds a weight [N, K] for each; how many rows an expert
//                 has is read from device memory, so that a CUDA graph may hold the launch
#include "experts.cuh"
#include "sm90.cuh"
#include "wgmma.cuh"

constexpr int BK = 128;  // elements of K in a stage = bytes of a swizzled row = length of a scale group
constexpr int BX = 64 * WAVES * MATH_GROUPS;
constexpr int MATH_THREADS = 128 * MATH_GROUPS;
constexpr int MATH_WARPS = 4 * MATH_GROUPS;
constexpr int CLUSTER = CLUSTER_X * SPLIT;
static_assert(SPLIT == 1 || CLUSTER_X == 1, "a cluster shares tiles or splits K");
static_assert(TAIL == 1 || CLUSTER == 1, "the parts of a tile belong to single CTAs");
static_assert(!STREAM || (SPLIT == 1 && TAIL == 1 && !GROUPED), "tiles are cut along K in one way");
static_assert(!STREAM || CLUSTER_X == 1 || !SWAP, "CTAs that share a tile of weights have different tokens");
static_assert(WAVES == 1 || TEMPS == 1, "two temporary accumulators need one wave");
static_assert(!UNROLL || (TEMPS == 1 && SPLIT == 1 && TAIL == 1 && !STREAM && !SWAP), "whole tiles of many tokens");
static_assert(!ROTATE || (TAIL == 1 && !STREAM), "the last tiles are cut for CTAs that keep their places");
static_assert(!GROUPED || (CLUSTER == 1 && TAIL == 1), "tiles of experts belong to single CTAs");
static_assert(BY / 8 % SPLIT == 0, "the CTAs that split K share out the columns of the tile in eights");

DEVICE constexpr int gcd(int a, int b) { return b == 0 ? a : gcd(b, a % b); }
constexpr int TOKENS = SWAP ? BY : BX;               // rows of a in a tile
constexpr int CHANNELS = SWAP ? BX : BY;             // rows of b in a tile
constexpr int SPAN = gcd(CHANNELS, 128);             // channels that surely share one scale of b
constexpr int SPANS = CHANNELS / SPAN;

DEVICE constexpr int round_up(int a, int b) { return (a + b - 1) / b * b; }
constexpr int X_BYTES = BX * BK;
constexpr int Y_BYTES = BY * BK;
// The copy engine starts a row of scales at a multiple of 16 bytes, the rows of an expert at any token: up to 3 too many.
constexpr int TOKEN_SCALE_BYTES = ROW ? 0 : (TOKENS + 4 * GROUPED) * 4;
constexpr int STAGE_BYTES = X_BYTES + Y_BYTES + TOKEN_SCALE_BYTES;  // what the copy engine brings

constexpr int ACCUMULATORS = BY / 2;         // registers of one thread for one wave
constexpr int SHARE = ACCUMULATORS / SPLIT;  // of those, the ones that this CTA adds up and writes
constexpr int SHARE_Y = BY / SPLIT;          // their columns
constexpr int RECEIVED_BYTES = (SPLIT - 1) * WAVES * SHARE * 4 * MATH_THREADS;

// Output through the copy engine: pieces of 64 rows by 64 (32, 16) columns, swizzled over 128 (64, 32) bytes.
constexpr int PIECE_COLUMNS = SHARE_Y % 64 == 0 ? 64 : SHARE_Y % 32 == 0 ? 32 : 16;
constexpr int PIECE_BYTES = 64 * PIECE_COLUMNS * 2;
// Output through a float32 tile: [tokens][channels]; the padding spreads a fragment over the banks.
constexpr int TILE_TOKENS = SWAP ? SHARE_Y : BX;
constexpr int TILE_CHANNELS = SWAP ? BX : SHARE_Y;
constexpr int TILE_STRIDE = TILE_CHANNELS + (SWAP ? 4 : 8);
constexpr int OUTPUT_BYTES = OUTPUT_TMA ? PIECES * MATH_GROUPS * PIECE_BYTES : TILE_TOKENS * TILE_STRIDE * 4;

constexpr int OFFSET_Y = STAGES * X_BYTES;
constexpr int OFFSET_OUTPUT = OFFSET_Y + STAGES * Y_BYTES;
constexpr int OFFSET_RECEIVED = OFFSET_OUTPUT + round_up(OUTPUT_BYTES, 128);
constexpr int OFFSET_TOKEN_SCALE = OFFSET_RECEIVED + RECEIVED_BYTES;
constexpr int TOKEN_SCALE_STRIDE = round_up(TOKEN_SCALE_BYTES, 128);
constexpr int OFFSET_CHANNEL_SCALE = OFFSET_TOKEN_SCALE + STAGES * TOKEN_SCALE_STRIDE;
constexpr int OFFSET_BARRIERS = OFFSET_CHANNEL_SCALE + (ROW ? 0 : round_up(STAGES * SPANS * 4, 8));
constexpr int OFFSET_GROUPS = OFFSET_BARRIERS + 8 * (2 * STAGES + 2);
constexpr int SHARED_BYTES = OFFSET_GROUPS + GROUPED * GROUPS_BYTES;
static_assert(SHARED_BYTES == SHARED, "the host allocates what is laid out here");

struct Params {
  TensorMap x, y, token_scale, output;
  const float* b_scale;  // [ceil(N / 128), K / 128]; ROW: [N]
  const void* bias;      // [N]
  void* out;             // [M, N], rows out_stride elements apart
  long long out_stride;
  float* partials;  // TAIL, STREAM: a tile of every CTA
  u32* flags;       // TAIL, STREAM: one of every math group of every CTA; 0 between launches
  int tokens, channels, blocks;  // M, N, K / 128
  int prefetch;                  // 1: weights may be loaded while the kernel before this one still runs
#if ROW
  const float* a_scale;  // [M]
#endif
#if GROUPED
  const long long* counts;  // [experts] rows of each
  int experts;
#endif
};

#if STREAM
// What every role walks through in the same order: pieces of tiles, the range of K of each.
//
// Each tile of tokens has as many CTAs as any other. Side by side they multiply the same weights, which then come from
// memory once. A CTA begins with the end of a tile, whose sums it hands over at once, and ends with the beginning of
// one, whose owner it is: what an owner waits for was computed first.
struct Schedule {
  int blocks, lanes, lane, worker, share, longer, tile, part_first, left;
  int tile_x, tile_y, first, last;
  int rank, end_token;
  static constexpr int first_token = 0, whole = 0, rest = 0, parts = 0;

  DEVICE Schedule(const Params& p, u32 cluster_rank, u32) : blocks(p.blocks), end_token(p.tokens) {
    rank = CLUSTER_X > 1 ? cluster_rank : 0;
    lanes = (p.tokens + TOKENS - 1) / TOKENS;
    worker = uniform(blockIdx.x / lanes);
    lane = blockIdx.x - worker * lanes;
    const int total = (p.channels + CHANNELS - 1) / CHANNELS * blocks, workers = uniform(gridDim.x / lanes);
    share = uniform(total / workers);
    longer = total - share * workers;
    const int begin = begin_of(worker);
    left = begin_of(worker + 1) - begin;
    tile = uniform(begin / blocks) - 1;
    part_first = begin - (tile + 1) * blocks;
  }

  // Where a CTA's share begins, counted in K blocks.
  DEVICE int begin_of(int cta) const { return cta * share + min(cta, longer); }
  DEVICE int end_of_tile() const { return (tile + 1) * blocks; }

  DEVICE bool advance() {
    if (left <= 0) return false;
    first = part_first;
    last = min(blocks, first + left);
    left -= last - first;
    part_first = 0;
    ++tile;
    tile_x = SWAP ? tile : lane;
    tile_y = SWAP ? lane : tile;
    return true;
  }

  DEVICE bool advance_part() { return false; }
  DEVICE void settle() {}
  DEVICE int token() const { return SWAP ? tile_y * BY : tile_x * BX; }
  DEVICE int channel() const { return SWAP ? tile_x * BX : tile_y * BY; }
  DEVICE int weight_row(const Params&) const { return channel(); }
};
#else
// What every role walks through in the same order: the tiles of this cluster, and the range of K of this CTA.
//
// TAIL: whole waves of tiles first. The tiles that remain are fewer than the CTAs; each is cut along K into `parts` equal
// ranges for as many CTAs. The one with the first range owns the tile, the others hand their sums over to it. All CTAs
// keep to the same pace along K, so that the L2 cache serves one with what another has fetched.
struct Schedule {
  int count_x, count_y, blocks, next, step, whole, rank, first, last;
  int rest, parts;
#if ROTATE
  int wave = 0;  // the first tile of those that are made at once; `next` is this cluster's place among them
#endif
  int tile_x, tile_y;
  int first_token, end_token;  // of the rows that the tile may hold
  u32 groups;                  // GROUPED: shared memory, [experts + 1] first rows, [experts + 1] first tiles
  Group group;                 // GROUPED: whose tile it is

  DEVICE Schedule(const Params& p, u32 cluster_rank, u32 shared_groups) {
    const int rows_x = SWAP ? p.channels : p.tokens, rows_y = SWAP ? p.tokens : p.channels;
    count_x = (rows_x + BX * CLUSTER_X - 1) / (BX * CLUSTER_X);
    count_y = (rows_y + BY - 1) / BY;
    blocks = p.blocks;
    next = blockIdx.x / CLUSTER;
    step = gridDim.x / CLUSTER;
    whole = count_x * count_y;
    rest = 0;
    rank = CLUSTER_X > 1 ? cluster_rank % CLUSTER_X : 0;
    first = SPLIT > 1 ? p.blocks * static_cast<int>(cluster_rank) / SPLIT : 0;
    last = SPLIT > 1 ? p.blocks * (static_cast<int>(cluster_rank) + 1) / SPLIT : p.blocks;
    if constexpr (TAIL > 1) {
      rest = whole % step;
      parts = rest > 0 ? min(min(step / rest, TAIL), blocks / 4) : 0;
      if (parts < 2) rest = 0;
      whole -= rest;
    }
#if GROUPED
    groups = shared_groups;
    experts = p.experts;
    whole = uniform(count_tiles(groups, experts)) * (SWAP ? count_x : count_y);
#else
    first_token = 0;
    end_token = p.tokens;
#endif
  }

  // In rows of a and out; in channels of its expert; in rows of b, and of its scales.
  DEVICE int token() const { return first_token + (SWAP ? tile_y * BY : tile_x * BX); }
  DEVICE int channel() const { return SWAP ? tile_x * BX : tile_y * BY; }
  DEVICE int weight_row(const Params& p) const { return (GROUPED ? group.expert * p.channels : 0) + channel(); }

  DEVICE bool advance() {
#if ROTATE
    // Else a cluster would keep its row in all bands whose height divides the number of clusters, and the same few of
    // them would get the short tiles at the end of every expert.
    if (wave + next >= whole) return false;
    place(wave + next);
    wave += step;
    if (++next == step) next = 0;
#else
    if (next >= whole) return false;
    place(next);
    next += step;
#endif
    return true;
  }

  // After the last whole tile: this CTA's part of one that remains.
  DEVICE bool advance_part() {
    const int index = next - whole;  // all tiles' first parts, then all second ones
    if (TAIL == 1 || index >= rest * parts) return false;
    const int part = index / rest;
    place(whole + index - part * rest);
    first = blocks * part / parts;
    last = blocks * (part + 1) / parts;
    return true;
  }

#if GROUPED
  DEVICE void place(int tile) {
    const int channel_tiles = SWAP ? count_x : count_y;
    find_group(group, groups, experts, channel_tiles, tile);
    const Place place = place_in_group(group, channel_tiles, GROUP, tile);
    first_token = group.first_token;
    end_token = group.end_token;
    tile_x = SWAP ? place.channel_tile : place.token_tile;
    tile_y = SWAP ? place.token_tile : place.channel_tile;
  }

  // All lanes of a warp have found the same tile; the compiler, which has to know it around a warpgroup MMA, cannot see
  // it in values that come from memory.
  DEVICE void settle() {
    tile_x = uniform(tile_x);
    tile_y = uniform(tile_y);
    first_token = uniform(first_token);
    end_token = uniform(end_token);
  }

  int experts;
#else
  DEVICE void settle() {}

  // Tiles go in bands of GROUP along X, and within a band along X first.
  DEVICE void place(int tile) {
    const int band = tile / (GROUP * count_y), within = tile - band * GROUP * count_y;
    const int height = min(GROUP, count_x - band * GROUP);
    tile_x = (band * GROUP + within % height) * CLUSTER_X + (CLUSTER_X > 1 ? rank : 0);
    tile_y = within / height;
  }
#endif
};
#endif

struct Ring {
  int stage = 0;
  u32 phase = 0;
  DEVICE void advance() {
    if (++stage == STAGES) {
      stage = 0;
      phase ^= 1;
    }
  }
};

struct Shared {
  u32 base;
  DEVICE u32 x(int stage) const { return base + stage * X_BYTES; }
  DEVICE u32 y(int stage) const { return base + OFFSET_Y + stage * Y_BYTES; }
  DEVICE u32 output() const { return base + OFFSET_OUTPUT; }
  DEVICE u32 received() const { return base + OFFSET_RECEIVED; }
  DEVICE u32 token_scale(int stage) const { return base + OFFSET_TOKEN_SCALE + stage * TOKEN_SCALE_STRIDE; }
  DEVICE u32 channel_scale(int stage) const { return base + OFFSET_CHANNEL_SCALE + stage * SPANS * 4; }
  DEVICE u32 full(int stage) const { return base + OFFSET_BARRIERS + 8 * stage; }
  DEVICE u32 empty(int stage) const { return base + OFFSET_BARRIERS + 8 * (STAGES + stage); }
  DEVICE u32 sums_ready() const { return base + OFFSET_BARRIERS + 16 * STAGES; }
  DEVICE u32 sums_read() const { return base + OFFSET_BARRIERS + 16 * STAGES + 8; }
  DEVICE u32 groups() const { return base + OFFSET_GROUPS; }
};

DEVICE float load_shared(u32 address) {
  float value;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(value) : "r"(address) : "memory");
  return value;
}

DEVICE float2 load_shared2(u32 address) {
  float2 v;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(v.x), "=f"(v.y) : "r"(address) : "memory");
  return v;
}

DEVICE float4 load_shared4(u32 address) {
  float4 v;
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
               : "r"(address)
               : "memory");
  return v;
}

DEVICE void store_shared(u32 address, float value) {
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(address), "f"(value) : "memory");
}

DEVICE void store_shared2(u32 address, float a, float b) {
  asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(address), "f"(a), "f"(b) : "memory");
}

// ---- producer: one thread, everything that the copy engine brings ----

DEVICE void load_x(const Params& p, const Shared& s, const Schedule& schedule, int stage, int block) {
  constexpr u64 policy = SWAP ? kEvictFirst : kEvictNormal;  // weights that few tokens use are read once
  const int row = SWAP ? schedule.weight_row(p) : schedule.token();
  tma_load(s.x(stage), &p.x, s.full(stage), block * BK, row, policy);
}

DEVICE void load_y(const Params& p, const Shared& s, const Schedule& schedule, int stage, int block) {
  constexpr int part = BY / CLUSTER_X;  // what this CTA fetches for all of its cluster
  const int row = schedule.rank * part, y = (SWAP ? schedule.token() : schedule.weight_row(p)) + row;
  if constexpr (CLUSTER_X > 1) {
    const u16 mask = (1 << CLUSTER_X) - 1;
    tma_load_multicast(s.y(stage) + row * BK, &p.y, s.full(stage), block * BK, y, mask, kEvictNormal);
  } else {
    tma_load(s.y(stage), &p.y, s.full(stage), block * BK, y, kEvictNormal);
  }
}

DEVICE void load_weights(const Params& p, const Shared& s, const Schedule& schedule, int stage, int block) {
  barrier_arrive_expect(s.full(stage), STAGE_BYTES);
  if constexpr (SWAP) {
    load_x(p, s, schedule, stage, block);
  } else {
    load_y(p, s, schedule, stage, block);
  }
}

DEVICE void load_tokens(const Params& p, const Shared& s, const Schedule& schedule, int stage, int block) {
  const int token = GROUPED ? schedule.token() & ~3 : schedule.token();
  if constexpr (!ROW) tma_load(s.token_scale(stage), &p.token_scale, s.full(stage), token, block, kEvictNormal);
  if constexpr (SWAP) {
    load_y(p, s, schedule, stage, block);
  } else {
    load_x(p, s, schedule, stage, block);
  }
}

DEVICE void load_tile(const Params& p, const Shared& s, const Schedule& schedule, Ring& ring, int block) {
  for (; block < schedule.last; ++block, ring.advance()) {
    barrier_wait(s.empty(ring.stage), ring.phase ^ 1);
    load_weights(p, s, schedule, ring.stage, block);
    load_tokens(p, s, schedule, ring.stage, block);
  }
}

DEVICE void produce_tiles(const Params& p, const Shared& s, Schedule schedule) {
  Ring ring;
  if (!schedule.advance() && !schedule.advance_part()) return;
  // The weights do not come from the kernel before this one: fill the ring with them before waiting for it.
  const int ahead = p.prefetch ? min(STAGES, schedule.last - schedule.first) : 0;
  for (int i = 0; i < ahead; ++i) load_weights(p, s, schedule, i, schedule.first + i);
  wait_for_previous_kernel();
  for (int i = 0; i < ahead; ++i, ring.advance()) load_tokens(p, s, schedule, i, schedule.first + i);
  load_tile(p, s, schedule, ring, schedule.first + ahead);
  while (schedule.advance()) load_tile(p, s, schedule, ring, schedule.first);
  if (TAIL > 1 && schedule.whole > blockIdx.x && schedule.advance_part()) {
    load_tile(p, s, schedule, ring, schedule.first);
  }
  // A CTA must outlive what the others of its cluster still send it: their last arrivals.
  if constexpr (CLUSTER_X > 1) {
    for (int i = 0; i < STAGES; ++i, ring.advance()) barrier_wait(s.empty(ring.stage), ring.phase ^ 1);
  }
}

// ---- scales of b: one warp; 32 blocks of K are fetched at once and handed out stage by stage ----

DEVICE void load_channel_scales(const Params& p, const Shared& s, const Schedule& schedule, Ring& ring) {
  const int lane = threadIdx.x % 32, rows = (p.channels + 127) / 128;
  const int channel = schedule.channel();
#if GROUPED
  const int first_row = schedule.group.expert * rows;
#else
  constexpr int first_row = 0;
#endif
  float scale[SPANS];
  for (int block = schedule.first; block < schedule.last; ++block, ring.advance()) {
    const int within = (block - schedule.first) % 32;
    if (within == 0) {
#pragma unroll
      for (int i = 0; i < SPANS; ++i) {
        const int row = (channel + i * SPAN) / 128;
        const bool inside = row < rows && block + lane < schedule.last;
        scale[i] = inside ? __ldg(p.b_scale + static_cast<long long>(first_row + row) * p.blocks + block + lane) : 0.f;
      }
    }
    barrier_wait(s.empty(ring.stage), ring.phase ^ 1);
#pragma unroll
    for (int i = 0; i < SPANS; ++i) {
      const float value = __shfl_sync(0xffffffff, scale[i], within);
      if (lane == 0) store_shared(s.channel_scale(ring.stage) + 4 * i, value);
    }
    if (lane == 0) barrier_arrive(s.full(ring.stage));
  }
}

DEVICE void produce_channel_scales(const Params& p, const Shared& s, Schedule schedule) {
  Ring ring;
  while (schedule.advance()) load_channel_scales(p, s, schedule, ring);
  if (schedule.advance_part()) load_channel_scales(p, s, schedule, ring);
}

// ---- math ----

// Where this thread stands in its warpgroup's fragments.
struct Position {
  int group, warp, lane;
  u32 scales;  // bytes from a stage's first scale of a token to that of this thread's first row (SWAP: column)
  DEVICE Position()
      : group(uniform(threadIdx.x / 128)), warp(uniform(threadIdx.x / 32 % 4)), lane(threadIdx.x % 32) {
    start(0);
  }
  // The copy engine began at a multiple of four tokens. One register holds all of it: the inner loop has none to spare.
  DEVICE void start(int first_token) {
    scales = 4 * (SWAP ? column(0) : row(0)) + 4 * (first_token & 3);
    asm volatile("" : "+r"(scales));
  }
  DEVICE int row(int wave) const { return (group * WAVES + wave) * 64 + warp * 16 + lane / 4; }  // and 8 below
  DEVICE int column(int j) const { return 8 * j + 2 * (lane % 4); }                              // and the next
};

// The scales that turn one temporary accumulator into its share of the final one.
struct Scales {
  float token[2];       // normal: of the two rows
  float channel[SPANS];

  DEVICE void load(const Shared& s, const Position& at, int stage, int wave) {
    if constexpr (ROW) {
      return;
    } else if constexpr (SWAP) {
      channel[0] = load_shared(s.channel_scale(stage) + 4 * ((at.group * WAVES + wave) * 64 / SPAN));
    } else {
      token[0] = load_shared(s.token_scale(stage) + at.scales + 256 * wave);
      token[1] = load_shared(s.token_scale(stage) + at.scales + 256 * wave + 32);
#pragma unroll
      for (int i = 0; i < SPANS; ++i) channel[i] = load_shared(s.channel_scale(stage) + 4 * i);
    }
  }
};

DEVICE void promote(float (&sum)[ACCUMULATORS], const float (&part)[ACCUMULATORS], const Scales& scales) {
  if constexpr (ROW) {
#pragma unroll
    for (int i = 0; i < ACCUMULATORS; ++i) sum[i] += part[i];
    return;
  }
#pragma unroll
  for (int j = 0; j < BY / 8; ++j) {
    const float upper = scales.token[0] * scales.channel[8 * j / SPAN];
    const float lower = scales.token[1] * scales.channel[8 * j / SPAN];
    sum[4 * j + 0] += upper * part[4 * j + 0];
    sum[4 * j + 1] += upper * part[4 * j + 1];
    sum[4 * j + 2] += lower * part[4 * j + 2];
    sum[4 * j + 3] += lower * part[4 * j + 3];
  }
}

// Swapped: the scale of the weights is one number, that of the tokens belongs to the column. `columns` are loaded
// before the stage is handed back.
struct ColumnScales {
  float2 value[BY / 8];
  DEVICE void load(const Shared& s, const Position& at, int stage) {
#pragma unroll
    for (int j = 0; j < BY / 8; ++j) {
      const u32 address = s.token_scale(stage) + at.scales + 32 * j;
      value[j] = GROUPED ? make_float2(load_shared(address), load_shared(address + 4)) : load_shared2(address);
    }
  }
};

DEVICE void promote_columns(float (&sum)[ACCUMULATORS], const float (&part)[ACCUMULATORS], float channel,
                            const ColumnScales& columns) {
#pragma unroll
  for (int j = 0; j < BY / 8; ++j) {
    const float left = channel * columns.value[j].x, right = channel * columns.value[j].y;
    sum[4 * j + 0] += left * part[4 * j + 0];
    sum[4 * j + 1] += right * part[4 * j + 1];
    sum[4 * j + 2] += left * part[4 * j + 2];
    sum[4 * j + 3] += right * part[4 * j + 3];
  }
}

DEVICE void multiply(float (&part)[ACCUMULATORS], const Shared& s, const Position& at, int stage, int wave) {
  const u32 x = descriptor_low(s.x(0)) + (stage * X_BYTES + (at.group * WAVES + wave) * 64 * BK) / 16;
  const u32 y = descriptor_low(s.y(0)) + stage * (Y_BYTES / 16);
  pin(part);
  wgmma_fence();
#pragma unroll
  for (int k = 0; k < BK / 32; ++k) wgmma(part, descriptor(x + 2 * k), descriptor(y + 2 * k), k > 0);
  wgmma_commit();
  pin(part);
}

// This warp no longer reads the stage: tell every CTA whose copies land in it. (All lanes have just waited for the MMA.)
DEVICE void release(const Shared& s, const Position& at, int stage) {
  if constexpr (CLUSTER_X == 1) {
    if (at.lane < ARRIVALS) barrier_arrive(s.empty(stage));
  } else if constexpr (ARRIVALS == 1) {
    if (at.lane < CLUSTER_X) barrier_arrive_cluster(s.empty(stage), at.lane);
  } else {
    for (int cta = 0; cta < CLUSTER_X; ++cta) barrier_arrive_cluster(s.empty(stage), cta);
  }
}

DEVICE void accumulate_one(float (&sum)[WAVES][ACCUMULATORS], const Shared& s, const Position& at, Ring& ring,
                           int blocks) {
  float part[ACCUMULATORS];
  for (int block = 0; block < blocks; ++block, ring.advance()) {
    barrier_wait(s.full(ring.stage), ring.phase);
#pragma unroll
    for (int wave = 0; wave < WAVES; ++wave) {
      Scales scales;
      scales.load(s, at, ring.stage, wave);
      multiply(part, s, at, ring.stage, wave);
      if constexpr (SWAP && !ROW) {
        ColumnScales columns;
        columns.load(s, at, ring.stage);
        wgmma_wait<0>();
        pin(part);
        if (wave == WAVES - 1) release(s, at, ring.stage);
        promote_columns(sum[wave], part, scales.channel[0], columns);
      } else {
        wgmma_wait<0>();
        pin(part);
        if (wave == WAVES - 1) release(s, at, ring.stage);
        promote(sum[wave], part, scales);
      }
    }
  }
}

// The same for whole rings: addresses are constants then, which leaves little but the MMAs and the sums.
DEVICE void accumulate_rings(float (&sum)[WAVES][ACCUMULATORS], const Shared& s, const Position& at, Ring& ring,
                             int blocks) {
  float part[ACCUMULATORS];
  for (int block = 0; block < blocks; block += STAGES) {
#pragma unroll
    for (int stage = 0; stage < STAGES; ++stage) {
      barrier_wait(s.full(stage), ring.phase);
#pragma unroll
      for (int wave = 0; wave < WAVES; ++wave) {
        Scales scales;
        scales.load(s, at, stage, wave);
        multiply(part, s, at, stage, wave);
        wgmma_wait<0>();
        pin(part);
        if (wave == WAVES - 1) release(s, at, stage);
        promote(sum[wave], part, scales);
      }
    }
    ring.phase ^= 1;
  }
}

// One block of K in flight ahead of the one that is promoted. The two accumulators have fixed names: registers cannot
// be indexed at run time.
DEVICE void accumulate_two(float (&sum)[WAVES][ACCUMULATORS], const Shared& s, const Position& at, Ring& ring,
                           int blocks) {
  float even[ACCUMULATORS], odd[ACCUMULATORS];
  Scales even_scales, odd_scales;
  auto start = [&](float(&part)[ACCUMULATORS], Scales& scales, const Ring& at_ring) {
    barrier_wait(s.full(at_ring.stage), at_ring.phase);
    scales.load(s, at, at_ring.stage, 0);
    multiply(part, s, at, at_ring.stage, 0);
  };
  Ring ahead = ring;
  start(even, even_scales, ahead);
  ahead.advance();
  int block = 0;
  for (; block + 2 < blocks; block += 2) {
    start(odd, odd_scales, ahead);
    ahead.advance();
    wgmma_wait<1>();
    pin(even);
    release(s, at, ring.stage);
    ring.advance();
    promote(sum[0], even, even_scales);
    start(even, even_scales, ahead);
    ahead.advance();
    wgmma_wait<1>();
    pin(odd);
    release(s, at, ring.stage);
    ring.advance();
    promote(sum[0], odd, odd_scales);
  }
  if (block + 1 < blocks) {
    start(odd, odd_scales, ahead);
    wgmma_wait<1>();
    pin(even);
    release(s, at, ring.stage);
    ring.advance();
    promote(sum[0], even, even_scales);
    wgmma_wait<0>();
    pin(odd);
    release(s, at, ring.stage);
    ring.advance();
    promote(sum[0], odd, odd_scales);
  } else {
    wgmma_wait<0>();
    pin(even);
    release(s, at, ring.stage);
    ring.advance();
    promote(sum[0], even, even_scales);
  }
}

// ---- output ----

#if OUTPUT == 2
using Half = Float16;
#else
using Half = BFloat16;
#endif

DEVICE float load_bias(const Params& p, int channel) {
  if (BIAS == 0 || channel >= p.channels) return 0.f;
  if constexpr (BIAS == 1) return __ldg(static_cast<const float*>(p.bias) + channel);
  const u16 bits = __ldg(static_cast<const u16*>(p.bias) + channel);
  return BIAS == 3 ? Float16::unpack(bits) : BFloat16::unpack(bits);
}

// ROW: the scale of a row of a, and of a channel in the tile's weight.
DEVICE float row_scale(const Params& p, int token) {
#if ROW
  return token < p.tokens ? __ldg(p.a_scale + token) : 0.f;
#else
  return 1.f;
#endif
}

DEVICE float channel_scale(const Params& p, const Schedule& schedule, int channel) {
  if (!ROW || channel >= p.channels) return ROW ? 0.f : 1.f;
  return __ldg(p.b_scale + (schedule.weight_row(p) - schedule.channel()) + channel);
}

// The CTAs that split K send each other the accumulators that they do not own; the owner adds all parts in the order
// of their ranks. Every CTA holds the same fragment layout, so parts travel register by register.
DEVICE void exchange(const Shared& s, const Position& at, u32 rank, const float (&sum)[WAVES][ACCUMULATORS],
                     float (&own)[WAVES][SHARE], u32& phase) {
  barrier_wait(s.sums_read(), phase ^ 1);
  if (threadIdx.x == 0) barrier_arrive_expect(s.sums_ready(), RECEIVED_BYTES);
  auto place = [&](u32 slot, int wave, int i) {
    return s.received() + (((slot * WAVES + wave) * SHARE + i) * MATH_THREADS + threadIdx.x * 4) * 4;
  };
#pragma unroll
  for (int owner = 0; owner < SPLIT; ++owner) {
    if (owner == rank) continue;
    const u32 barrier = cluster_address(s.sums_ready(), owner);
#pragma unroll
    for (int i = 0; i < WAVES * SHARE; i += 4) {
      const float* v = sum[i / SHARE] + owner * SHARE + i % SHARE;
      const u32 target = cluster_address(place(rank < owner ? rank : rank - 1, i / SHARE, i % SHARE), owner);
      store_cluster_async(target, barrier, v[0], v[1], v[2], v[3]);
    }
  }
  barrier_wait(s.sums_ready(), phase);
#pragma unroll
  for (int i = 0; i < WAVES * SHARE; i += 4) {
    float4 total = {0.f, 0.f, 0.f, 0.f}, mine = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
    for (int owner = 0; owner < SPLIT; ++owner) {
      const float* v = sum[i / SHARE] + owner * SHARE + i % SHARE;
      if (owner == rank) mine = {v[0], v[1], v[2], v[3]};
    }
#pragma unroll
    for (int part = 0; part < SPLIT; ++part) {
      const float4 v = part == rank ? mine : load_shared4(place(part < rank ? part : part - 1, i / SHARE, i % SHARE));
      total.x += v.x;
      total.y += v.y;
      total.z += v.z;
      total.w += v.w;
    }
    float* result = own[i / SHARE] + i % SHARE;
    result[0] = total.x;
    result[1] = total.y;
    result[2] = total.z;
    result[3] = total.w;
  }
  __syncwarp();
  if constexpr (ARRIVALS == 1) {
    if (at.lane < SPLIT && at.lane != rank) barrier_arrive_cluster(s.sums_read(), at.lane);
  } else {
    for (int cta = 0; cta < SPLIT; ++cta) {
      if (cta != rank) barrier_arrive_cluster(s.sums_read(), cta);
    }
  }
  phase ^= 1;
}

// TAIL, STREAM: the sums of a tile that another CTA owns go to global memory, register by register.
DEVICE void hand_over(const Params& p, const Position& at, const float (&sum)[WAVES][ACCUMULATORS]) {
  float4* place = reinterpret_cast<float4*>(p.partials) + blockIdx.x * (BX * BY / 4) + threadIdx.x;
#pragma unroll
  for (int i = 0; i < WAVES * ACCUMULATORS; i += 4) {
    const float* v = sum[i / ACCUMULATORS] + i % ACCUMULATORS;
    __stcg(place + i / 4 * MATH_THREADS, make_float4(v[0], v[1], v[2], v[3]));
  }
  __threadfence();
  named_barrier_sync(4 + at.group, 128);
  if (threadIdx.x % 128 == 0) flag_set(p.flags + blockIdx.x * MATH_GROUPS + at.group);
}

// Adds what another CTA handed over.
DEVICE void collect_part(const Params& p, const Position& at, int cta, float (&sum)[WAVES][ACCUMULATORS]) {
  if (at.warp == 0) flag_take(p.flags + cta * MATH_GROUPS + at.group);
  named_barrier_sync(4 + at.group, 128);
  const float4* place = reinterpret_cast<const float4*>(p.partials) + cta * (BX * BY / 4) + threadIdx.x;
#pragma unroll
  for (int i = 0; i < WAVES * ACCUMULATORS; i += 4) {
    const float4 v = __ldcg(place + i / 4 * MATH_THREADS);
    float* total = sum[i / ACCUMULATORS] + i % ACCUMULATORS;
    total[0] += v.x;
    total[1] += v.y;
    total[2] += v.z;
    total[3] += v.w;
  }
}

// The owner of a tile adds the parts that other CTAs computed, in their order.
DEVICE void collect(const Params& p, const Schedule& schedule, const Position& at, float (&sum)[WAVES][ACCUMULATORS]) {
#if STREAM
  const int end = schedule.end_of_tile(), lanes = schedule.lanes, workers = gridDim.x / lanes;
  for (int worker = schedule.worker + 1; worker < workers && schedule.begin_of(worker) < end; ++worker) {
    collect_part(p, at, blockIdx.x + (worker - schedule.worker) * lanes, sum);
  }
#else
  for (int part = 1; part < schedule.parts; ++part) {
    collect_part(p, at, blockIdx.x + part * schedule.rest, sum);
  }
#endif
}

// The rows of a piece before `end`, by the threads of a group.
DEVICE void store_rows(const Params& p, const Position& at, u32 buffer, int x, int y, int end) {
  constexpr int chunks = PIECE_COLUMNS / 8;
  for (int i = at.warp * 32 + at.lane; i < 64 * chunks; i += 128) {
    const int row = i / chunks, chunk = i % chunks, channel = y + 8 * chunk;
    const u32 swizzle = PIECE_COLUMNS == 64 ? row % 8 : PIECE_COLUMNS == 32 ? row / 2 % 4 : row / 4 % 2;
    if (x + row >= end || channel >= p.channels) continue;
    const float4 v = load_shared4(buffer + row * PIECE_COLUMNS * 2 + ((chunk ^ swizzle) << 4));
    *reinterpret_cast<float4*>(static_cast<u16*>(p.out) + (x + row) * p.out_stride + channel) = v;
  }
}

// 16-bit output, not swapped: each group moves its 64-row blocks through a ring of swizzled pieces. `column` is the
// first column of `sum` in the output.
DEVICE void store_pieces(const Params& p, const Shared& s, const Position& at, const Schedule& schedule, int column,
                         const float (&sum)[WAVES][SHARE], int& piece) {
  constexpr int chunks = PIECE_COLUMNS / 8, pieces = SHARE_Y / PIECE_COLUMNS;
  const int row = at.warp * 16 + at.lane % 16;
  const u32 swizzle = PIECE_COLUMNS == 64 ? at.lane % 8 : PIECE_COLUMNS == 32 ? at.lane / 2 % 4 : at.lane / 4 % 2;
  const bool leader = at.warp == 0 && at.lane == 0;
#pragma unroll
  for (int wave = 0; wave < WAVES; ++wave) {
    const int first = schedule.token() + at.row(wave);
    const float scales[2] = {row_scale(p, first), row_scale(p, first + 8)};
#pragma unroll
    for (int part = 0; part < pieces; ++part) {
      const u32 buffer = s.output() + (at.group * PIECES + piece) * PIECE_BYTES;
      if (leader) tma_store_wait_read<PIECES - 1>();
      named_barrier_sync(4 + at.group, 128);
#pragma unroll
      for (int chunk = 0; chunk < chunks; chunk += 2) {
        const int j = part * chunks + chunk;
        u32 packed[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float left = sum[wave][4 * j + 2 * i], right = sum[wave][4 * j + 2 * i + 1];
          if constexpr (ROW) {
            left *= scales[i % 2] * channel_scale(p, schedule, column + at.column(j + i / 2));
            right *= scales[i % 2] * channel_scale(p, schedule, column + at.column(j + i / 2) + 1);
          }
          if constexpr (BIAS) {
            left += load_bias(p, column + at.column(j + i / 2));
            right += load_bias(p, column + at.column(j + i / 2) + 1);
          }
          packed[i] = Half::pack(left, right);
        }
        const u32 address = buffer + row * PIECE_COLUMNS * 2 + (((chunk + at.lane / 16) ^ swizzle) << 4);
        store_matrix_x4(address, packed[0], packed[1], packed[2], packed[3]);
      }
      async_proxy_fence();
      named_barrier_sync(4 + at.group, 128);
      const int x = schedule.token() + (at.group * WAVES + wave) * 64;
      const int y = column + part * PIECE_COLUMNS;
      const bool cut = GROUPED && x + 64 > schedule.end_token;  // the rows that follow are another expert's
      if (cut) store_rows(p, at, buffer, x, y, schedule.end_token);
      if (leader) {
        if (!cut && x < p.tokens && y < p.channels) tma_store(&p.output, buffer, y, x);
        tma_store_commit();  // of a cut piece an empty group: they are counted
      }
      piece = piece + 1 == PIECES ? 0 : piece + 1;
    }
  }
}

DEVICE void write_sums(const Shared& s, const Position& at, const float (&sum)[WAVES][SHARE]) {
#pragma unroll
  for (int wave = 0; wave < WAVES; ++wave) {
#pragma unroll
    for (int j = 0; j < SHARE_Y / 8; ++j) {
      const float* v = sum[wave] + 4 * j;
      const int row = at.row(wave), column = at.column(j);
      if constexpr (SWAP) {
        store_shared(s.output() + 4 * (column * TILE_STRIDE + row), v[0]);
        store_shared(s.output() + 4 * ((column + 1) * TILE_STRIDE + row), v[1]);
        store_shared(s.output() + 4 * (column * TILE_STRIDE + row + 8), v[2]);
        store_shared(s.output() + 4 * ((column + 1) * TILE_STRIDE + row + 8), v[3]);
      } else {
        store_shared2(s.output() + 4 * (row * TILE_STRIDE + column), v[0], v[1]);
        store_shared2(s.output() + 4 * ((row + 8) * TILE_STRIDE + column), v[2], v[3]);
      }
    }
  }
}

DEVICE void store_element(const Params& p, long long index, int channel, float value) {
  value += load_bias(p, channel);
#if OUTPUT == 0
  float* out = static_cast<float*>(p.out) + index;
  *out = ACCUMULATE ? *out + value : value;
#else
  u16* out = static_cast<u16*>(p.out) + index;
  if (ACCUMULATE) value += Half::unpack(*out);
  *out = static_cast<u16>(Half::pack(value, 0.f));
#endif
}

DEVICE void store_vector(const Params& p, long long index, int channel, float4 v) {
#if OUTPUT == 0
  constexpr bool vector = false;
#else
  constexpr bool vector = !ACCUMULATE;
#endif
  if constexpr (vector) {
    if (channel + 4 <= p.channels && (p.out_stride % 4) == 0) {
      uint2 packed;
      packed.x = Half::pack(v.x + load_bias(p, channel), v.y + load_bias(p, channel + 1));
      packed.y = Half::pack(v.z + load_bias(p, channel + 2), v.w + load_bias(p, channel + 3));
      *reinterpret_cast<uint2*>(static_cast<u16*>(p.out) + index) = packed;
      return;
    }
  }
  if (channel + 0 < p.channels) store_element(p, index + 0, channel + 0, v.x);
  if (channel + 1 < p.channels) store_element(p, index + 1, channel + 1, v.y);
  if (channel + 2 < p.channels) store_element(p, index + 2, channel + 2, v.z);
  if (channel + 3 < p.channels) store_element(p, index + 3, channel + 3, v.w);
}

// Any output, through a float32 tile in shared memory; `y` is the first column of `sum` on the Y side.
DEVICE void store_tile(const Params& p, const Shared& s, const Position& at, const Schedule& schedule, int y,
                       const float (&sum)[WAVES][SHARE]) {
  named_barrier_sync(3, MATH_THREADS);
  write_sums(s, at, sum);
  named_barrier_sync(3, MATH_THREADS);
  constexpr int vectors = TILE_CHANNELS / 4;
  const int token0 = SWAP ? schedule.first_token + y : schedule.token(), channel0 = SWAP ? schedule.channel() : y;
  for (int i = threadIdx.x; i < TILE_TOKENS * vectors; i += MATH_THREADS) {
    const int row = i / vectors, column = i % vectors * 4;
    const int token = token0 + row, channel = channel0 + column;
    if (token >= schedule.end_token || channel >= p.channels) continue;
    float4 v = load_shared4(s.output() + 4 * (row * TILE_STRIDE + column));
    if constexpr (ROW) {
      const float scale = row_scale(p, token);
      v.x *= scale * channel_scale(p, schedule, channel);
      v.y *= scale * channel_scale(p, schedule, channel + 1);
      v.z *= scale * channel_scale(p, schedule, channel + 2);
      v.w *= scale * channel_scale(p, schedule, channel + 3);
    }
    store_vector(p, token * p.out_stride + channel, channel, v);
  }
}

// A group whose rows are all beyond the end (of the expert, or of a) has nothing to multiply.
DEVICE void pass(const Shared& s, const Position& at, Ring& ring, int blocks) {
  for (int block = 0; block < blocks; ++block, ring.advance()) {
    barrier_wait(s.full(ring.stage), ring.phase);
    release(s, at, ring.stage);
  }
}

DEVICE void compute_sums(const Shared& s, const Position& at, const Schedule& schedule, Ring& ring,
                         float (&sum)[WAVES][ACCUMULATORS]) {
#pragma unroll
  for (int i = 0; i < WAVES * ACCUMULATORS; ++i) sum[i / ACCUMULATORS][i % ACCUMULATORS] = 0.f;
  const int blocks = uniform(schedule.last - schedule.first);
  const int first_token = schedule.token() + at.group * WAVES * 64;
  if (!SWAP && MATH_GROUPS > 1 && first_token >= schedule.end_token) {
    pass(s, at, ring, blocks);
  } else if constexpr (UNROLL) {
    accumulate_rings(sum, s, at, ring, blocks);
  } else if constexpr (TEMPS == 1) {
    accumulate_one(sum, s, at, ring, blocks);
  } else {
    accumulate_two(sum, s, at, ring, blocks);
  }
}

// Without SPLIT a CTA's share is everything; the compiler makes this a renaming.
DEVICE void take_all(const float (&sum)[WAVES][ACCUMULATORS], float (&own)[WAVES][SHARE]) {
#pragma unroll
  for (int i = 0; i < WAVES * SHARE; ++i) own[i / SHARE][i % SHARE] = sum[i / SHARE][i % SHARE];
}

DEVICE void store_sums(const Params& p, const Shared& s, const Position& at, const Schedule& schedule, u32 rank,
                       const float (&sum)[WAVES][SHARE], int& piece) {
  const int y = schedule.tile_y * BY + (SPLIT > 1 ? static_cast<int>(rank) * SHARE_Y : 0);
  if constexpr (OUTPUT_TMA) {
    store_pieces(p, s, at, schedule, y, sum, piece);
  } else {
    store_tile(p, s, at, schedule, y, sum);
  }
}

DEVICE void compute_tiles(const Params& p, const Shared& s, Schedule schedule, u32 rank) {
  Position at;
  Ring ring;
  int piece = 0;
  u32 phase = 0;
  bool first = true;
  while (schedule.advance()) {
    schedule.settle();
    if (GROUPED) at.start(schedule.first_token);
    float sum[WAVES][ACCUMULATORS];
    compute_sums(s, at, schedule, ring, sum);
    if (first) wait_for_previous_kernel();  // it may still read what lies where the output goes
    first = false;
    if (STREAM && schedule.first > 0) {
      hand_over(p, at, sum);
      continue;
    }
    if (STREAM && schedule.last < schedule.blocks) collect(p, schedule, at, sum);
    float own[WAVES][SHARE];
    if constexpr (SPLIT > 1) {
      exchange(s, at, rank, sum, own, phase);
    } else {
      take_all(sum, own);
    }
    store_sums(p, s, at, schedule, rank, own, piece);
  }
  // Not part of the loop above: the compiler would no longer see there that all lanes of a warp do the same.
  if constexpr (TAIL > 1) {
    if (schedule.advance_part()) {
      float sum[WAVES][ACCUMULATORS];
      compute_sums(s, at, schedule, ring, sum);
      wait_for_previous_kernel();
      if (schedule.first > 0) {
        hand_over(p, at, sum);
      } else {
        float own[WAVES][SHARE];
        collect(p, schedule, at, sum);
        take_all(sum, own);
        store_sums(p, s, at, schedule, rank, own, piece);
      }
    }
  }
  if constexpr (SPLIT > 1) barrier_wait(s.sums_read(), phase ^ 1);  // the last arrivals of the others are in
  if (OUTPUT_TMA && at.warp == 0 && at.lane == 0) tma_store_wait<0>();
}

// ---- the kernel: math groups first, then the producer group ----

extern "C" __global__ void __launch_bounds__(MATH_THREADS + 128, 1)
    gemm_fp8_block(const __grid_constant__ Params p) {
  extern __shared__ __align__(1024) unsigned char memory[];
  const Shared s{shared_address(memory)};
  const u32 rank = CLUSTER > 1 ? cluster_rank() : 0;
  const int warp = uniform(threadIdx.x / 32);

  if (warp == MATH_WARPS && threadIdx.x % 32 == 0) {
    prefetch_tensor_map(&p.x);
    prefetch_tensor_map(&p.y);
    if (!ROW) prefetch_tensor_map(&p.token_scale);
    if (OUTPUT_TMA) prefetch_tensor_map(&p.output);
    for (int stage = 0; stage < STAGES; ++stage) {
      barrier_init(s.full(stage), ROW ? 1 : 2);
      barrier_init(s.empty(stage), MATH_WARPS * ARRIVALS * CLUSTER_X);
    }
    if constexpr (SPLIT > 1) {
      barrier_init(s.sums_ready(), 1);
      barrier_init(s.sums_read(), MATH_WARPS * ARRIVALS * (SPLIT - 1));
    }
    barrier_init_fence();
  }
  if constexpr (CLUSTER > 1) {
    cluster_sync_relaxed();  // the barriers exist before another CTA uses them
  } else {
    __syncthreads();
  }
  let_next_kernel_start();
  if (!p.prefetch) wait_for_previous_kernel();
#if GROUPED
  if (warp == MATH_WARPS) locate_groups<TOKENS>(p.counts, p.experts, s.groups());
  __syncthreads();
#endif

  const Schedule schedule(p, rank, s.groups());
  if (warp >= MATH_WARPS) {
    if constexpr (MATH_GROUPS > 1) registers_decrease<MATH_GROUPS == 2 ? 40 : 32>();
    if (warp == MATH_WARPS && threadIdx.x % 32 == 0) produce_tiles(p, s, schedule);
    if (!ROW && warp == MATH_WARPS + 1) produce_channel_scales(p, s, schedule);
    __syncwarp();
  } else {
    if constexpr (MATH_GROUPS > 1) registers_increase<MATH_GROUPS == 2 ? 232 : 160>();
    compute_tiles(p, s, schedule, rank);
  }
}
