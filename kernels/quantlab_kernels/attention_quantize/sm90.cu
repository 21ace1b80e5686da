// What `reference.quantize` defines, for 16-bit inputs of head dimension 64, 96 or 128: a launch for the means, one for the rest.
//
// A CTA has 128 tokens of one head, a warp 16, a quad of threads two of them (g and g + 8): of every 32 channels a thread
// holds 8 in a row, which is one load of 16 bytes. Four of the bits of a channel's number (two of the thread's, two within
// its 8) are those of a tensor-core operand of 16 x 16: one MMA per 16 channels does their part of the Hadamard transform,
// exact on 16-bit inputs, and leaves every channel with the thread that loaded it. The other bits are additions within
// the thread. Nothing is read twice; values go through shared memory once, as codes, to be transposed.
//
// Macros: D; INPUT 1 bfloat16, 2 float16; QK_FP8, PV_FP8: E4M3 codes instead of INT8; ROTARY: channels of queries and keys
// that turn by their positions first, a multiple of 16; INTERLEAVED: neighbours turn together, a multiple of 8.
#include "sm90.cuh"

constexpr int THREADS = 256;
constexpr int WARPS = THREADS / 32;
constexpr int SIZE = D & -D;       // of the blocks of the rotation
constexpr int CHUNKS = D / 32;     // loads of a token by a thread
constexpr int ELEMENTS = D / 4;    // of a token in a thread
constexpr int SAMPLES = 256;
constexpr int STRIDE = 33;         // words of a row of the transposed tile: spreads over the banks

#if INPUT == 2
using Half = Float16;
#define MMA "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"
#define PAIR "f16x2"
#else
using Half = BFloat16;
#define MMA "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"
#define PAIR "bf16x2"
#endif

struct Input {
  const u16* data;
  long long batch, head, token;  // strides
};

// Division by multiplication, because addresses wait for it: `inverse` is floor((2^32 - 1) / divisor).
struct Divisor {
  int divisor;
  u32 inverse;
  DEVICE int divide(int n, int& rest) const {
    int quotient = __umulhi(n, inverse);  // or one less
    rest = n - quotient * divisor;
    if (rest >= divisor) ++quotient, rest -= divisor;
    return quotient;
  }
};

struct Params {
  Input q, k, v, cos, sin;  // cos, sin: [B, 1, S, ROTARY]
  const uint4* rotation;  // [D / 16, 32]: operands of the MMAs, by 16 channels and lane
  const int* key_range;   // [B, 2] or null
  unsigned char *q_codes, *k_codes, *v_codes;
  float *q_scale, *q_shift, *k_scale, *v_scale, *v_mean, *turned;  // turned: [2, B, Hkv, D], of keys and of values
  int batch, heads_q, heads_kv, sq, skv, blocks_q, blocks_k;
  float unit;    // 1 / sqrt(SIZE)
  u32 signs[4];  // of the rotation, a bit per channel: 1 is minus
  Divisor by_blocks_q, by_blocks_k, by_heads_q, by_heads_kv, by_group;  // group: query heads of a key head
};

// Element i of a thread is channel i / 8 * 32 + 8 * quad + i % 8, its tokens are row and row + 8 of the CTA's.
struct Position {
  int warp, lane, quad, row;
  DEVICE Position() {
    warp = threadIdx.x / 32;
    lane = threadIdx.x % 32;
    quad = lane % 4;
    row = warp * 16 + lane / 4;
  }
};

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

// 16 bytes, or zeros. Volatile and not .nc: so it stays before the wait for the kernel before.
DEVICE uint4 load_if(bool taken, const uint4* pointer) {
  uint4 v = {0, 0, 0, 0};
  asm volatile("{\n.reg .pred taken;\nsetp.ne.u32 taken, %5, 0;\n@taken ld.global.v4.u32 {%0, %1, %2, %3}, [%4];\n}"
               : "+r"(v.x), "+r"(v.y), "+r"(v.z), "+r"(v.w)
               : "l"(pointer), "r"(static_cast<u32>(taken)));
  return v;
}

// ---- rotary embedding ----

// own * cos + other * sin of two channels, rounded to 16 bits three times.
DEVICE u32 turn_pair(u32 own, u32 other, u32 cos, u32 sin) {
  u32 result;
  asm("{\n.reg .b32 a, b;\nmul.rn." PAIR " a, %1, %3;\nmul.rn." PAIR " b, %2, %4;\nadd.rn." PAIR " %0, a, b;\n}"
      : "=r"(result)
      : "r"(own), "r"(other), "r"(cos), "r"(sin));
  return result;
}

// The octet of channels that turns with this one, where neighbours do not turn together.
constexpr int HALF = ROTARY / 16;
DEVICE constexpr int partner_of(int octet) { return octet < HALF ? octet + HALF : octet - HALF; }

// Minus the second channel of each pair, for the first: what its sine multiplies.
DEVICE uint4 with_sign(uint4 own, uint4 other, int octet) {
  if constexpr (INTERLEAVED) {
    const auto swap = [](u32 pair) { return __byte_perm(pair, pair, 0x1032) ^ 0x8000u; };
    return {swap(own.x), swap(own.y), swap(own.z), swap(own.w)};
  }
  const u32 sign = octet < HALF ? 0x80008000u : 0u;
  return {other.x ^ sign, other.y ^ sign, other.z ^ sign, other.w ^ sign};
}

// Channels 8 * octet .. + 7 of a row of queries or keys, turned; `own` and, of the partner, `other` as loaded.
DEVICE uint4 embed(uint4 own, uint4 other, int octet, bool taken, const Params& p, int batch, int token) {
  if (ROTARY == 0 || octet >= ROTARY / 8) return own;
  const uint4 cos = load_if(taken, reinterpret_cast<const uint4*>(row_of(p.cos, batch, 0, token)) + octet);
  const uint4 sin = load_if(taken, reinterpret_cast<const uint4*>(row_of(p.sin, batch, 0, token)) + octet);
  other = with_sign(own, other, octet);
  return {turn_pair(own.x, other.x, cos.x, sin.x), turn_pair(own.y, other.y, cos.y, sin.y),
          turn_pair(own.z, other.z, cos.z, sin.z), turn_pair(own.w, other.w, cos.w, sin.w)};
}

DEVICE uint4 load_partner(const uint4* row, int octet, bool taken) {
  return load_if(taken && !INTERLEAVED && octet < ROTARY / 8, row + partner_of(octet));
}

// ---- means: a CTA for the keys or the values of a head ----

// Element i of x[0] R sqrt(SIZE), for thread i; the other half is scratch.
DEVICE float rotated(float (&x)[2][D], const Params& p) {
  const int i = threadIdx.x;
  if (i < D && p.signs[i / 32] >> i % 32 & 1) x[0][i] = -x[0][i];
  int at = 0;
  for (int bit = 1; bit < SIZE; bit *= 2) {
    __syncthreads();
    if (i < D) x[at ^ 1][i] = i & bit ? x[at][i ^ bit] - x[at][i] : x[at][i] + x[at][i ^ bit];
    at ^= 1;
  }
  return i < D ? x[at][i] : 0.f;
}

extern "C" __global__ void __launch_bounds__(THREADS) attention_means(const __grid_constant__ Params p) {
  __shared__ float sums[16][D], means[2][D];
  let_next_kernel_start();
  const int column = threadIdx.x % 16, row = threadIdx.x / 16, i = threadIdx.x;
  const bool values = blockIdx.x >= p.batch * p.heads_kv;
  const int pair = blockIdx.x - (values ? p.batch * p.heads_kv : 0), batch = pair / p.heads_kv;
  const Range range(p, batch);
  const int count = max(range.last - range.first, 0), samples = min(count, SAMPLES);
  float total[8] = {};
#pragma unroll
  for (int first = 0; first < SAMPLES; first += 16) {
    const int sample = first + row;
    const int offset = count <= SAMPLES ? sample : static_cast<int>(static_cast<long long>(sample) * count / SAMPLES);
    const int token = range.first + offset;
    const uint4* x = reinterpret_cast<const uint4*>(row_of(values ? p.v : p.k, batch, pair % p.heads_kv, token));
    const bool taken = sample < samples && 8 * column < D;
    uint4 words = load_if(taken, x + column);
    if (!values) words = embed(words, load_partner(x, column, taken), column, taken, p, batch, token);
    const u32 word[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
    for (int e = 0; e < 8; ++e) total[e] += Half::unpack(static_cast<u16>(word[e / 2] >> (e % 2 * 16)));
  }
#pragma unroll
  for (int e = 0; e < 8; ++e) {
    if (8 * column < D) sums[row][8 * column + e] = total[e];
  }
  __syncthreads();
  if (i < D) {
    float sum = 0.f;
#pragma unroll
    for (int r = 0; r < 16; ++r) sum += sums[r][i];
    means[0][i] = sum / max(samples, 1);
    if (values) p.v_mean[pair * D + i] = means[0][i];
  }
  const float turned = rotated(means, p);
  if (i < D) p.turned[blockIdx.x * D + i] = turned;
}

// ---- everything else: a CTA for 128 tokens of one head of queries, keys or values ----

DEVICE void multiply(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm(MMA " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %10, %10, %10};"
      : "=f"(c[0]), "=f"(c[1]), "=f"(c[2]), "=f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(0.f));
}

// The thread's elements of both tokens, times R sqrt(SIZE); zeros for a token that is not `taken`.
template <bool embedded>
DEVICE void load_rotated(float (&x)[2][ELEMENTS], const Input& input, int batch, int head, int token,
                         const bool (&taken)[2], const Params& p, const Position& at) {
  uint4 words[2][CHUNKS];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const uint4* row = reinterpret_cast<const uint4*>(row_of(input, batch, head, token + 8 * r));
    uint4 own[CHUNKS];
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c) own[c] = load_if(taken[r], row + 4 * c + at.quad);
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c) {
      const int octet = 4 * c + at.quad;
      if (!embedded || 32 * c >= ROTARY) {
        words[r][c] = own[c];
        continue;
      }
      // Halves of 32 channels and more put both octets into one thread.
      const uint4 other = HALF % 4 == 0 ? own[partner_of(4 * c) / 4] : load_partner(row, octet, taken[r]);
      words[r][c] = embed(own[c], other, octet, taken[r], p, batch, token + 8 * r);
    }
  }
#pragma unroll
  for (int c = 0; c < CHUNKS; ++c) {
    const u32 a[2][4] = {{words[0][c].x, words[1][c].x, words[0][c].y, words[1][c].y},
                         {words[0][c].z, words[1][c].z, words[0][c].w, words[1][c].w}};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint4 b = __ldg(p.rotation + (2 * c + half) * 32 + at.lane);
      float sums[2][4];
      multiply(sums[0], a[half], b.x, b.y);
      multiply(sums[1], a[half], b.z, b.w);
#pragma unroll
      for (int i = 0; i < 8; ++i) x[i / 2 % 2][8 * c + 4 * half + i / 4 * 2 + i % 2] = sums[i / 4][i % 4];
    }
  }
#pragma unroll
  for (int bit = 4; bit < SIZE / 4; bit *= 2) {
#pragma unroll
    for (int i = 0; i < 2 * ELEMENTS; ++i) {
      if (i & bit) continue;
      float &low = x[i / ELEMENTS][i % ELEMENTS], &high = x[i / ELEMENTS][i % ELEMENTS | bit];
      const float a = low, b = high;
      low = a + b;
      high = a - b;
    }
  }
}

// The thread's elements of chunk c of a rotated mean. Not through the read-only cache: the kernel before wrote them.
DEVICE void load_mean(float (&mean)[8], const float* turned, int c, const Position& at) {
  const float4* pieces = reinterpret_cast<const float4*>(turned + 32 * c + 8 * at.quad);
  const float4 a = pieces[0], b = pieces[1];
  mean[0] = a.x, mean[1] = a.y, mean[2] = a.z, mean[3] = a.w;
  mean[4] = b.x, mean[5] = b.y, mean[6] = b.z, mean[7] = b.w;
}

DEVICE void subtract_mean(float (&x)[2][ELEMENTS], const float* turned, const Position& at) {
#pragma unroll
  for (int c = 0; c < CHUNKS; ++c) {
    float mean[8];
    load_mean(mean, turned, c, at);
#pragma unroll
    for (int i = 0; i < 16; ++i) x[i / 8][8 * c + i % 8] -= mean[i % 8];
  }
}

DEVICE float largest_of(const float (&x)[ELEMENTS]) {
  float largest = 0.f;
#pragma unroll
  for (int i = 0; i < ELEMENTS; ++i) largest = fmaxf(largest, fabsf(x[i]));
  return largest;
}

DEVICE float max_with(float x, int bit) { return fmaxf(x, __shfl_xor_sync(0xffffffff, x, bit)); }

DEVICE float scale_of(float largest, bool fp8) { return largest > 0.f ? largest / (fp8 ? 448.f : 127.f) : 1.f; }

// Four codes. The inverse scale of an element that has to be 0 is 0. INT8: adding 1.5 * 2^23 rounds to an integer, which
// is then the low byte. E4M3: adding 0 takes the sign from a zero.
template <bool fp8>
DEVICE u32 codes_of(const float (&x)[4], const float (&inverse)[4]) {
  if constexpr (fp8) {
    float y[4];
    u32 codes;
#pragma unroll
    for (int i = 0; i < 4; ++i) y[i] = fmaf(x[i], inverse[i], 0.f);
    asm("{\n.reg .b16 low, high;\ncvt.rn.satfinite.e4m3x2.f32 low, %2, %1;\ncvt.rn.satfinite.e4m3x2.f32 high, %4, %3;\n"
        "mov.b32 %0, {low, high};\n}"
        : "=r"(codes)
        : "f"(y[0]), "f"(y[1]), "f"(y[2]), "f"(y[3]));
    return codes;
  } else {
    u32 bits[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) bits[i] = __float_as_uint(fmaf(x[i], inverse[i], 12582912.f));
    const u32 low = __byte_perm(bits[0], bits[1], 0x0040), high = __byte_perm(bits[2], bits[3], 0x0040);
    return __byte_perm(low, high, 0x5410);
  }
}

template <bool fp8>
DEVICE void store_row(unsigned char* row, const float (&x)[ELEMENTS], float inverse, const Position& at) {
  const float inverses[4] = {inverse, inverse, inverse, inverse};
#pragma unroll
  for (int c = 0; c < CHUNKS; ++c) {
    const float low[4] = {x[8 * c], x[8 * c + 1], x[8 * c + 2], x[8 * c + 3]};
    const float high[4] = {x[8 * c + 4], x[8 * c + 5], x[8 * c + 6], x[8 * c + 7]};
    const uint2 v = {codes_of<fp8>(low, inverses), codes_of<fp8>(high, inverses)};
    *reinterpret_cast<uint2*>(row + 32 * c + 8 * at.quad) = v;
  }
}

DEVICE void quantize_queries(const Params& p, int block, int pair) {
  const Position at;
  int head, rest;
  const int batch = p.by_heads_q.divide(pair, head), token = block * 128 + at.row;
  const bool inside[2] = {token < p.sq, token + 8 < p.sq};
  float x[2][ELEMENTS], shift[2] = {0.f, 0.f};
  load_rotated<true>(x, p.q, batch, head, token, inside, p, at);
  wait_for_previous_kernel();
  const float* turned = p.turned + (batch * p.heads_kv + p.by_group.divide(head, rest)) * D;
#pragma unroll
  for (int c = 0; c < CHUNKS; ++c) {
    float mean[8];
    load_mean(mean, turned, c, at);
#pragma unroll
    for (int i = 0; i < 16; ++i) shift[i / 8] = fmaf(x[i / 8][8 * c + i % 8], mean[i % 8], shift[i / 8]);
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    shift[r] += __shfl_xor_sync(0xffffffff, shift[r], 1);
    shift[r] += __shfl_xor_sync(0xffffffff, shift[r], 2);
    const float scale = scale_of(max_with(max_with(largest_of(x[r]), 1), 2) * p.unit, QK_FP8);
    if (!inside[r]) continue;
    const long long index = static_cast<long long>(pair) * p.sq + token + 8 * r;
    if (at.quad == 0) {
      p.q_scale[index] = scale;
      p.q_shift[index] = shift[r] * p.unit * p.unit;  // both are turned: the product is that before
    }
    store_row<QK_FP8>(p.q_codes + index * D, x[r], p.unit / scale, at);
  }
}

// The largest of one number per warp.
DEVICE float largest_over_warps(float largest, float (&shared)[WARPS][4], int group, const Position& at) {
  shared[at.warp][group] = largest;  // the same from all threads that write it
  __syncthreads();
#pragma unroll
  for (int i = 0; i < WARPS; ++i) largest = fmaxf(largest, shared[i][group]);
  return largest;
}

// Both tokens of a key or value, rotated and centred; zeros, but for the mean, where they are not seen.
template <bool embedded>
DEVICE void load_centred(float (&x)[2][ELEMENTS], bool (&seen)[2], const Params& p, const Input& input, int which,
                         int block, int pair, const Position& at) {
  int head;
  const int batch = p.by_heads_kv.divide(pair, head), token = block * 128 + at.row;
  const Range range(p, batch);
#pragma unroll
  for (int r = 0; r < 2; ++r) seen[r] = token + 8 * r >= range.first && token + 8 * r < range.last;
  load_rotated<embedded>(x, input, batch, head, token, seen, p, at);
  wait_for_previous_kernel();
  subtract_mean(x, p.turned + (which * p.batch * p.heads_kv + pair) * D, at);
}

DEVICE float largest_seen(const float (&x)[2][ELEMENTS], const bool (&seen)[2]) {
  return fmaxf(seen[0] ? largest_of(x[0]) : 0.f, seen[1] ? largest_of(x[1]) : 0.f);
}

DEVICE void quantize_keys(const Params& p, int block, int pair, float (&shared)[WARPS][4]) {
  const Position at;
  float x[2][ELEMENTS];
  bool seen[2];
  load_centred<true>(x, seen, p, p.k, 0, block, pair, at);
  const int group = at.lane / 8;  // of keys row and row + 8
  const float largest = max_with(max_with(max_with(largest_seen(x, seen), 1), 2), 4);
  const float scale = scale_of(largest_over_warps(largest, shared, group, at) * p.unit, QK_FP8);
  if (at.warp == 0 && at.lane % 8 == 0) {
    p.k_scale[(static_cast<long long>(pair) * p.blocks_k + block) * 4 + group] = scale;
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int token = block * 128 + at.row + 8 * r;
    unsigned char* row = p.k_codes + (static_cast<long long>(pair) * p.skv + token) * D;
    if (token < p.skv) store_row<QK_FP8>(row, x[r], seen[r] ? p.unit / scale : 0.f, at);
  }
}

// Codes in the order of `reference.key_order`: keys g, g + 1, g + 8, g + 9 of 16 (g even) are neighbours. Two threads
// have them; each gives away half of its channels.
template <bool fp8>
DEVICE void transpose(u32* tile, const float (&x)[2][ELEMENTS], const float (&inverse)[2], const Position& at) {
  const int odd = at.lane / 4 % 2;
  const float inverses[4] = {inverse[0], inverse[1], inverse[0], inverse[1]};
#pragma unroll
  for (int i = 0; i < ELEMENTS; ++i) {
    if (i & 4) continue;
    const float four[4] = {x[0][i], x[1][i], x[0][i + 4], x[1][i + 4]};
    const u32 own = codes_of<fp8>(four, inverses), other = __shfl_xor_sync(0xffffffff, own, 4);
    const int channel = i / 8 * 32 + 8 * at.quad + i % 8 + 4 * odd;
    tile[channel * STRIDE + 4 * at.warp + at.lane / 8] = __byte_perm(own, other, odd ? 0x3726 : 0x5140);
  }
}

DEVICE void quantize_values(const Params& p, int block, int pair, float (&shared)[WARPS][4], u32* tile) {
  const Position at;
  float x[2][ELEMENTS];
  bool seen[2];
  load_centred<false>(x, seen, p, p.v, 1, block, pair, at);
  float largest = largest_seen(x, seen);
#pragma unroll
  for (int bit = 1; bit < 32; bit *= 2) largest = max_with(largest, bit);
  const float scale = scale_of(largest_over_warps(largest, shared, 0, at) * p.unit, PV_FP8);
  if (threadIdx.x == 0) p.v_scale[static_cast<long long>(pair) * p.blocks_k + block] = scale;
  const float inverse[2] = {seen[0] ? p.unit / scale : 0.f, seen[1] ? p.unit / scale : 0.f};
  transpose<PV_FP8>(tile, x, inverse, at);
  __syncthreads();
  unsigned char* out = p.v_codes + (static_cast<long long>(pair) * D * p.blocks_k + block) * 128;
  for (int i = threadIdx.x; i < D * 8; i += THREADS) {
    const int channel = i / 8, part = i % 8;
    const u32* row = tile + channel * STRIDE + 4 * part;
    const uint4 v = {row[0], row[1], row[2], row[3]};
    *reinterpret_cast<uint4*>(out + static_cast<long long>(channel) * p.blocks_k * 128 + 16 * part) = v;
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, 2) attention_quantize(const __grid_constant__ Params p) {
  __shared__ float shared[WARPS][4];
  __shared__ u32 tile[D * STRIDE];
  const int queries = p.batch * p.heads_q * p.blocks_q, keys = p.batch * p.heads_kv * p.blocks_k;
  int item = blockIdx.x, block;
  if (item < queries) {
    const int pair = p.by_blocks_q.divide(item, block);
    quantize_queries(p, block, pair);
    return;
  }
  item -= queries;
  const bool values = item >= keys;
  const int pair = p.by_blocks_k.divide(values ? item - keys : item, block);
  if (values) {
    quantize_values(p, block, pair, shared, tile);
  } else {
    quantize_keys(p, block, pair, shared);
  }
}
