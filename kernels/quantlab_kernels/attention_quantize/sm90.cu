// What `reference.quantize` defines, for 16-bit inputs of head dimension 64 or 128: a launch for the means, one for the rest.
//
// A thread holds 32 elements of a token, D / 32 threads a token, D / 8 warps a block of 128 tokens. The Hadamard transform
// is additions within a thread and one or two exchanges with its neighbours. Nothing is read twice; values go through
// shared memory once, as codes, to be transposed.
//
// Macros: D; INPUT 1 bfloat16, 2 float16; QK_FP8, PV_FP8: E4M3 codes instead of INT8.
#include "sm90.cuh"

constexpr int LANES = D / 32;           // of a token
constexpr int ROWS = 32 / LANES;        // tokens of a warp
constexpr int WARPS = 128 / ROWS;
constexpr int THREADS = 32 * WARPS;
constexpr int SAMPLES = 256;
constexpr int STRIDE = 132;             // bytes of a row of the transposed tile: spreads over the banks

#if INPUT == 2
using Half = Float16;
#else
using Half = BFloat16;
#endif

struct Input {
  const u16* data;
  long long batch, head, token;  // strides
};

struct Params {
  Input q, k, v;
  const int* key_range;  // [B, 2] or null
  unsigned char *q_codes, *k_codes, *v_codes;
  float *q_scale, *q_shift, *k_scale, *v_scale, *v_mean, *turned;  // turned: [2, B, Hkv, D], of keys and of values
  int batch, heads_q, heads_kv, sq, skv, blocks_q, blocks_k;
  float unit;     // 1 / sqrt(D)
  u32 signs[4];   // of the rotation, a bit per channel: 1 is minus
};

// Element i of a thread is channel i / 8 * (8 * LANES) + 8 * lane + i % 8.
struct Position {
  int warp, row, lane;
  DEVICE Position() {
    warp = threadIdx.x / 32;
    row = threadIdx.x % 32 / LANES;
    lane = threadIdx.x % LANES;
  }
  DEVICE int channel(int i) const { return i / 8 * (8 * LANES) + 8 * lane + i % 8; }
};

DEVICE void load(float (&x)[32], const u16* row, const Position& at) {
#pragma unroll
  for (int c = 0; c < 4; ++c) {
    const uint4 v = __ldg(reinterpret_cast<const uint4*>(row + at.channel(8 * c)));
    const u32 words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 8; ++i) x[8 * c + i] = Half::unpack(static_cast<u16>(words[i / 2] >> (i % 2 * 16)));
  }
}

// x R sqrt(D), in place.
DEVICE void rotate(float (&x)[32], const Params& p, const Position& at) {
#pragma unroll
  for (int i = 0; i < 32; ++i) {
    const int channel = at.channel(i);
    const u32 sign = p.signs[channel / 32] >> (channel % 32) << 31;
    x[i] = __uint_as_float(__float_as_uint(x[i]) ^ sign);
  }
#pragma unroll
  for (int bit = 1; bit < 32; bit *= 2) {
#pragma unroll
    for (int i = 0; i < 32; ++i) {
      if (i & bit) continue;
      const float a = x[i], b = x[i | bit];
      x[i] = a + b;
      x[i | bit] = a - b;
    }
  }
#pragma unroll
  for (int bit = 1; bit < LANES; bit *= 2) {
    const float sign = at.lane & bit ? -1.f : 1.f;
#pragma unroll
    for (int i = 0; i < 32; ++i) x[i] = fmaf(x[i], sign, __shfl_xor_sync(0xffffffff, x[i], bit));
  }
}

DEVICE float largest_of(const float (&x)[32]) {
  float largest = 0.f;
#pragma unroll
  for (int i = 0; i < 32; ++i) largest = fmaxf(largest, fabsf(x[i]));
  return largest;
}

DEVICE float max_with(float x, int bit) { return fmaxf(x, __shfl_xor_sync(0xffffffff, x, bit)); }

DEVICE float scale_of(float largest, bool fp8) { return largest > 0.f ? largest / (fp8 ? 448.f : 127.f) : 1.f; }

// Four codes of x * inverse. INT8: adding 1.5 * 2^23 rounds to an integer, which is then the low byte.
template <bool fp8>
DEVICE u32 codes_of(const float* x, float inverse) {
  u32 codes;
  if constexpr (fp8) {
    asm("{\n.reg .b16 low, high;\ncvt.rn.satfinite.e4m3x2.f32 low, %2, %1;\ncvt.rn.satfinite.e4m3x2.f32 high, %4, %3;\n"
        "mov.b32 %0, {low, high};\n}"
        : "=r"(codes)
        : "f"(x[0] * inverse), "f"(x[1] * inverse), "f"(x[2] * inverse), "f"(x[3] * inverse));
  } else {
    u32 bits[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) bits[i] = __float_as_uint(__fadd_rn(__fmul_rn(x[i], inverse), 12582912.f));
    const u32 low = __byte_perm(bits[0], bits[1], 0x0040), high = __byte_perm(bits[2], bits[3], 0x0040);
    codes = __byte_perm(low, high, 0x5410);
  }
  return codes;
}

template <bool fp8>
DEVICE void store_row(unsigned char* row, const float (&x)[32], float inverse, const Position& at) {
#pragma unroll
  for (int c = 0; c < 4; ++c) {
    const uint2 v = {codes_of<fp8>(x + 8 * c, inverse), codes_of<fp8>(x + 8 * c + 4, inverse)};
    *reinterpret_cast<uint2*>(row + at.channel(8 * c)) = v;
  }
}

struct Range {
  int first, last;
  DEVICE Range(const Params& p, int batch) {
    first = p.key_range == nullptr ? 0 : max(0, __ldg(p.key_range + 2 * batch));
    last = p.key_range == nullptr ? p.skv : min(p.skv, __ldg(p.key_range + 2 * batch + 1));
  }
};

DEVICE const u16* row_of(const Input& x, int batch, int head, int token) {
  return x.data + batch * x.batch + head * x.head + token * x.token;
}

// ---- means: a CTA for the keys or the values of a head ----

extern "C" __global__ void __launch_bounds__(THREADS) attention_means(const __grid_constant__ Params p) {
  __shared__ float sums[WARPS][D], means[D];
  const Position at;
  const bool values = blockIdx.x >= p.batch * p.heads_kv;
  const int pair = blockIdx.x - (values ? p.batch * p.heads_kv : 0), batch = pair / p.heads_kv;
  const Range range(p, batch);
  const int count = max(range.last - range.first, 0), samples = min(count, SAMPLES);
  float total[32], x[32];
#pragma unroll
  for (int i = 0; i < 32; ++i) total[i] = 0.f;
#pragma unroll
  for (int first = 0; first < SAMPLES; first += 128) {
    const int sample = first + at.warp * ROWS + at.row;
    if (sample < samples) {
      const int token = range.first + static_cast<int>(static_cast<long long>(sample) * count / samples);
      load(x, row_of(values ? p.v : p.k, batch, pair % p.heads_kv, token), at);
#pragma unroll
      for (int i = 0; i < 32; ++i) total[i] += x[i];
    }
  }
#pragma unroll
  for (int i = 0; i < 32; ++i) {
#pragma unroll
    for (int bit = LANES; bit < 32; bit *= 2) total[i] += __shfl_xor_sync(0xffffffff, total[i], bit);
    if (at.row == 0) sums[at.warp][at.channel(i)] = total[i];
  }
  __syncthreads();
  if (threadIdx.x < D) {
    float sum = 0.f;
    for (int i = 0; i < WARPS; ++i) sum += sums[i][threadIdx.x];
    means[threadIdx.x] = sum / max(samples, 1);
    if (values) p.v_mean[pair * D + threadIdx.x] = means[threadIdx.x];
  }
  __syncthreads();
  if (at.warp == 0) {
#pragma unroll
    for (int i = 0; i < 32; ++i) x[i] = means[at.channel(i)];
    rotate(x, p, at);
    float* turned = p.turned + static_cast<long long>(blockIdx.x) * D;
#pragma unroll
    for (int i = 0; i < 32; ++i) {
      if (at.row == 0) turned[at.channel(i)] = x[i];
    }
  }
}

// ---- everything else: a CTA for 128 tokens of one head of queries, keys or values ----

DEVICE void subtract_mean(float (&x)[32], const Params& p, const float* turned, bool seen, const Position& at) {
#pragma unroll
  for (int i = 0; i < 32; ++i) x[i] = seen ? (x[i] - __ldg(turned + at.channel(i))) * p.unit : 0.f;
}

DEVICE void quantize_queries(const Params& p, int block, int pair) {
  const Position at;
  const int token = block * 128 + at.warp * ROWS + at.row;
  const bool inside = token < p.sq;
  const int batch = pair / p.heads_q, head = pair % p.heads_q;
  float x[32];
  load(x, row_of(p.q, batch, head, inside ? token : 0), at);
  rotate(x, p, at);
  const float* turned = p.turned + static_cast<long long>(batch * p.heads_kv + head / (p.heads_q / p.heads_kv)) * D;
  float shift = 0.f;
#pragma unroll
  for (int i = 0; i < 32; ++i) {
    x[i] *= p.unit;
    shift = fmaf(x[i], __ldg(turned + at.channel(i)) * p.unit, shift);  // both are turned: the product is that before
  }
  float largest = largest_of(x);
#pragma unroll
  for (int bit = 1; bit < LANES; bit *= 2) {
    largest = max_with(largest, bit);
    shift += __shfl_xor_sync(0xffffffff, shift, bit);
  }
  const float scale = scale_of(largest, QK_FP8);
  if (!inside) return;
  const long long index = static_cast<long long>(pair) * p.sq + token;
  if (at.lane == 0) {
    p.q_scale[index] = scale;
    p.q_shift[index] = shift;
  }
  store_row<QK_FP8>(p.q_codes + index * D, x, 1.f / scale, at);
}

DEVICE void quantize_keys(const Params& p, int block, int pair, float (&shared)[WARPS][4]) {
  const Position at;
  const int token = block * 128 + at.warp * ROWS + at.row;
  const Range range(p, pair / p.heads_kv);
  const bool seen = token >= range.first && token < range.last;
  float x[32];
  load(x, row_of(p.k, pair / p.heads_kv, pair % p.heads_kv, min(token, p.skv - 1)), at);
#pragma unroll
  for (int i = 0; i < 32; ++i) x[i] = seen ? x[i] : 0.f;
  rotate(x, p, at);
  subtract_mean(x, p, p.turned + static_cast<long long>(pair) * D, seen, at);
  float largest = max_with(max_with(max_with(largest_of(x), 1), 2), LANES == 4 ? 4 : 16);
  const int group = at.row / 2 % 4;
  shared[at.warp][group] = largest;  // the same from all threads that write it
  __syncthreads();
  largest = 0.f;
#pragma unroll
  for (int i = 0; i < WARPS; ++i) largest = fmaxf(largest, shared[i][group]);
  const float scale = scale_of(largest, QK_FP8);
  if (at.warp == 0 && at.row % 2 == 0 && at.row < 8 && at.lane == 0) {
    p.k_scale[(static_cast<long long>(pair) * p.blocks_k + block) * 4 + group] = scale;
  }
  if (token < p.skv) store_row<QK_FP8>(p.k_codes + (static_cast<long long>(pair) * p.skv + token) * D, x, 1.f / scale, at);
}

DEVICE void quantize_values(const Params& p, int block, int pair, float (&shared)[WARPS][4], unsigned char* tile) {
  const Position at;
  const int key = at.warp * ROWS + at.row, token = block * 128 + key;
  const Range range(p, pair / p.heads_kv);
  const bool seen = token >= range.first && token < range.last;
  float x[32];
  load(x, row_of(p.v, pair / p.heads_kv, pair % p.heads_kv, min(token, p.skv - 1)), at);
#pragma unroll
  for (int i = 0; i < 32; ++i) x[i] = seen ? x[i] : 0.f;
  rotate(x, p, at);
  const long long turned = static_cast<long long>(p.batch * p.heads_kv + pair) * D;
  subtract_mean(x, p, p.turned + turned, seen, at);
  float largest = largest_of(x);
#pragma unroll
  for (int bit = 1; bit < 32; bit *= 2) largest = max_with(largest, bit);
  shared[at.warp][0] = largest;
  __syncthreads();
  largest = 0.f;
#pragma unroll
  for (int i = 0; i < WARPS; ++i) largest = fmaxf(largest, shared[i][0]);
  const float scale = scale_of(largest, PV_FP8), inverse = 1.f / scale;
  if (threadIdx.x == 0) p.v_scale[static_cast<long long>(pair) * p.blocks_k + block] = scale;
  // The inverse of `reference.key_order`.
  const int place = key / 16 * 16 + key % 8 / 2 * 4 + key % 16 / 8 * 2 + key % 2;
#pragma unroll
  for (int i = 0; i < 32; i += 4) {
    const u32 codes = codes_of<PV_FP8>(x + i, inverse);
#pragma unroll
    for (int e = 0; e < 4; ++e) tile[at.channel(i + e) * STRIDE + place] = static_cast<unsigned char>(codes >> (8 * e));
  }
  __syncthreads();
  unsigned char* out = p.v_codes + (static_cast<long long>(pair) * D * p.blocks_k + block) * 128;
  for (int i = threadIdx.x; i < D * 8; i += THREADS) {
    const int channel = i / 8, part = i % 8;
    const u32* row = reinterpret_cast<const u32*>(tile + channel * STRIDE + 16 * part);
    const uint4 v = {row[0], row[1], row[2], row[3]};
    *reinterpret_cast<uint4*>(out + static_cast<long long>(channel) * p.blocks_k * 128 + 16 * part) = v;
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, 65536 / 64 / THREADS) attention_quantize(
    const __grid_constant__ Params p) {
  __shared__ float shared[WARPS][4];
  __shared__ __align__(16) unsigned char tile[D * STRIDE];
  const int queries = p.batch * p.heads_q * p.blocks_q, keys = p.batch * p.heads_kv * p.blocks_k;
  int item = blockIdx.x;
  if (item < queries) {
    quantize_queries(p, item % p.blocks_q, item / p.blocks_q);
    return;
  }
  item -= queries;
  if (item < keys) {
    quantize_keys(p, item % p.blocks_k, item / p.blocks_k, shared);
    return;
  }
  item -= keys;
  quantize_values(p, item % p.blocks_k, item / p.blocks_k, shared, tile);
}
