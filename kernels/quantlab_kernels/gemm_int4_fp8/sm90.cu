// out[M, N] = x @ (w * w_scale)^T for Hopper: INT4 weights in groups of 128 along K, E4M3 or 16-bit activations.
//
// The transposed product is computed: 64 rows of the weight fill the M side of a warpgroup MMA, tokens are its N side,
// from 16 of them to 128. Weights take the MMA's register operand: a math warpgroup reads its 4096 bytes of a tile
// (`common/int4.py` says where which code lies), turns them into 8-bit or 16-bit numbers with a few integer operations
// and multiplies 128 of K into a temporary accumulator. That is added to the final one in FP32, times the scales of its
// rows ("promotion"), so group scales are exact and no sum stays longer than 128 of K in the tensor core.
//
// A few producer threads keep a ring of stages full through the copy engine. CTAs are persistent. The first `streamed`
// tiles are one long row of K blocks that is cut evenly among the CTAs (stream-K): a CTA begins with the end of a tile,
// whose sums it hands over at once, and ends with the beginning of one, whose owner it is. What an owner waits for was
// computed first, and it adds the parts in a fixed order. The tiles that follow are given out whole.
//
// With SPLIT the CTAs of a cluster share the K of one tile instead, and the first of them adds up what the others write
// into its shared memory: sooner there than through global memory, for which few tokens would have to wait.
//
// Compiled once per configuration, with these macros:
//   X           activations: 0 E4M3, 1 bfloat16, 2 float16
//   GROUPED     1: activations have a scale for each 128 of K; 0: one for each token (E4M3), or none
//   TOKEN_SCALES  GROUPED: bytes for the scales of one tile's tokens, all of K, which are then copied at once; 0: a stage
//               brings its own. Few tokens have so few scales that all CTAs would ask for the same lines all the time
//   ROW_GROUPS  math warpgroups side by side along the rows of the weight;   BX = 64 * ROW_GROUPS
//   K_GROUPS    math warpgroups that share the same rows and take K blocks in turns
//   BY          tokens in a tile, a multiple of 16
//   PARTS       1, or how many MMAs share a block's codes, each for BY / PARTS tokens, an even number: two of them are
//               always under way, so that decoding and promotion hide behind products, and a code is decoded for more tokens
//   STAGES      length of the ring;   SHARED  bytes of dynamic shared memory that the launch provides
//   PREFETCH    1: the next block's codes are read while the MMA of this one runs
//   EARLY       GROUPED: 1, the scales of tokens are read while the MMA runs
//   SCALE       of the weight: 0 float32, 1 bfloat16, 2 float16;  OUTPUT the same;  BIAS 0 none, else 1 + the same
//   OUTPUT_TMA  1: 16-bit tiles leave through the copy engine; 0: from registers
//   BAND        tiles of rows (EXPERTS: of tokens) that are walked together for the sake of the L2 cache
//   SPLIT       CTAs of a cluster, each with a part of the K of a tile; a CTA has one tile then
//   EXPERTS     1: rows of x are sorted by expert and the weight is one [N, K] for each; how many rows an expert has is
//               read from device memory. Tiles are whole, and leave row by row: the next rows are another expert's
#include "experts.cuh"
#include "sm90.cuh"
#include "wgmma.cuh"

constexpr int BK = 128;  // elements of K in a stage = length of a scale group
constexpr int BX = 64 * ROW_GROUPS;
constexpr int MATH_GROUPS = ROW_GROUPS * K_GROUPS;
constexpr int MATH_THREADS = 128 * MATH_GROUPS;
constexpr int THREADS = MATH_THREADS + 128;
// Where an even share of the registers is too little, the producers give some of theirs to the math groups.
constexpr int EVEN_REGISTERS = MATH_GROUPS == 1 ? 255 : MATH_GROUPS == 2 ? 168 : MATH_GROUPS == 3 ? 128 : 96;
constexpr int PRODUCTS = PARTS > 1 ? 2 : 1;  // under way at a time
constexpr bool MOVE_REGISTERS =
    BY / 2 + PRODUCTS * (BY / PARTS / 2 + (X == 0 ? 16 : 32)) + 8 * PREFETCH + 32 > EVEN_REGISTERS;
constexpr int PRODUCER_REGISTERS = MATH_GROUPS == 2 ? 40 : 32;
constexpr int MATH_REGISTERS = MATH_GROUPS == 2 ? 232 : MATH_GROUPS == 3 ? 160 : 112;
constexpr int PANELS = X == 0 ? 1 : 2;      // a stage's activations lie in panels of 128 bytes along K
constexpr int STEP = X == 0 ? 32 : 16;      // of K in one MMA
constexpr int STEPS = BK / STEP;
constexpr int PART = BY / PARTS;            // tokens of one MMA
constexpr int ACCUMULATORS = BY / 2;        // registers of one thread
constexpr int SCALE_SIZE = SCALE == 0 ? 4 : 2;

DEVICE constexpr int round_up(int a, int b) { return (a + b - 1) / b * b; }
constexpr int TILE_BYTES = 64 * BK / 2;  // of codes
constexpr int PANEL_BYTES = BY * 128;
constexpr int ROW_SCALE_BYTES = BX * SCALE_SIZE;
// The copy engine starts a row of scales at a multiple of 16 bytes, the rows of an expert at any token: up to 3 too many.
constexpr int TOKEN_SCALE_BYTES = GROUPED && !TOKEN_SCALES ? (BY + 4 * EXPERTS) * 4 : 0;
constexpr int TOKENS_BYTES = PANELS * PANEL_BYTES + TOKEN_SCALE_BYTES;
constexpr int OUTPUT_BYTES = OUTPUT_TMA ? ROW_GROUPS * PANEL_BYTES : 0;       // [tokens][64] of 16 bits for each group
constexpr int REDUCED_BYTES = (K_GROUPS - 1) * BX * BY * 4;
constexpr int RECEIVED_BYTES = (SPLIT - 1) * BX * BY * 4;

constexpr int OFFSET_OUTPUT = STAGES * PANELS * PANEL_BYTES;
constexpr int OFFSET_CODES = OFFSET_OUTPUT + OUTPUT_BYTES;
constexpr int OFFSET_ROW_SCALE = OFFSET_CODES + STAGES * ROW_GROUPS * TILE_BYTES;
constexpr int OFFSET_TOKEN_SCALE = OFFSET_ROW_SCALE + STAGES * ROW_SCALE_BYTES;
constexpr int TOKEN_SCALE_STRIDE = round_up(TOKEN_SCALE_BYTES, 128);
constexpr int OFFSET_REDUCED = OFFSET_TOKEN_SCALE + STAGES * TOKEN_SCALE_STRIDE + TOKEN_SCALES;
constexpr int OFFSET_RECEIVED = OFFSET_REDUCED + REDUCED_BYTES;
constexpr int OFFSET_BARRIERS = OFFSET_RECEIVED + RECEIVED_BYTES;
constexpr int OFFSET_GROUPS = OFFSET_BARRIERS + 16 * STAGES + 16;
constexpr int SHARED_BYTES = OFFSET_GROUPS + EXPERTS * GROUPS_BYTES;
static_assert(SHARED_BYTES == SHARED, "the host allocates what is laid out here");
static_assert(BY % 16 == 0, "tiles leave in pairs of eight tokens");
static_assert(PARTS == 1 || (PARTS % 2 == 0 && PART % 8 == 0 && BY % PARTS == 0), "products take turns");
static_assert(PARTS == 1 || (K_GROUPS == 1 && !GROUPED), "a group takes every block, its tokens have one scale each");
static_assert(SPLIT == 1 || !EXPERTS, "tiles of experts belong to single CTAs");
// A group that waits for a stage must have waited for that stage's last contents too: copies may end out of order, and
// the parity of a barrier does not tell a phase from the one before the last.
static_assert(STAGES % K_GROUPS == 0, "groups that take K blocks in turns keep to their stages");

struct Params {
  TensorMap x, row_scale, token_scale, output;
  const unsigned char* codes;  // [ceil(N / 64), K / 128, 4096]
  const float* token_scale_of;  // [M], without GROUPED; with TOKEN_SCALES [K / 128, M rounded up to 4]
  const void* bias;             // [N]
  void* out;                    // [M, N], rows out_stride elements apart
  long long out_stride;
  float* partials;  // a tile of every CTA
  u32* flags;       // one of every row group of every CTA; 0 between launches
  int tokens, rows, blocks;  // M, N, K / 128
  int streamed;              // tiles that are cut along K; each CTA has `share` blocks of them,
  int share, longer;         // the first `longer` CTAs one more
  int prefetch;              // 1: weights may be loaded while the kernel before this one still runs
#if EXPERTS
  const long long* counts;  // [experts] rows of each
  int experts;
#endif
};

// What every role walks through in the same order: pieces of tiles, the range of K of each. Written without branches, and
// with its divisions where every lane surely is: then the compiler sees that all lanes of a warp agree, and keeps the
// inner loop in uniform registers.
struct Schedule {
  int count_x, count_y, blocks, tiles, share, longer;
  int part_tile, part_first, left, next;  // the rest of this CTA's share of the streamed tiles; the whole tile after it
  int tile_x, tile_y, tile, first, last;
  int first_token = 0, end_token;
#if EXPERTS
  int experts;
  u32 groups;
  Group group;
#endif

  DEVICE Schedule(const Params& p, u32 shared_groups)
      : blocks(p.blocks), share(p.share), longer(p.longer), end_token(p.tokens) {
    count_x = (p.rows + BX - 1) / BX;
#if EXPERTS
    experts = p.experts;
    groups = shared_groups;
    count_y = (p.tokens + BY * experts - 1) / (BY * experts);  // of an expert, were rows spread evenly
    tiles = uniform(count_tiles(groups, experts)) * count_x;
#else
    count_y = (p.tokens + BY - 1) / BY;
    tiles = count_x * count_y;
#endif
    const int begin = begin_of(blockIdx.x);
    left = begin_of(blockIdx.x + 1) - begin;
    part_tile = uniform(begin / blocks);
    part_first = begin - part_tile * blocks;
    next = p.streamed + blockIdx.x / SPLIT;
  }

  // Where a CTA's share of the streamed tiles begins, counted in K blocks.
  DEVICE int begin_of(int cta) const { return cta * share + min(cta, longer); }

  DEVICE bool advance() {
    const bool part = left > 0;
    if (!part && next >= tiles) return false;
    tile = part ? part_tile : next;
    const int rank = blockIdx.x % SPLIT;
    first = part ? part_first : blocks * rank / SPLIT;
    last = part ? min(blocks, first + left) : blocks * (rank + 1) / SPLIT;
    left -= part ? last - first : 0;
    next += part ? 0 : gridDim.x / SPLIT;
    ++part_tile;
    part_first = 0;
    place();
    return true;
  }

#if EXPERTS
  DEVICE void place() {
    find_group(group, groups, experts, count_x, tile);
    const Place place = place_in_group(group, count_x, BAND, tile);
    first_token = group.first_token;
    end_token = group.end_token;
    tile_x = place.channel_tile;
    tile_y = place.token_tile;
  }

  // All lanes of a warp have found the same tile; the compiler, which has to know it around a warpgroup MMA, cannot see
  // it in values that come from memory.
  DEVICE void settle() {
    tile_x = uniform(tile_x);
    tile_y = uniform(tile_y);
    first_token = uniform(first_token);
    end_token = uniform(end_token);
  }

  DEVICE int expert() const { return group.expert; }
#else
  // Bands of BAND tiles of rows; within a band along the rows first, so that CTAs that run at once share tokens.
  DEVICE void place() {
    const int band = tile / (BAND * count_y), within = tile - band * BAND * count_y;
    const int height = min(BAND, count_x - band * BAND);
    tile_x = band * BAND + within % height;
    tile_y = within / height;
  }

  DEVICE void settle() {}
  DEVICE int expert() const { return 0; }
#endif

  DEVICE int row() const { return tile_x * BX; }
  DEVICE int token() const { return first_token + tile_y * BY; }
};

struct Ring {
  int stage = 0;
  u32 phase = 0;
  DEVICE void skip(int count) {
    stage += count;
    if (stage >= STAGES) {
      stage -= STAGES;
      phase ^= 1;
    }
  }
  DEVICE void skip_many(int count) {
    stage += count;
    phase ^= stage / STAGES & 1;
    stage %= STAGES;
  }
};

struct Shared {
  u32 base;
  DEVICE u32 x(int stage) const { return base + stage * PANELS * PANEL_BYTES; }
  DEVICE u32 output(int group) const { return base + OFFSET_OUTPUT + group * PANEL_BYTES; }
  DEVICE u32 codes(int stage) const { return base + OFFSET_CODES + stage * ROW_GROUPS * TILE_BYTES; }
  DEVICE u32 row_scale(int stage) const { return base + OFFSET_ROW_SCALE + stage * ROW_SCALE_BYTES; }
  DEVICE u32 token_scale(int stage) const { return base + OFFSET_TOKEN_SCALE + stage * TOKEN_SCALE_STRIDE; }
  DEVICE u32 reduced() const { return base + OFFSET_REDUCED; }
  DEVICE u32 full(int stage) const { return base + OFFSET_BARRIERS + 8 * stage; }
  DEVICE u32 empty(int stage) const { return base + OFFSET_BARRIERS + 8 * (STAGES + stage); }
  DEVICE u32 received() const { return base + OFFSET_RECEIVED; }
  DEVICE u32 sums_ready() const { return base + OFFSET_BARRIERS + 16 * STAGES; }
  DEVICE u32 scales_ready() const { return base + OFFSET_BARRIERS + 16 * STAGES + 8; }
  DEVICE u32 groups() const { return base + OFFSET_GROUPS; }
};

DEVICE uint4 load_shared_u4(u32 address) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(address)
               : "memory");
  return v;
}

DEVICE void store_shared4(u32 address, const float* v) {
  asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(address), "f"(v[0]), "f"(v[1]), "f"(v[2]), "f"(v[3])
               : "memory");
}

DEVICE float2 load_shared2(u32 address) {
  float2 v;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(v.x), "=f"(v.y) : "r"(address) : "memory");
  return v;
}

DEVICE float load_shared_scale(u32 address) {
  if constexpr (SCALE == 0) {
    float value;
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(value) : "r"(address) : "memory");
    return value;
  } else {
    u16 bits;
    asm volatile("ld.shared.u16 %0, [%1];" : "=h"(bits) : "r"(address) : "memory");
    return SCALE == 1 ? BFloat16::unpack(bits) : Float16::unpack(bits);
  }
}

// ---- producers: a warp for each kind of operand, one thread of it at work ----
// One thread for all of them would be too slow: it takes some 40 instructions, one after another, for each copy.

// The codes of row groups FIRST, FIRST + 2, ... and nothing that another kernel writes.
template <int FIRST>
DEVICE void produce_codes(const Params& p, const Shared& s, Schedule schedule) {
  Ring ring;
  const u64 policy = schedule.count_y == 1 ? kEvictFirst : kEvictNormal;  // weights of few tokens are read once
  const int count = (p.rows + 63) / 64;
  while (schedule.advance()) {
    const unsigned char* source[(ROW_GROUPS + 1) / 2];
#pragma unroll
    for (int i = FIRST; i < ROW_GROUPS; i += 2) {
      const int tile = min(schedule.tile_x * ROW_GROUPS + i, count - 1);  // beyond the last row anything will do
      const long long block = static_cast<long long>(schedule.expert() * count + tile) * p.blocks + schedule.first;
      source[i / 2] = p.codes + block * TILE_BYTES;
    }
    for (int block = schedule.first; block < schedule.last; ++block, ring.skip(1)) {
      barrier_wait(s.empty(ring.stage), ring.phase ^ 1);
      barrier_arrive_expect(s.full(ring.stage), (ROW_GROUPS + 1 - FIRST) / 2 * TILE_BYTES);
#pragma unroll
      for (int i = FIRST; i < ROW_GROUPS; i += 2) {
        bulk_load(s.codes(ring.stage) + i * TILE_BYTES, source[i / 2], TILE_BYTES, s.full(ring.stage), policy);
        source[i / 2] += TILE_BYTES;
      }
    }
  }
}

DEVICE void produce_row_scales(const Params& p, const Shared& s, Schedule schedule) {
  Ring ring;
  while (schedule.advance()) {
    for (int block = schedule.first; block < schedule.last; ++block, ring.skip(1)) {
      barrier_wait(s.empty(ring.stage), ring.phase ^ 1);
      barrier_arrive_expect(s.full(ring.stage), ROW_SCALE_BYTES);
      tma_load(s.row_scale(ring.stage), &p.row_scale, s.full(ring.stage), schedule.expert() * p.rows + schedule.row(),
               block, kEvictNormal);
    }
  }
}

// Bytes from one block's scales of tokens to those of the next.
DEVICE u32 scale_column(const Params& p) { return (p.tokens + 3) / 4 * 16; }

DEVICE void produce_tokens(const Params& p, const Shared& s, Schedule schedule) {
  Ring ring;
  wait_for_previous_kernel();
  if constexpr (TOKEN_SCALES > 0) {
    const u32 bytes = p.blocks * scale_column(p);
    barrier_arrive_expect(s.scales_ready(), bytes);
    bulk_load(s.token_scale(0), p.token_scale_of, bytes, s.scales_ready(), kEvictNormal);
  }
  while (schedule.advance()) {
    for (int block = schedule.first; block < schedule.last; ++block, ring.skip(1)) {
      barrier_wait(s.empty(ring.stage), ring.phase ^ 1);
      barrier_arrive_expect(s.full(ring.stage), TOKENS_BYTES);
#pragma unroll
      for (int panel = 0; panel < PANELS; ++panel) {
        tma_load(s.x(ring.stage) + panel * PANEL_BYTES, &p.x, s.full(ring.stage), block * BK + panel * (BK / PANELS),
                 schedule.token(), kEvictNormal);
      }
      if constexpr (TOKEN_SCALE_BYTES > 0) {
        tma_load(s.token_scale(ring.stage), &p.token_scale, s.full(ring.stage), schedule.token() & ~(3 * EXPERTS), block,
                 kEvictNormal);
      }
    }
  }
}

// ---- math ----

// Where this thread stands: its group, and in that group's fragments.
struct Position {
  int row_group, k_group, warp, lane;
  u32 codes, scales;  // in shared memory, of stage 0
  DEVICE Position(const Shared& s) : warp(uniform(threadIdx.x / 32 % 4)), lane(threadIdx.x % 32) {
    const int group = uniform(threadIdx.x / 128);
    row_group = group % ROW_GROUPS;
    k_group = group / ROW_GROUPS;
    codes = s.codes(0) + row_group * TILE_BYTES + thread() * 16;
    scales = s.row_scale(0) + row() * SCALE_SIZE;
    asm volatile("" : "+r"(codes), "+r"(scales));  // not to be computed again in every block
  }
  DEVICE int row() const { return row_group * 64 + warp * 16 + lane / 4; }  // and 8 below
  DEVICE int column(int j) const { return 8 * j + 2 * (lane % 4); }        // and the next
  DEVICE int thread() const { return warp * 32 + lane; }
};

// A thread's codes of one block and the scales of its two rows.
struct Block {
  u32 words[8];
  float scale[2];
  DEVICE void load(const Position& at, int stage) {
    const u32 address = at.codes + stage * (ROW_GROUPS * TILE_BYTES), scales = at.scales + stage * ROW_SCALE_BYTES;
    const uint4 a = load_shared_u4(address), b = load_shared_u4(address + TILE_BYTES / 2);
    words[0] = a.x, words[1] = a.y, words[2] = a.z, words[3] = a.w;
    words[4] = b.x, words[5] = b.y, words[6] = b.z, words[7] = b.w;
    scale[0] = load_shared_scale(scales);
    scale[1] = load_shared_scale(scales + 8 * SCALE_SIZE);
  }
};

DEVICE u32 multiply_add2(u32 a, u32 b, u32 c) {
  u32 result;
  if constexpr (X == 1) {
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(c));
  } else {
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(c));
  }
  return result;
}

// What a decoded code has to be multiplied by.
constexpr float UNIT = X == 1 ? 64.f : 512.f;

// The register operands of one step of the MMA: codes over UNIT, exactly.
DEVICE void decode(const u32 (&words)[8], int step, u32 (&a)[4]) {
  if constexpr (X == 0) {
    const u32 low = words[2 * step], high = words[2 * step + 1];
    a[0] = low & 0x87878787;
    a[1] = __funnelshift_l(low, low, 4) & 0x87878787;
    a[2] = high & 0x87878787;
    a[3] = __funnelshift_l(high, high, 4) & 0x87878787;
  } else {
    // A nibble n = code + 8 at the bottom of a 16-bit float is n times the smallest subnormal, four bits above it is 16
    // times that: the first exponent goes on where subnormals end. Multiplied by 2^127 or 2^123 (2^15 or 2^11) that is
    // n / UNIT, and the same operation takes 8 / UNIT away.
    constexpr u32 low = X == 1 ? 0x7f007f00 : 0x78007800, high = X == 1 ? 0x7d007d00 : 0x68006800;
    constexpr u32 eight = X == 1 ? 0xbe00be00 : 0xa400a400;
    const u32 word = words[step], upper = word >> 8;
    a[0] = multiply_add2(word & 0x000f000f, low, eight);
    a[1] = multiply_add2(word & 0x00f000f0, high, eight);
    a[2] = multiply_add2(upper & 0x000f000f, low, eight);
    a[3] = multiply_add2(upper & 0x00f000f0, high, eight);
  }
}

// Keeps operands in their registers until the MMA that reads them has ended (to be called after the wait): assemblers
// before 13.3 may give such a register away while the MMA still reads it.
DEVICE void pin_operands(u32 (&a)[STEPS][4]) {
#pragma unroll
  for (int i = 0; i < STEPS * 4; ++i) asm volatile("" : "+r"(a[i / 4][i % 4])::"memory");
}

DEVICE void decode_all(const Block& block, u32 (&a)[STEPS][4]) {
#pragma unroll
  for (int step = 0; step < STEPS; ++step) decode(block.words, step, a[step]);
}

// Of part `part` of a stage's tokens.
DEVICE void multiply(float (&product)[PART / 2], u32 (&a)[STEPS][4], const Shared& s, int stage, int part) {
  const u32 x = descriptor_low(s.x(0)) + stage * (PANELS * PANEL_BYTES / 16) + part * (PART * 128 / 16);
  pin(product);
  pin_operands(a);
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < STEPS; ++step) {
    constexpr int in_panel = STEPS / PANELS;
    wgmma(product, a[step], descriptor(x + step / in_panel * (PANEL_BYTES / 16) + 2 * (step % in_panel)), step > 0);
  }
  wgmma_commit();
  pin(product);
}

DEVICE void promote(float* sum, const float (&product)[PART / 2], const float (&scale)[2]) {
#pragma unroll
  for (int i = 0; i < PART / 2; ++i) sum[i] += scale[i / 2 % 2] * product[i];
}

// Of two tokens; those of an expert may begin anywhere.
DEVICE float2 load_token_scales(u32 address) {
  if (EXPERTS) return {__int_as_float(load_shared_int(address)), __int_as_float(load_shared_int(address + 4))};
  return load_shared2(address);
}

// Of a thread's tokens.
struct ColumnScales {
  float2 value[BY / 8];
  DEVICE void load(u32 address, const Position& at) {
#pragma unroll
    for (int j = 0; j < BY / 8; ++j) value[j] = load_token_scales(address + 4 * at.column(j));
  }
};

DEVICE void promote_grouped(float (&sum)[ACCUMULATORS], const float (&part)[ACCUMULATORS], const float (&scale)[2],
                            const ColumnScales& tokens) {
#pragma unroll
  for (int j = 0; j < BY / 8; ++j) {
    const float2 token = tokens.value[j];
    sum[4 * j + 0] += scale[0] * token.x * part[4 * j + 0];
    sum[4 * j + 1] += scale[0] * token.y * part[4 * j + 1];
    sum[4 * j + 2] += scale[1] * token.x * part[4 * j + 2];
    sum[4 * j + 3] += scale[1] * token.y * part[4 * j + 3];
  }
}

// Where the scales of the tile's tokens are for a block. EXPERTS: some bytes behind where the copy engine began.
struct TokenScales {
  u32 first, column;
  DEVICE TokenScales(const Params& p, const Shared& s, const Schedule& schedule) : column(scale_column(p)) {
    first = TOKEN_SCALES ? s.token_scale(0) + schedule.first * column : EXPERTS ? 4 * (schedule.token() & 3) : 0;
    if constexpr (TOKEN_SCALES > 0) barrier_wait(s.scales_ready(), 0);
  }
  DEVICE u32 of(const Shared& s, int stage, int block) const {
    return TOKEN_SCALES ? first + block * column : s.token_scale(stage) + first;
  }
};

// An arrival at a barrier does not wait for reads of shared memory that are still on their way. Codes and scales of rows
// are read before the MMA of their block and have long arrived when it has ended. Scales of tokens are read late: their
// stage is given back when the next block's MMA is under way. That writes the sums which the scales were multiplied with,
// so they must have arrived.
constexpr bool GIVE_BACK_LATE = TOKEN_SCALE_BYTES > 0;
static_assert(!GIVE_BACK_LATE || STAGES >= 2 * K_GROUPS, "a group holds one stage while it waits for the next");

// A warp gives a stage back to the producers.
DEVICE void give_back(const Shared& s, const Position& at, int stage) {
  if (GIVE_BACK_LATE) __syncwarp();  // else all lanes have just waited for the MMA
  if (at.lane < ARRIVALS) barrier_arrive(s.empty(stage));
}

#if PARTS == 1
// The sums of `blocks` blocks of K, of which this group takes every K_GROUPS-th.
DEVICE void accumulate(float (&sum)[ACCUMULATORS], const Shared& s, const Position& at, Ring ring, int blocks,
                       const TokenScales& scales) {
  float part[ACCUMULATORS];
  Block block;
  int held = 0;
  if (K_GROUPS > 1) ring.skip(at.k_group);
  if (PREFETCH && at.k_group < blocks) {
    barrier_wait(s.full(ring.stage), ring.phase);
    block.load(at, ring.stage);
  }
  for (int i = at.k_group; i < blocks; i += K_GROUPS) {
    if constexpr (!PREFETCH) {
      barrier_wait(s.full(ring.stage), ring.phase);
      block.load(at, ring.stage);
    }
    u32 a[STEPS][4];
    decode_all(block, a);
    const float scale[2] = {block.scale[0], block.scale[1]};
    multiply(part, a, s, ring.stage, 0);
    if (GIVE_BACK_LATE && i > at.k_group) give_back(s, at, held);
    held = ring.stage;
    ring.skip(K_GROUPS);
    if (PREFETCH && i + K_GROUPS < blocks) {
      barrier_wait(s.full(ring.stage), ring.phase);
      block.load(at, ring.stage);
    }
    ColumnScales tokens;
    if (GROUPED && EARLY) tokens.load(scales.of(s, held, i), at);
    wgmma_wait<0>();
    pin(part);
    pin_operands(a);
    if (GROUPED && !EARLY) tokens.load(scales.of(s, held, i), at);
    if (!GIVE_BACK_LATE) give_back(s, at, held);
    if constexpr (GROUPED) {
      promote_grouped(sum, part, scale, tokens);
    } else {
      promote(sum, part, scale);
    }
  }
  if (GIVE_BACK_LATE && at.k_group < blocks) give_back(s, at, held);
}

#else
// One block, whose first product is under way: the next part's is begun before this one is promoted, after the last part
// (LAST: of all blocks) the next block's first.
template <bool LAST>
DEVICE void step(float (&sum)[ACCUMULATORS], float (&product)[2][PART / 2], u32 (&a)[STEPS][4], u32 (&next)[STEPS][4],
                 float (&scale)[2], Ring& ring, const Shared& s, const Position& at) {
  const int stage = ring.stage;
  Block block;
  if (!LAST) ring.skip(1);
#pragma unroll
  for (int part = 0; part < PARTS; ++part) {
    const bool end = part == PARTS - 1;
    if (!end) multiply(product[(part + 1) % 2], a, s, stage, part + 1);
    if (!LAST && part == PARTS - 2) {
      barrier_wait(s.full(ring.stage), ring.phase);
      block.load(at, ring.stage);
    }
    if (!LAST && end) {
      decode_all(block, next);
      multiply(product[0], next, s, ring.stage, 0);
    }
    if (LAST && end) {
      wgmma_wait<0>();
    } else {
      wgmma_wait<1>();
    }
    pin(product[part % 2]);
    if (end) pin_operands(a);
    if (end) give_back(s, at, stage);
    promote(sum + part * (PART / 2), product[part % 2], scale);
  }
  if (!LAST) scale[0] = block.scale[0], scale[1] = block.scale[1];
}

// The sums of `blocks` blocks of K.
DEVICE void accumulate(float (&sum)[ACCUMULATORS], const Shared& s, const Position& at, Ring ring, int blocks,
                       const TokenScales&) {
  float product[2][PART / 2], scale[2];
  u32 even[STEPS][4], odd[STEPS][4];
  Block block;
  barrier_wait(s.full(ring.stage), ring.phase);
  block.load(at, ring.stage);
  scale[0] = block.scale[0], scale[1] = block.scale[1];
  decode_all(block, even);
  multiply(product[0], even, s, ring.stage, 0);
  for (; blocks > 2; blocks -= 2) {
    step<false>(sum, product, even, odd, scale, ring, s, at);
    step<false>(sum, product, odd, even, scale, ring, s, at);
  }
  if (blocks == 2) {
    step<false>(sum, product, even, odd, scale, ring, s, at);
    step<true>(sum, product, odd, even, scale, ring, s, at);
  } else {
    step<true>(sum, product, even, odd, scale, ring, s, at);
  }
}
#endif

// ---- sums of several groups and CTAs ----

// The groups that took K blocks in turns give their sums to the first of them, which adds them in order.
DEVICE void reduce_groups(const Shared& s, const Position& at, float (&sum)[ACCUMULATORS]) {
  auto place = [&](int k_group, int i) {
    return s.reduced() + ((((k_group - 1) * ROW_GROUPS + at.row_group) * ACCUMULATORS + i) * 128 + at.thread() * 4) * 4;
  };
  named_barrier_sync(1, MATH_THREADS);  // the sums of the last tile have been read
  if (at.k_group > 0) {
#pragma unroll
    for (int i = 0; i < ACCUMULATORS; i += 4) store_shared4(place(at.k_group, i), sum + i);
  }
  named_barrier_sync(1, MATH_THREADS);
  if (at.k_group > 0) return;
#pragma unroll
  for (int group = 1; group < K_GROUPS; ++group) {
#pragma unroll
    for (int i = 0; i < ACCUMULATORS; i += 2) {
      const float2 v = load_shared2(place(group, i / 4 * 4) + i % 4 * 4);
      sum[i] += v.x;
      sum[i + 1] += v.y;
    }
  }
}

#if SPLIT > 1
// The place of four of a thread's sums among those that the first CTA of a cluster receives from part `part` of K.
DEVICE u32 place_of(const Shared& s, const Position& at, int part, int i) {
  return s.received() + (((part - 1) * ROW_GROUPS + at.row_group) * ACCUMULATORS + i) * 512 + at.thread() * 16;
}

DEVICE void hand_over(const Params&, const Shared& s, const Position& at, const float (&sum)[ACCUMULATORS]) {
  const u32 barrier = cluster_address(s.sums_ready(), 0);
#pragma unroll
  for (int i = 0; i < ACCUMULATORS; i += 4) {
    const u32 place = cluster_address(place_of(s, at, blockIdx.x % SPLIT, i), 0);
    store_cluster_async(place, barrier, sum[i], sum[i + 1], sum[i + 2], sum[i + 3]);
  }
}

DEVICE void collect(const Params&, const Shared& s, const Schedule&, const Position& at, float (&sum)[ACCUMULATORS]) {
  barrier_wait(s.sums_ready(), 0);
#pragma unroll
  for (int part = 1; part < SPLIT; ++part) {
#pragma unroll
    for (int i = 0; i < ACCUMULATORS; i += 2) {
      const float2 v = load_shared2(place_of(s, at, part, i / 4 * 4) + i % 4 * 4);
      sum[i] += v.x;
      sum[i + 1] += v.y;
    }
  }
}
#else
DEVICE float4* partial_of(const Params& p, const Position& at, int cta) {
  return reinterpret_cast<float4*>(p.partials) + (cta * ROW_GROUPS + at.row_group) * (64 * BY / 4) + at.thread();
}

// The sums of the end of a tile that another CTA owns go to global memory, register by register.
DEVICE void hand_over(const Params& p, const Shared&, const Position& at, const float (&sum)[ACCUMULATORS]) {
  float4* place = partial_of(p, at, blockIdx.x);
#pragma unroll
  for (int i = 0; i < ACCUMULATORS; i += 4) {
    __stcg(place + i / 4 * 128, make_float4(sum[i], sum[i + 1], sum[i + 2], sum[i + 3]));
  }
  named_barrier_sync(2 + at.row_group, 128);  // the flag's release then covers the writes of all 128 threads
  if (at.thread() == 0) flag_set(p.flags + blockIdx.x * ROW_GROUPS + at.row_group);
}

// The owner of a tile adds the parts that the CTAs after it computed, in their order.
DEVICE void collect(const Params& p, const Shared&, const Schedule& schedule, const Position& at,
                    float (&sum)[ACCUMULATORS]) {
  const int end = (schedule.tile + 1) * schedule.blocks;
  for (int cta = blockIdx.x + 1; cta < gridDim.x && schedule.begin_of(cta) < end; ++cta) {
    if (at.warp == 0) flag_take(p.flags + cta * ROW_GROUPS + at.row_group);
    named_barrier_sync(2 + at.row_group, 128);
    const float4* place = partial_of(p, at, cta);
#pragma unroll
    for (int i = 0; i < ACCUMULATORS; i += 4) {
      const float4 v = __ldcg(place + i / 4 * 128);
      sum[i] += v.x;
      sum[i + 1] += v.y;
      sum[i + 2] += v.z;
      sum[i + 3] += v.w;
    }
  }
}

#endif

// ---- output ----

#if OUTPUT == 2
using Half = Float16;
#else
using Half = BFloat16;
#endif

DEVICE float load_bias(const Params& p, int row) {
  if (BIAS == 0 || row >= p.rows) return 0.f;
  if constexpr (BIAS == 1) return __ldg(static_cast<const float*>(p.bias) + row);
  const u16 bits = __ldg(static_cast<const u16*>(p.bias) + row);
  return BIAS == 3 ? Float16::unpack(bits) : BFloat16::unpack(bits);
}

// Everything that a sum still lacks: the unit of the codes, the scale of its token, the bias of its row.
DEVICE void finish(const Params& p, const Schedule& schedule, const Position& at, float (&sum)[ACCUMULATORS]) {
  const int row = schedule.row() + at.row();
  const float bias[2] = {load_bias(p, row), load_bias(p, row + 8)};
#pragma unroll
  for (int j = 0; j < BY / 8; ++j) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float scale = UNIT;
      const int token = schedule.token() + at.column(j) + i;
      if (X == 0 && !GROUPED && token < p.tokens) scale *= __ldg(p.token_scale_of + token);
      sum[4 * j + i] = scale * sum[4 * j + i] + bias[0];
      sum[4 * j + 2 + i] = scale * sum[4 * j + 2 + i] + bias[1];
    }
  }
}

// A tile [tokens][64 rows] of 16 bits, swizzled.
DEVICE void write_tile(u32 buffer, const Position& at, const float (&sum)[ACCUMULATORS]) {
  const u32 chunk = 2 * at.warp + at.lane / 8 % 2;  // 8 rows of the weight
#pragma unroll
  for (int j = 0; j < BY / 8; j += 2) {
    const int token = 8 * (j + at.lane / 16) + at.lane % 8;
    const u32 address = buffer + token * 128 + ((chunk ^ at.lane % 8) << 4);
    const float* v = sum + 4 * j;
    store_matrix_x4_transposed(address, Half::pack(v[0], v[1]), Half::pack(v[2], v[3]), Half::pack(v[4], v[5]),
                               Half::pack(v[6], v[7]));
  }
}

// The rows of a tile that are its expert's.
DEVICE void store_rows(const Params& p, const Schedule& schedule, const Position& at, u32 buffer) {
  const int first = schedule.row() + at.row_group * 64;
#pragma unroll
  for (int i = at.thread(); i < BY * 8; i += 128) {
    const int token = i / 8, chunk = i % 8, row = first + 8 * chunk, index = schedule.token() + token;
    if (index >= schedule.end_token || row >= p.rows) continue;
    const uint4 v = load_shared_u4(buffer + token * 128 + ((chunk ^ token % 8) << 4));
    *reinterpret_cast<uint4*>(static_cast<u16*>(p.out) + index * p.out_stride + row) = v;
  }
}

// Through shared memory to the copy engine.
DEVICE void store_tile(const Params& p, const Shared& s, const Schedule& schedule, const Position& at,
                       const float (&sum)[ACCUMULATORS]) {
  const u32 buffer = s.output(at.row_group);
  const bool leader = at.thread() == 0;
  if (!EXPERTS && leader) tma_store_wait_read<0>();
  named_barrier_sync(2 + at.row_group, 128);
  write_tile(buffer, at, sum);
  if constexpr (EXPERTS) {
    named_barrier_sync(2 + at.row_group, 128);
    store_rows(p, schedule, at, buffer);
    return;
  }
  async_proxy_fence();
  named_barrier_sync(2 + at.row_group, 128);
  const int row = schedule.row() + at.row_group * 64;
  if (leader && row < p.rows) tma_store(&p.output, buffer, row, schedule.token());
  if (leader) tma_store_commit();
}

DEVICE void store_element(const Params& p, const Schedule& schedule, int token, int row, float value) {
  if (token >= schedule.end_token || row >= p.rows) return;
  const long long index = token * p.out_stride + row;
#if OUTPUT == 0
  static_cast<float*>(p.out)[index] = value;
#else
  static_cast<u16*>(p.out)[index] = static_cast<u16>(Half::pack(value, 0.f));
#endif
}

DEVICE void store_registers(const Params& p, const Schedule& schedule, const Position& at,
                            const float (&sum)[ACCUMULATORS]) {
  const int row = schedule.row() + at.row();
#pragma unroll
  for (int i = 0; i < ACCUMULATORS; ++i) {
    store_element(p, schedule, schedule.token() + at.column(i / 4) + i % 2, row + i / 2 % 2 * 8, sum[i]);
  }
}

DEVICE void compute(const Params& p, const Shared& s, Schedule schedule) {
  const Position at(s);
  Ring ring;
  bool first = true;
  while (schedule.advance()) {
    schedule.settle();
    float sum[ACCUMULATORS];
#pragma unroll
    for (int i = 0; i < ACCUMULATORS; ++i) sum[i] = 0.f;
    accumulate(sum, s, at, ring, schedule.last - schedule.first, TokenScales(p, s, schedule));
    ring.skip_many(schedule.last - schedule.first);
    if (K_GROUPS > 1) reduce_groups(s, at, sum);
    if (K_GROUPS > 1 && at.k_group > 0) continue;
    if (first) wait_for_previous_kernel();  // it may still read what lies where the output goes
    first = false;
    if (!EXPERTS && schedule.first > 0) {
      hand_over(p, s, at, sum);
      continue;
    }
    if (!EXPERTS && schedule.last < schedule.blocks) collect(p, s, schedule, at, sum);
    finish(p, schedule, at, sum);
    if constexpr (OUTPUT_TMA) {
      store_tile(p, s, schedule, at, sum);
    } else {
      store_registers(p, schedule, at, sum);
    }
  }
  if (OUTPUT_TMA && !EXPERTS && at.thread() == 0) tma_store_wait<0>();
}

// ---- the kernel: math groups first, then the producer group ----

extern "C" __global__ void __launch_bounds__(THREADS, 1) gemm_int4(const __grid_constant__ Params p) {
  extern __shared__ __align__(1024) unsigned char memory[];
  const Shared s{shared_address(memory)};
  const int warp = uniform(threadIdx.x / 32);

  if (warp == 4 * MATH_GROUPS && threadIdx.x % 32 == 0) {
    prefetch_tensor_map(&p.x);
    prefetch_tensor_map(&p.row_scale);
    if (TOKEN_SCALE_BYTES > 0) prefetch_tensor_map(&p.token_scale);
    if (OUTPUT_TMA && !EXPERTS) prefetch_tensor_map(&p.output);
    for (int stage = 0; stage < STAGES; ++stage) {
      barrier_init(s.full(stage), ROW_GROUPS > 1 ? 4 : 3);
      barrier_init(s.empty(stage), 4 * ROW_GROUPS * ARRIVALS);
    }
    if constexpr (TOKEN_SCALES > 0) barrier_init(s.scales_ready(), 1);
    if constexpr (SPLIT > 1) {
      barrier_init(s.sums_ready(), 1);
      barrier_arrive_expect(s.sums_ready(), RECEIVED_BYTES);
    }
    barrier_init_fence();
  }
  if constexpr (SPLIT > 1) {
    cluster_sync_relaxed();  // the barriers exist before another CTA uses them
  } else {
    __syncthreads();
  }
  let_next_kernel_start();
  if (!p.prefetch) wait_for_previous_kernel();
#if EXPERTS
  if (warp == 4 * MATH_GROUPS) locate_groups<BY>(p.counts, p.experts, s.groups());
  __syncthreads();
#endif

  const Schedule schedule(p, s.groups());
  if (warp >= 4 * MATH_GROUPS) {
    if constexpr (MOVE_REGISTERS) registers_decrease<PRODUCER_REGISTERS>();
    if (threadIdx.x % 32 == 0) {
      if (warp == 4 * MATH_GROUPS) produce_codes<0>(p, s, schedule);
      if (warp == 4 * MATH_GROUPS + 1) produce_tokens(p, s, schedule);
      if (warp == 4 * MATH_GROUPS + 2) produce_row_scales(p, s, schedule);
      if (ROW_GROUPS > 1 && warp == 4 * MATH_GROUPS + 3) produce_codes<1>(p, s, schedule);
    }
    __syncwarp();
  } else {
    if constexpr (MOVE_REGISTERS) registers_increase<MATH_REGISTERS>();
    compute(p, s, schedule);
  }
}
