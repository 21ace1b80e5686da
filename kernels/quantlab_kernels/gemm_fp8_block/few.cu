// out[M, N] = (a * a_scale) @ (b * b_scale)^T for at most 16 tokens: E4M3 operands, 1x128 scales of a, 128x128 of b; or
// b is INT4 with a scale for each row and 128 of K.
//
// Such a product is over in a few microseconds, most of which a pipeline takes to be set up, filled and drained. So
// there is none here. A warp has 16 TILES channels and every so many blocks of 128 along K; it asks for all its weights
// at once, into registers, while the kernel before this one still runs, then for its part of the tokens, and multiplies
// with mma.sync. The warps of a CTA and the CTAs of a cluster split K; their sums are added in a fixed order. CTAs are
// small, so that those of the next launch find room beside them and do the same meanwhile.
//
// Macros: TOKENS 8 or 16; TILES, WARPS, DEPTH (blocks of K that a warp asks for at once), CLUSTER (CTAs along K);
// AT_ONCE: CTAs for which a multiprocessor must have registers; OUTPUT 0 float32, 1 bfloat16, 2 float16; BIAS 0 none,
// else 1 + the same; ROW 0, or 1: a scale per row of a (and, of E4M3, one per row of b) instead, which multiply the
// finished sums; INT4 0, or 1: b is tiles for 8-bit activations (`common/int4.py`), SCALE its scales' kind as OUTPUT.
#include "sm90.cuh"

constexpr int BK = 128;              // elements of K that share a scale: a block
constexpr int ROWS = 16 * TILES;     // channels of a CTA
constexpr int COLUMNS = TOKENS / 8;  // of tiles: the MMA has 16 channels by 8 tokens
constexpr int THREADS = 32 * WARPS;
constexpr int STRIDE = ROWS + 4;     // of a token's sums in shared memory: a fragment's fall into 32 banks
static_assert(64 % ROWS == 0, "the channels of a CTA share the scales of b, and a tile of INT4");

struct Params {
  const unsigned char *a, *b;  // codes
  long long a_stride, b_stride;  // INT4: b_scale is [K / 128, b_stride]
  const float *a_scale, *b_scale;  // [K / 128, scale_stride] and [N / 128, K / 128]; ROW: [M] and [N]
  long long scale_stride;
  const void* bias;  // [N]
  void* out;         // [M, N], rows out_stride elements apart
  long long out_stride;
  int tokens, channels, blocks;  // M, N, K / 128
  int prefetch;                  // 1: weights may be loaded while the kernel before this one still runs
};

// Where a lane stands in the MMA's fragments: row of the weights, token of its operand, and along K. Of a block of 128
// it has bytes 16 quad .. + 15 of both halves, in one load each: which of K a column of the MMA is does not matter, as
// long as it is the same for weights and tokens. (Tiles of INT4 have the MMA's own order: 4 quad .. + 3 of every 16.)
struct Position {
  int group, quad, channel;
  DEVICE Position() : group(threadIdx.x % 32 / 4), quad(threadIdx.x % 4), channel(blockIdx.x / CLUSTER * ROWS) {}
};

// 16 bytes that nobody needs again, or zeros.
DEVICE uint4 load_weight(const unsigned char* address, bool taken) {
  uint4 v = {0, 0, 0, 0};
  asm volatile(
      "{\n.reg .pred taken;\nsetp.ne.u32 taken, %5, 0;\n"
      "@taken ld.global.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];\n}"
      : "+r"(v.x), "+r"(v.y), "+r"(v.z), "+r"(v.w)
      : "l"(address), "r"(static_cast<u32>(taken)));
  return v;
}

// The kernel before wrote these while this one may have been running: not through the first-level cache.
DEVICE uint4 load_tokens(const unsigned char* address, bool taken) {
  uint4 v = {0, 0, 0, 0};
  asm volatile(
      "{\n.reg .pred taken;\nsetp.ne.u32 taken, %5, 0;\n@taken ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];\n}"
      : "+r"(v.x), "+r"(v.y), "+r"(v.z), "+r"(v.w)
      : "l"(address), "r"(static_cast<u32>(taken)));
  return v;
}

DEVICE u32 load_word(const unsigned char* address, bool taken) {
  u32 v = 0;
  asm volatile("{\n.reg .pred taken;\nsetp.ne.u32 taken, %2, 0;\n@taken ld.global.cg.u32 %0, [%1];\n}"
               : "+r"(v)
               : "l"(address), "r"(static_cast<u32>(taken)));
  return v;
}

DEVICE float load_scale(const float* address, bool taken) {
  float v = 0.f;
  asm volatile("{\n.reg .pred taken;\nsetp.ne.u32 taken, %2, 0;\n@taken ld.global.cg.f32 %0, [%1];\n}"
               : "+f"(v)
               : "l"(address), "r"(static_cast<u32>(taken)));
  return v;
}

// sums[16 channels, 8 tokens] += weights[16, 32] tokens[8, 32]^T; which 32 of K these are is up to the caller.
DEVICE void multiply(float (&sums)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// The blocks of K of this CTA: `first` .. `last` - 1, of which warp w has first + w, first + w + WARPS, ...
struct Range {
  int first, last;
  DEVICE Range(const Params& p, int rank) : first(p.blocks * rank / CLUSTER), last(p.blocks * (rank + 1) / CLUSTER) {}
};

#if INT4
// Codes as register operands of the MMA, but for a mask: a sign and a magnitude are E4M3 in units of 2^-9.
constexpr float UNIT = 512.f;
struct Weights {
  uint4 codes[TILES][2];  // by halves of the block
  u32 scale[TILES][2];    // bits, of rows g and g + 8

  DEVICE void load(const Params& p, const Position& at, const Range& range, int block) {
    if (block >= range.last) return;
    const long long tile = static_cast<long long>(at.channel / 64) * p.blocks + block;
    const unsigned char* from = p.b + tile * 4096 + at.channel % 64 * 32 + threadIdx.x % 32 * 16;
#pragma unroll
    for (int i = 0; i < TILES; ++i) {
      codes[i][0] = load_weight(from + 512 * i, true);
      codes[i][1] = load_weight(from + 512 * i + 2048, true);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = at.channel + 16 * i + 8 * half + at.group;
        scale[i][half] = load_bits(p.b_scale, block * p.b_stride + row, row < p.channels);
      }
    }
  }

  // Of rows g and g + 8, in a number of the sums.
  DEVICE float scale_of(int i, int half) const {
    if (SCALE == 0) return __uint_as_float(scale[i][half]);
    const u16 bits = static_cast<u16>(scale[i][half]);
    return SCALE == 2 ? Float16::unpack(bits) : BFloat16::unpack(bits);
  }

  static DEVICE u32 load_bits(const void* base, long long index, bool taken) {
    u32 v = 0;
    if constexpr (SCALE == 0) {
      asm volatile("{\n.reg .pred taken;\nsetp.ne.u32 taken, %2, 0;\n@taken ld.global.u32 %0, [%1];\n}"
                   : "+r"(v)
                   : "l"(static_cast<const u32*>(base) + index), "r"(static_cast<u32>(taken)));
    } else {
      asm volatile("{\n.reg .pred taken;\nsetp.ne.u32 taken, %2, 0;\n@taken ld.global.u16 %0, [%1];\n}"
                   : "+r"(v)
                   : "l"(static_cast<const u16*>(base) + index), "r"(static_cast<u32>(taken)));
    }
    return v;
  }
};
#else
constexpr float UNIT = 1.f;
struct Weights {
  uint4 codes[TILES][2][2];  // by rows g and g + 8, and halves of the block
  float scale;

  DEVICE void load(const Params& p, const Position& at, const Range& range, int block) {
    if (block >= range.last) return;
    const unsigned char* from = p.b + (at.channel + at.group) * p.b_stride + block * BK + 16 * at.quad;
#pragma unroll
    for (int i = 0; i < 2 * TILES; ++i) {
      const bool inside = at.channel + at.group + 8 * i < p.channels;
      codes[i / 2][i % 2][0] = load_weight(from + 8 * i * p.b_stride, inside);
      codes[i / 2][i % 2][1] = load_weight(from + 8 * i * p.b_stride + 64, inside);
    }
    if (!ROW) scale = load_scale(p.b_scale + at.channel / 128 * p.blocks + block, true);
  }

  DEVICE float scale_of(int, int) const { return ROW ? 1.f : scale; }
};
#endif

struct Tokens {
#if INT4
  u32 codes[COLUMNS][8];  // in the order of K that the MMA's operands have
#else
  uint4 codes[COLUMNS][2];
#endif
  float scale[COLUMNS][2];  // of the two tokens whose sums the lane has

  DEVICE void load(const Params& p, const Position& at, const Range& range, int block) {
    if (block >= range.last) return;
    const unsigned char* from = p.a + at.group * p.a_stride + block * BK + (INT4 ? 4 : 16) * at.quad;
    const float* scales = p.a_scale + block * p.scale_stride + 2 * at.quad;
#pragma unroll
    for (int j = 0; j < COLUMNS; ++j) {
      const bool inside = 8 * j + at.group < p.tokens;
#if INT4
#pragma unroll
      for (int i = 0; i < 8; ++i) codes[j][i] = load_word(from + 8 * j * p.a_stride + 16 * i, inside);
#else
      codes[j][0] = load_tokens(from + 8 * j * p.a_stride, inside);
      codes[j][1] = load_tokens(from + 8 * j * p.a_stride + 64, inside);
#endif
#pragma unroll
      for (int i = 0; i < 2 && !ROW; ++i) {
        scale[j][i] = load_scale(scales + 8 * j + i, 8 * j + 2 * at.quad + i < p.tokens);
      }
    }
  }
};

using Sums = float[TILES][COLUMNS][4];

#if INT4
DEVICE void multiply_codes(float (&part)[4], u32 low, u32 high, u32 b0, u32 b1) {
  constexpr u32 mask = 0x87878787;
  const u32 low_rest = __funnelshift_l(low, low, 4), high_rest = __funnelshift_l(high, high, 4);
  multiply(part, low & mask, low_rest & mask, high & mask, high_rest & mask, b0, b1);
}
#endif

// One block of K: the sums of its products.
DEVICE void multiply_block(float (&part)[4], const Weights& w, const Tokens& t, int i, int j) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#if INT4
    const uint4& words = w.codes[i][half];
    const u32* x = t.codes[j] + 4 * half;
    multiply_codes(part, words.x, words.y, x[0], x[1]);
    multiply_codes(part, words.z, words.w, x[2], x[3]);
#else
    const uint4 &low = w.codes[i][0][half], &high = w.codes[i][1][half], &x = t.codes[j][half];
    multiply(part, low.x, high.x, low.y, high.y, x.x, x.y);
    multiply(part, low.z, high.z, low.w, high.w, x.z, x.w);
#endif
  }
}

DEVICE void add_block(Sums& sums, const Weights& w, const Tokens& t) {
#pragma unroll
  for (int i = 0; i < TILES; ++i) {
#pragma unroll
    for (int j = 0; j < COLUMNS; ++j) {
      float part[4] = {0.f, 0.f, 0.f, 0.f};
      multiply_block(part, w, t, i, j);
#pragma unroll
      for (int e = 0; e < 4; ++e) sums[i][j][e] += w.scale_of(i, e / 2) * (ROW ? 1.f : t.scale[j][e % 2]) * part[e];
    }
  }
}

// All blocks of this warp.
DEVICE void accumulate(Sums& sums, const Params& p, const Position& at, const Range& range) {
  const int first = range.first + uniform(threadIdx.x / 32);
  Weights weights[DEPTH];
  if (!p.prefetch) wait_for_previous_kernel();
#pragma unroll
  for (int d = 0; d < DEPTH; ++d) weights[d].load(p, at, range, first + d * WARPS);
  wait_for_previous_kernel();
#pragma unroll 1
  for (int block = first; block < range.last; block += DEPTH * WARPS) {
    Tokens tokens[DEPTH];
#pragma unroll
    for (int d = 0; d < DEPTH; ++d) tokens[d].load(p, at, range, block + d * WARPS);
#pragma unroll
    for (int d = 0; d < DEPTH; ++d) {
      if (block + d * WARPS < range.last) add_block(sums, weights[d], tokens[d]);
      weights[d].load(p, at, range, block + (DEPTH + d) * WARPS);
    }
  }
}

// ---- output ----

#if OUTPUT == 2
using Half = Float16;
#else
using Half = BFloat16;
#endif

DEVICE float bias_of(const Params& p, int channel) {
  if (BIAS == 0) return 0.f;
  if (BIAS == 1) return static_cast<const float*>(p.bias)[channel];
  const u16 bits = static_cast<const u16*>(p.bias)[channel];
  return BIAS == 3 ? Float16::unpack(bits) : BFloat16::unpack(bits);
}

DEVICE void store(const Params& p, int token, int channel, float value) {
  if (ROW) value *= load_scale(p.a_scale + token, true) * (INT4 ? UNIT : p.b_scale[channel]);
  if (INT4 && !ROW) value *= UNIT;
  value += bias_of(p, channel);
  const long long index = token * p.out_stride + channel;
#if OUTPUT == 0
  static_cast<float*>(p.out)[index] = value;
#else
  static_cast<u16*>(p.out)[index] = static_cast<u16>(Half::pack(value, 0.f));
#endif
}

DEVICE void write_sums(float (&shared)[TOKENS][STRIDE], const Position& at, const Sums& sums) {
#pragma unroll
  for (int i = 0; i < TILES; ++i) {
#pragma unroll
    for (int j = 0; j < COLUMNS; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) shared[8 * j + 2 * at.quad + e % 2][16 * i + 8 * (e / 2) + at.group] = sums[i][j][e];
    }
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, AT_ONCE) gemm_fp8_few(const __grid_constant__ Params p) {
  __shared__ float parts[WARPS][TOKENS][STRIDE];
  __shared__ float received[CLUSTER][TOKENS][STRIDE];  // of the cluster's first CTA: the sums of all
  let_next_kernel_start();
  if (CLUSTER > 1) asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
  const Position at;
  const int rank = CLUSTER > 1 ? cluster_rank() : 0, warp = uniform(threadIdx.x / 32), channel = at.channel;
  Sums sums = {};
  accumulate(sums, p, at, Range(p, rank));
  write_sums(parts[warp], at, sums);
  __syncthreads();
  if (CLUSTER > 1) asm volatile("barrier.cluster.wait.aligned;" ::: "memory");  // the first CTA has begun
  for (int i = threadIdx.x; i < p.tokens * ROWS; i += THREADS) {
    const int token = i / ROWS, row = i % ROWS;
    float sum = 0.f;
#pragma unroll
    for (int w = 0; w < WARPS; ++w) sum += parts[w][token][row];
    if (CLUSTER > 1) {
      const u32 target = cluster_address(shared_address(&received[rank][token][row]), 0);
      asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(target), "f"(sum) : "memory");
    } else if (channel + row < p.channels) {
      store(p, token, channel + row, sum);
    }
  }
  if (CLUSTER == 1) return;
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
  if (rank != 0) return;
  for (int i = threadIdx.x; i < p.tokens * ROWS; i += THREADS) {
    const int token = i / ROWS, row = i % ROWS;
    float sum = 0.f;
#pragma unroll
    for (int r = 0; r < CLUSTER; ++r) sum += received[r][token][row];
    if (channel + row < p.channels) store(p, token, channel + row, sum);
  }
}
