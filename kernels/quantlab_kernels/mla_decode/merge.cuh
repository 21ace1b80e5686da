// The second kernel adds the parts of a row. A thread takes four channels of up to eight parts; a CTA takes a whole row
// or, where there are many parts, 128 channels, and groups of threads take the parts in turns and meet in shared memory.
// Parts are sums, or, with AVERAGES, averages that are rounded as results are.
constexpr int PARTS_AT_ONCE = 8, MERGERS = 512;

#ifdef AVERAGES
using Part = uint2;
DEVICE float2 floats(u32 pair) {
  const u16 low = static_cast<u16>(pair), high = static_cast<u16>(pair >> 16);
  if (QUERY == 1) return {BFloat16::unpack(low), BFloat16::unpack(high)};
  return {Float16::unpack(low), Float16::unpack(high)};
}
DEVICE float4 sum_of(Part part, float total) {
  const float2 low = floats(part.x), high = floats(part.y);
  return {total * low.x, total * low.y, total * high.x, total * high.y};
}
#else
using Part = float4;
DEVICE float4 sum_of(Part part, float) { return part; }
#endif

// Sums relative to the largest score, `top`, of all that has been added.
struct Merged {
  float top, total, x[4];
  DEVICE void add(float2 weight, float4 x4, float reference) {
    const float share = exp2_(weight.x - reference);
    total += share * weight.y;
    x[0] += share * x4.x, x[1] += share * x4.y, x[2] += share * x4.z, x[3] += share * x4.w;
  }
};

extern "C" __global__ void __launch_bounds__(MERGERS) merge(const __grid_constant__ Params p) {
  __shared__ float4 partial[MERGERS];  // [groups][lanes]
  __shared__ float2 weights[MERGERS / 32];
  const int pairs = p.batches * p.rows;
  const int ctas = gridDim.x / pairs, lanes = L / 4 / ctas;  // of a row, of a CTA
  const int lane = threadIdx.x % lanes, group = threadIdx.x / lanes, groups = blockDim.x / lanes;
  const int at = blockIdx.x / ctas;
  const int channel = 4 * (blockIdx.x % ctas * lanes + lane);
  const Part* from = reinterpret_cast<const Part*>(p.part) + (static_cast<i64>(at) * L + channel) / 4;
  const float2* given = reinterpret_cast<const float2*>(p.sums) + at;
  wait_for_previous_kernel();
  let_next_kernel_start();
  Part values[PARTS_AT_ONCE];
  float2 sums[PARTS_AT_ONCE];
  float top = -INFINITE;
#pragma unroll
  for (int i = 0; i < PARTS_AT_ONCE; i++) {
    const int part = group + i * groups;
    sums[i] = part < p.splits ? given[static_cast<i64>(part) * pairs] : float2{-INFINITE, 0.0f};
    values[i] = part < p.splits ? from[static_cast<i64>(part) * pairs * (L / 4)] : Part{};
  }
#pragma unroll
  for (int i = 0; i < PARTS_AT_ONCE; i++) top = fmaxf(top, sums[i].x);
  Merged all = {top == -INFINITE ? 0.0f : top};
#pragma unroll
  for (int i = 0; i < PARTS_AT_ONCE; i++) all.add(sums[i], sum_of(values[i], sums[i].y), all.top);
  if (groups > 1) {
    partial[threadIdx.x] = {all.x[0], all.x[1], all.x[2], all.x[3]};
    if (lane == 0) weights[group] = {top, all.total};
    __syncthreads();
    if (group != 0) return;
    for (int i = 1; i < groups; i++) top = fmaxf(top, weights[i].x);
    all = {top == -INFINITE ? 0.0f : top};
    for (int i = 0; i < groups; i++) all.add(weights[i], partial[i * lanes + lane], all.top);
  }
  const bool some = all.total > 0.0f;
  const float by = some ? 1.0f / all.total : 0.0f;
  const float four[4] = {all.x[0] * by, all.x[1] * by, all.x[2] * by, all.x[3] * by};
  store_four<QUERY>(p.out, static_cast<i64>(at) * L + channel, four);
  if (channel != 0) return;
  const int batch = at / p.rows;
  p.lse[lse_of(p, batch, at - batch * p.rows)] = some ? (all.top + log2_(all.total)) / LOG2E : -INFINITE;
}
