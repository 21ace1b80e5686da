// What a CTA of mla_decode is given and works on, and plain reading and writing of shared and global memory.
// Macros: L, FORMAT, PAGED, N  rows of a tile

using i64 = long long;
struct Params {
  TensorMap latent, rope;
  const char* q_latent;
  const char* q_rope;
  const float* scale;
  const int* length;
  const int* start;
  const int* table;
  float* part;
  float* sums;
  char* out;
  float* lse;
  i64 ql_batch, ql_token, ql_head, qr_batch, qr_token, qr_head;  // in elements
  i64 scale_row;                                                 // floats from a sequence, or page, to the next
  int heads, sq, rows, tiles, splits, capacity, table_row, latent_row, rope_row, batches;
  float factor;  // of scores, for powers of two
};

// Of a row (heads times queries); a division takes longer than all else that a row needs.
DEVICE int query_of(const Params& p, int row) { return p.sq == 1 ? 0 : row / p.heads; }
// Where the log-sum-exp of a row of a sequence lies.
DEVICE i64 lse_of(const Params& p, int batch, int row) {
  const int query = query_of(p, row);
  return (static_cast<i64>(batch) * p.heads + row - query * p.heads) * p.sq + query;
}

constexpr int TILE = 64, CHUNK = TILE * 128, ROPE = 64;
constexpr float LOG2E = 1.4426950408889634f;
#define INFINITE __int_as_float(0x7f800000)

template <class T>
DEVICE T read(u32 from);
template <>
DEVICE float read<float>(u32 from) {
  float r;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(r) : "r"(from) : "memory");
  return r;
}
template <>
DEVICE u32 read<u32>(u32 from) {
  u32 r;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(r) : "r"(from) : "memory");
  return r;
}
template <>
DEVICE float2 read<float2>(u32 from) {
  float2 r;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(r.x), "=f"(r.y) : "r"(from) : "memory");
  return r;
}
template <>
DEVICE uint2 read<uint2>(u32 from) {
  uint2 r;
  asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];" : "=r"(r.x), "=r"(r.y) : "r"(from) : "memory");
  return r;
}
template <>
DEVICE float4 read<float4>(u32 from) {
  float4 r;
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(r.x), "=f"(r.y), "=f"(r.z), "=f"(r.w) : "r"(from) : "memory");
  return r;
}
template <>
DEVICE uint4 read<uint4>(u32 from) {
  uint4 r;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(r.x), "=r"(r.y), "=r"(r.z), "=r"(r.w) : "r"(from) : "memory");
  return r;
}
DEVICE void write(u32 to, float x) { asm volatile("st.shared.f32 [%0], %1;" ::"r"(to), "f"(x) : "memory"); }
DEVICE void write(u32 to, float a, float b, float c, float d) {
  asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(to), "f"(a), "f"(b), "f"(c), "f"(d) : "memory");
}
DEVICE void write(u32 to, u16 x) { asm volatile("st.shared.b16 [%0], %1;" ::"r"(to), "h"(x) : "memory"); }
DEVICE void write_zeros(u32 to) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};" ::"r"(to), "r"(0) : "memory");
}

template <int KIND>
DEVICE float load_float(const char* base, i64 index) {
  if (KIND == 0) return reinterpret_cast<const float*>(base)[index];
  const u16 bits = reinterpret_cast<const u16*>(base)[index];
  return KIND == 1 ? BFloat16::unpack(bits) : Float16::unpack(bits);
}
template <int KIND>
DEVICE u32 pack(float low, float high) {
  return KIND == 1 ? BFloat16::pack(low, high) : Float16::pack(low, high);
}
// The other way: of two numbers of 16 bits, and of eight.
template <int KIND>
DEVICE float2 unpack(u32 pair) {
  const u16 low = static_cast<u16>(pair), high = static_cast<u16>(pair >> 16);
  if (KIND == 1) return {BFloat16::unpack(low), BFloat16::unpack(high)};
  return {Float16::unpack(low), Float16::unpack(high)};
}
template <int KIND>
DEVICE void unpack(float (&x)[8], uint4 pairs) {
  const u32 words[4] = {pairs.x, pairs.y, pairs.z, pairs.w};
#pragma unroll
  for (int i = 0; i < 8; i++) {
    const u16 bits = static_cast<u16>(words[i / 2] >> 16 * (i % 2));
    x[i] = KIND == 1 ? BFloat16::unpack(bits) : Float16::unpack(bits);
  }
}
DEVICE u16 e4m3_pair(float low, float high) {
  u16 r;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(r) : "f"(high), "f"(low));
  return r;
}
DEVICE float2 e4m3_floats(u16 pair) { return unpack<2>(fp8_pair(pair)); }
template <int KIND>
DEVICE void store_float(char* base, i64 index, float x) {
  if (KIND == 0) reinterpret_cast<float*>(base)[index] = x;
  if (KIND != 0) reinterpret_cast<u16*>(base)[index] = static_cast<u16>(pack<KIND>(x, 0.0f));
}
// Channels side by side, of 16 bytes or 8.
template <int KIND>
DEVICE void store_channels(char* base, i64 index, const float (&x)[4]) {
  if (KIND == 0) *reinterpret_cast<float4*>(base + 4 * index) = {x[0], x[1], x[2], x[3]};
  if (KIND != 0) *reinterpret_cast<uint2*>(base + 2 * index) = {pack<KIND>(x[0], x[1]), pack<KIND>(x[2], x[3])};
}
template <int KIND>
DEVICE void store_channels(char* base, i64 index, const float (&x)[8]) {
  *reinterpret_cast<uint4*>(base + 2 * index) = {pack<KIND>(x[0], x[1]), pack<KIND>(x[2], x[3]), pack<KIND>(x[4], x[5]),
                                                 pack<KIND>(x[6], x[7])};
}
template <int KIND>
DEVICE void store_two(char* base, i64 index, float low, float high) {
  if (KIND == 0) *reinterpret_cast<float2*>(base + 4 * index) = {low, high};
  if (KIND != 0) *reinterpret_cast<u32*>(base + 2 * index) = pack<KIND>(low, high);
}

struct Work {
  u32 per_split;  // 2^32 / splits, rounded up
  int batch, first_row, split, low, length, begin, end, count;  // of its tiles
  DEVICE Work(const Params& p) {
    place(p);
    measure(p);
  }
  DEVICE Work() {}
  // What needs nothing of the kernels before this one; kept from sinking behind the wait for them.
  DEVICE void place(const Params& p) {
    int index = blockIdx.x;
    first_row = index % p.tiles * N;
    index /= p.tiles;
    split = index % p.splits;
    batch = index / p.splits;
    per_split = 0xFFFFFFFFu / p.splits + 1;
    asm volatile("" : "+r"(first_row), "+r"(split), "+r"(batch), "+r"(per_split)::"memory");
  }
  DEVICE void measure(const Params& p) {
    length = p.length[batch];
    if (!PAGED) length = min(length, p.capacity);
    low = p.start == nullptr ? 0 : max(p.start[batch], 0);
    const int base = low / TILE * TILE, tiles = (max(length - base, 0) + TILE - 1) / TILE;
    const int share = (p.splits == 1 ? tiles : __umulhi(tiles + p.splits - 1, per_split)) * TILE;
    begin = base + split * share;
    end = min(begin + share, length);
    count = max(end - begin + TILE - 1, 0) / TILE;
  }
};
