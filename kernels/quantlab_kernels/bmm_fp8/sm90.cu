// Tokens by a slice of each head, codes straight from memory into the registers of the matrix instruction.
//
// out^T = W^T a^T on mma.m16n8k16: a warp's 4096 codes are operand A and stay in its registers, 8 tokens operand B. The sum
// may run over K in any order and a tile may have its rows anywhere, if B and the stores agree. So a thread loads bytes as
// they lie in a row and calls them what the instruction wants: codes never go through shared memory.
//   not transposed: codes in a row belong to one k and to columns n. Thread (g, t) loads n = 2 TILES g .. of rows k, and
//     tile i has n = 2 TILES g + 2 i and + 1.
//   transposed: codes in a row belong to one n and to 16 k. Thread (g, t) loads them of the rows g and g + 8 of a tile.
// Warps that share a tile's K add up through shared memory. All codes are asked for at once, before the kernel waits for
// the one that makes `a` where the launch allows it: weights do not depend on it.
//
// Macros: TRANSPOSED; N, K; TILES of 16 columns in a warp; TOKENS, tiles of 8 at once; INPUT 1 bfloat16, 2 float16.
#include "sm90.cuh"

#if INPUT == 2
using Half = Float16;
#define MMA "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"
#else
using Half = BFloat16;
#define MMA "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"
#endif

constexpr int WARPS = 4;
constexpr int SLICE = 256 / TILES;  // of K, in a warp at once; never crosses a border of scale blocks
constexpr int STEPS = SLICE / 16;
constexpr int WARPS_K = TRANSPOSED ? WARPS : TILES / 2;
constexpr int COLUMNS = 16 * TILES * WARPS / WARPS_K;  // of a CTA
constexpr bool ONCE = K <= WARPS_K * SLICE;            // no warp has a second slice
constexpr int SCALES = TRANSPOSED ? 2 * TILES : 1;

struct Params {
  const u16* a;
  const unsigned char* w;
  const float* scale;
  u16* out;
  long long a_row, a_head;
  int m, heads, rows, columns, first, scale_row, shares, share;
};

template <int words>
DEVICE void load_codes(u32* x, const unsigned char* at) {
  if constexpr (words == 4)
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "l"(at));
  else if constexpr (words == 2)
    asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];" : "=r"(x[0]), "=r"(x[1]) : "l"(at));
  else
    asm volatile("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(x[0]) : "l"(at));
}

DEVICE u32 bytes(u32 x, u32 y, u32 selector) {
  u32 picked;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(picked) : "r"(x), "r"(y), "r"(selector));
  return picked;
}

// The codes in the low two bytes as 16-bit numbers, exactly.
DEVICE u32 widen(u32 codes) {
  u32 halves;
  asm("{.reg .b16 low, high;\nmov.b32 {low, high}, %1;\ncvt.rn.f16x2.e4m3x2 %0, low;}" : "=r"(halves) : "r"(codes));
#if INPUT == 2
  return halves;
#else
  return Half::pack(Float16::unpack(static_cast<u16>(halves)), Float16::unpack(static_cast<u16>(halves >> 16)));
#endif
}

DEVICE void multiply(float (&sum)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm(MMA " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// First of the four k of a slice that are a thread's in a step; those of an even step and the next lie side by side.
DEVICE int k_of(int step, int t) {
  return TRANSPOSED ? 64 * (step / 4) + 16 * t + 4 * (step % 4) : 32 * (step / 2) + 8 * t + 4 * (step % 2);
}

// Column of a warp's tile to which a half of the accumulators belongs.
DEVICE int n_of(int tile, int g, int half) {
  return TRANSPOSED ? 16 * tile + g + 8 * half : 2 * TILES * g + 2 * tile + half;
}

// What a thread has of the tokens' part of a slice.
struct Tokens {
  uint4 b[TOKENS][STEPS / 2];

  // at: a, at the head and the slice's first k. Tokens past the last are computed, and not stored.
  DEVICE void load(const Params& p, const u16* at, int token, int g, int t) {
    for (int j = 0; j < TOKENS; j++)
      for (int step = 0; step < STEPS; step += 2) {
        const u16* row = at + static_cast<long long>(min(token + 8 * j + g, p.m - 1)) * p.a_row;
        b[j][step / 2] = *reinterpret_cast<const uint4*>(row + k_of(step, t));
      }
  }
};

// What a thread has of a slice of the weight.
struct Slice {
  u32 codes[32];
  u32 a[STEPS][TILES][4];
  float scale[SCALES];

  // Ask for codes; `row` is the first of the slice's rows in the projection, n and k are relative to it.
  DEVICE void load(const Params& p, int row, int n, int k, int g, int t) {
#if TRANSPOSED
    for (int i = 0; i < 2 * TILES; i++)
      for (int c = 0; c < STEPS / 4; c++)
        load_codes<4>(codes + 4 * (i * STEPS / 4 + c),
                      p.w + static_cast<long long>(row + n + 8 * i + g) * p.columns + k + 64 * c + 16 * t);
    for (int i = 0; i < SCALES; i++) scale[i] = p.scale[(row + n + 8 * i + g) / 128 * p.scale_row + k / 128];
#else
    for (int i = 0; i < SLICE / 4; i++)
      load_codes<TILES / 2>(codes + TILES / 2 * i,
                            p.w + static_cast<long long>(row + k + k_of(i / 4, t) + i % 4) * p.columns + n + 2 * TILES * g);
    scale[0] = p.scale[(row + k) / 128 * p.scale_row + n / 128];
#endif
  }

  // Make operands of them.
  DEVICE void expand() {
    for (int step = 0; step < STEPS; step++)
      for (int i = 0; i < TILES; i++) {
        u32(&x)[4] = a[step][i];
#if TRANSPOSED
        u32 upper = codes[2 * i * STEPS + step], lower = codes[(2 * i + 1) * STEPS + step];
        x[0] = widen(upper), x[1] = widen(lower), x[2] = widen(upper >> 16), x[3] = widen(lower >> 16);
#else
        const u32* rows = codes + TILES / 2 * 4 * step + i / 2;
        u32 even = i % 2 ? 0x62 : 0x40, odd = i % 2 ? 0x73 : 0x51;
        for (int pair = 0; pair < 2; pair++) {
          u32 r0 = rows[TILES * pair], r1 = rows[TILES * pair + TILES / 2];
          x[2 * pair] = widen(bytes(r0, r1, even)), x[2 * pair + 1] = widen(bytes(r0, r1, odd));
        }
#endif
      }
  }

  DEVICE void accumulate(float (&total)[TOKENS][TILES][4], const Tokens& tokens) const {
    float sum[TOKENS][TILES][4] = {};
    for (int step = 0; step < STEPS; step += 2)
      for (int i = 0; i < TILES; i++)
        for (int j = 0; j < TOKENS; j++) {
          uint4 b = tokens.b[j][step / 2];
          multiply(sum[j][i], a[step][i], b.x, b.y);
          multiply(sum[j][i], a[step + 1][i], b.z, b.w);
        }
    for (int j = 0; j < TOKENS; j++)
      for (int i = 0; i < TILES; i++)
        for (int e = 0; e < 4; e++) total[j][i][e] += sum[j][i][e] * scale[TRANSPOSED ? 2 * i + e / 2 : 0];
  }
};

// Sums of all of K, two tiles of 16 columns: a thread has four of them in a row.
DEVICE void store(const Params& p, const float (&total)[TOKENS][TILES][4], int token, int end, int head, int n, int g,
                  int t) {
  for (int j = 0; j < TOKENS; j++)
    for (int e = 0; e < 2; e++) {
      long long to = (static_cast<long long>(token + 8 * j + 2 * t + e) * p.heads + head) * N + n + 4 * g;
      uint2 x = {Half::pack(total[j][0][e], total[j][0][2 + e]), Half::pack(total[j][1][e], total[j][1][2 + e])};
      if (token + 8 * j + 2 * t + e < end) *reinterpret_cast<uint2*>(p.out + to) = x;
    }
}

extern "C" __global__ void __launch_bounds__(32 * WARPS) bmm_fp8(const __grid_constant__ Params p) {
  __shared__ float part[WARPS_K][COLUMNS][8 * TOKENS + 1];
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  int tile = blockIdx.x / p.shares, head = tile / (N / COLUMNS);
  int column = tile % (N / COLUMNS) * COLUMNS, own = warp / WARPS_K * 16 * TILES;  // of the CTA, and of the warp in it
  int row = head * p.rows + p.first, first_k = warp % WARPS_K * SLICE;
  int token = blockIdx.x % p.shares * p.share, end = min(token + p.share, p.m);
  Slice slice;
  if (ONCE && first_k < K) slice.load(p, row, column + own, first_k, g, t);
  let_next_kernel_start();
  wait_for_previous_kernel();
  const u16* at = p.a + head * p.a_head;
  Tokens tokens;
  if (ONCE && first_k < K) tokens.load(p, at + first_k, token, g, t), slice.expand();
  for (; token < end; token += 8 * TOKENS) {
    float total[TOKENS][TILES][4] = {};
    if (!ONCE) {
      for (int k = first_k; k < K; k += WARPS_K * SLICE) {
        slice.load(p, row, column + own, k, g, t), tokens.load(p, at + k, token, g, t);
        slice.expand();
        slice.accumulate(total, tokens);
      }
    } else if (first_k < K) {
      slice.accumulate(total, tokens);
      if (token + 8 * TOKENS < end) tokens.load(p, at + first_k, token + 8 * TOKENS, g, t);
    }
    if constexpr (WARPS_K == 1) {
      store(p, total, token, end, head, column + own, g, t);
    } else {
      for (int j = 0; j < TOKENS; j++)
        for (int i = 0; i < TILES; i++)
          for (int e = 0; e < 4; e++)
            part[warp % WARPS_K][own + n_of(i, g, e / 2)][8 * j + 2 * t + e % 2] = total[j][i][e];
      __syncthreads();
      for (int i = threadIdx.x; i < 8 * TOKENS * COLUMNS / 2; i += 32 * WARPS) {
        int j = i / (COLUMNS / 2), n = i % (COLUMNS / 2) * 2;
        if (token + j >= end) break;
        float x = 0, y = 0;
        for (int k = 0; k < WARPS_K; k++) x += part[k][n][j], y += part[k][n + 1][j];
        long long to = (static_cast<long long>(token + j) * p.heads + head) * N + column + n;
        *reinterpret_cast<u32*>(p.out + to) = Half::pack(x, y);
      }
      __syncthreads();
    }
  }
}
